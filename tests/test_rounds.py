"""Online rounds: state carried over, no repeated work, every method; and the commands `train` and `merge`."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from conftest import paired_rows, unpaired_rows, user
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from halos_trl import toy
from halos_trl.cli import main as command
from halos_trl.cli.methods import METHODS

EXAMPLES = Path(__file__).parents[1] / "examples"
QUIET = [
    *("--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--disable_tqdm", "true"),
    *("--report_to", "none", "--logging_steps", "1", "--per_device_train_batch_size", "8", "--learning_rate", "0.01"),
]
REWARD = """
def even(prompt, completion, number):
    return float(len(completion) % 2 == number % 2) + len(completion) / 100
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory, _tokenizer, _tiny):
    folder = tmp_path_factory.mktemp("files")
    _tiny.save_pretrained(folder / "tiny")
    _tokenizer.save_pretrained(folder / "tiny")
    prompts = [{"prompt": user(text), "number": i} for i, text in enumerate(toy.make_prompts(30, 0, "feedback"))]
    datasets.Dataset.from_list(prompts).to_json(folder / "prompts.jsonl")
    unpaired_rows(16).to_json(folder / "unpaired.jsonl")
    (folder / "paired").mkdir()
    paired_rows(16).to_json(folder / "paired" / "train.jsonl")
    paired_rows(8, seed=1).to_json(folder / "paired" / "test.jsonl")
    (folder / "rewards.py").write_text(REWARD)
    return folder


def rounds(files, output, *more, method="kto"):
    """Two rounds of two steps; the exit code."""
    return command.main([
        "rounds", method, "--model_name_or_path", str(files / "tiny"), "--dataset_name", str(files / "prompts.jsonl"),
        "--reward_function", f"{files / 'rewards.py'}:even", "--output_dir", str(output), *QUIET, "--rounds", "2",
        "--prompts_per_round", "8", "--samples_per_prompt", "2", "--max_tokens", "6", "--max_steps", "2",
        "--temperature", "1", *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """Two rounds of KTO."""
    output = tmp_path_factory.mktemp("rounds") / "run"
    assert rounds(files, output) == 0
    return output


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log(folder):
    (checkpoint,) = folder.glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def test_each_round_has_its_prompts_samples_feedback_and_metrics(finished):
    for number in (1, 2):
        folder = finished / f"round-{number:02d}"
        samples, feedback = lines(folder / "samples.jsonl"), lines(folder / "feedback.jsonl")
        assert [s["prompt_id"] for s in samples] == [8 * (number - 1) + i // 2 for i in range(16)]
        scores = [line["score"] for line in lines(folder / "feedback.jsonl.scores")]
        expected = [
            float(len(s["output"]) % 2 == s["number"] % 2) + len(s["output"]) / 100 for s in samples if s["output"]
        ]
        assert scores == expected
        middle = sorted(scores)
        median = (middle[len(middle) // 2] + middle[(len(middle) - 1) // 2]) / 2
        assert [row["label"] for row in feedback] == [score >= median for score in scores]
        metrics = json.loads((folder / "metrics.json").read_text())
        assert (metrics["steps"], metrics["total_steps"], metrics["rows"]) == (2, 2 * number, len(feedback))
    table = json.loads((finished / "rounds.json").read_text())
    assert [row["round"] for row in table] == [0, 1, 2]
    assert (finished / "rounds.csv").read_text().count("\n") == 4 and (finished / "rounds.png").stat().st_size > 1000


def test_second_samples_come_from_the_first_policy(finished, files):
    first = lines(finished / "round-02" / "samples.jsonl")[0]
    assert first["generator"] == str(finished / "round-01" / "policy")
    start = load_file(files / "tiny" / "model.safetensors")
    assert not same(weights_of(finished / "round-01" / "policy"), start)


def test_optimizer_and_schedule_are_carried_over(finished):
    state = torch.load(finished / "round-02" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert {int(s["step"]) for s in state["state"].values()} == {4}
    assert [entry["step"] for entry in log(finished / "round-02")] == [1, 2, 3, 4]
    assert log(finished / "round-02")[:2] == log(finished / "round-01")  # not four steps on the second round's rows
    # linear from 0.01 to 0 over the four steps of both rounds
    assert [entry["learning_rate"] for entry in log(finished / "round-02")] == pytest.approx(
        [0.01, 0.0075, 0.005, 0.0025]
    )


def test_reference_of_a_round_is_the_previous_policy_or_the_first(finished, files, tmp_path):
    def reward_at_the_start_of_round_2(folder):
        entry = log(folder / "round-02")[2]
        return abs(entry["rewards/chosen"]) + abs(entry["rewards/rejected"])

    assert reward_at_the_start_of_round_2(finished) < 1e-4
    assert rounds(files, tmp_path / "first", "--reference", "first") == 0
    assert same(*(weights_of(folder / "round-01" / "policy") for folder in (finished, tmp_path / "first")))
    assert reward_at_the_start_of_round_2(tmp_path / "first") > 1e-3


@pytest.mark.parametrize(
    "lost", [["metrics.json"], ["metrics.json", "feedback.jsonl"], ["metrics.json", "feedback.jsonl", "samples.jsonl"]]
)
def test_interrupted_round_is_finished_to_the_same_weights(finished, files, tmp_path, lost):
    """Finished stages are not repeated; unfinished ones are."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    for settings in copy.rglob(".*.settings.yaml"):  # of the run at its new place
        settings.write_text(settings.read_text().replace(str(finished), str(copy)))
    for name in lost:
        (copy / "round-02" / name).unlink()
    if "samples.jsonl" in lost:  # as if killed while it sampled
        whole = (
            (finished / "round-02" / "samples.jsonl").read_bytes().replace(str(finished).encode(), str(copy).encode())
        )
        (copy / "round-02" / "samples.jsonl").write_bytes(whole[: len(whole) // 2])
        settings = copy / "round-02" / ".samples.jsonl.settings.yaml"
        settings.write_text(settings.read_text().replace("finished: true", "finished: false"))
        (copy / "round-02" / "feedback.jsonl.scores").unlink()
        (copy / "round-02" / ".feedback.jsonl.scores.settings.yaml").unlink()
    kept = [copy / "round-01" / "policy" / "model.safetensors", copy / "round-01" / "samples.jsonl"]
    before = [path.stat().st_mtime_ns for path in kept]
    assert rounds(files, copy) == 0
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert same(*(weights_of(folder / "round-02" / "policy") for folder in (finished, copy)))
    outputs = [[s["output"] for s in lines(folder / "round-02" / "samples.jsonl")] for folder in (finished, copy)]
    assert outputs[0] == outputs[1]


def test_finished_run_is_not_done_again(finished, files):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("round-*/**/*") if path.is_file()}
    assert rounds(files, finished) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("round-*/**/*") if path.is_file()} == before


@pytest.mark.parametrize("method", ["dpo", "slic", "grpo", "ppo"])
def test_rounds_of_other_methods(files, tmp_path, method):
    more = ["--humanline"] if method == "dpo" else []
    assert rounds(files, tmp_path / "run", "--samples_per_prompt", "4", *more, method=method) == 0
    rows = lines(tmp_path / "run" / "round-02" / "feedback.jsonl")
    expected = {"dpo": "chosen", "slic": "chosen", "grpo": "scores", "ppo": "scores"}[method]
    assert expected in rows[0]
    assert [entry["step"] for entry in log(tmp_path / "run" / "round-02")] == [1, 2, 3, 4]
    if more:  # the moved reference is part of what the next round goes on from
        assert (tmp_path / "run" / "round-01" / "checkpoint-2" / "reference.safetensors").is_file()


def test_rounds_of_an_adapter(files, tmp_path):
    lora = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    assert rounds(files, tmp_path / "run", *lora, "--reference", "first") == 0
    start, end = (load_file(tmp_path / "run" / f"round-0{i}" / "policy" / "adapter_model.safetensors") for i in (1, 2))
    assert not same(start, end)


def test_prompts_end_before_the_rounds_do(files, tmp_path, capsys):
    assert rounds(files, tmp_path / "run", "--rounds", "3", "--prompts_per_round", "20") == 0
    assert "no prompts left after 2 rounds" in capsys.readouterr().out
    assert len(lines(tmp_path / "run" / "round-02" / "samples.jsonl")) == 20


def test_without_matplotlib_the_numbers_are_written_and_a_message_says_what_to_do(tmp_path, monkeypatch, capsys):
    from halos_trl.cli import rounds_report

    monkeypatch.setattr(rounds_report, "find_spec", lambda name: None)
    rounds_report.write_report(tmp_path, [{"round": 0, "accuracy": 0.5}, {"round": 1, "accuracy": 0.75, "rows": 3}])
    assert "pip install halos_trl[plots]" in capsys.readouterr().out
    assert (tmp_path / "rounds.csv").read_text().splitlines() == ["round,accuracy,rows", "0,0.5,", "1,0.75,3"]
    assert not (tmp_path / "rounds.png").exists()


@pytest.mark.parametrize(
    ("more", "method", "message"),
    [
        ([], "sft", "`sft` is not a method; choose one of kto, dpo"),
        (["--rounds", "0"], "kto", "`--rounds 0` must be at least 1"),
        (["--samples_per_prompt", "1"], "dpo", "compares samples of the same prompt"),
        (["--use_peft"], "kto", "Pass `--reference first`"),
        (["--save_only_model", "true"], "kto", "cannot be used with rounds"),
        (["--reward_function", ""], "kto", "There is no scorer for the samples"),
        (["--beta_", "1"], "kto", "Unknown argument `--beta_`. Did you mean `--beta`?"),
    ],
)
def test_mistakes_of_rounds_are_said_before_anything_is_written(files, tmp_path, capsys, more, method, message):
    assert rounds(files, tmp_path / "run", *more, method=method) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_settings_are_refused_by_name(finished, files, capsys):
    assert rounds(files, finished, "--beta", "0.5") == 2
    assert "was started with other settings: `beta` was '(none)' and is 0.5" in capsys.readouterr().err


# -- train and merge -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_those_of_the_examples(name):
    path = EXAMPLES / f"train_{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    method = METHODS[name]
    assert dict(method.toy) == example.TOY
    assert dict(method.toy_humanline) == getattr(example, "TOY_HUMANLINE", {})
    text = path.read_text()
    assert f"{method.trainer.__name__}(" in text and f'"{method.feedback}", TOY' in text


def train(files, method, data, output, *more):
    named = ["--model_name_or_path", str(files / "tiny"), "--dataset_name", str(files / data)]
    return command.main(["train", method, *named, "--output_dir", str(output), "--max_steps", "2", *QUIET, *more])


def test_train_prints_what_it_read_and_trains(files, tmp_path, capsys):
    assert train(files, "kto", "unpaired.jsonl", tmp_path / "out", "--beta", "0.3", "--hub_token", "hf_secret") == 0
    said = capsys.readouterr()
    assert "# halos-trl train kto" in said.err and "beta: 0.3" in said.err and "hf_secret" not in said.err + said.out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_train_a_reward_model(files, tmp_path, capsys):
    assert train(files, "reward", "paired", tmp_path / "out") == 0
    assert "held-out pair accuracy: " in capsys.readouterr().out
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 1


@pytest.mark.parametrize("words", [[], ["--beta", "1"], ["kot"]])
def test_train_needs_a_method(words, capsys):
    assert command.main(["train", *words]) == 2
    assert "kto, dpo, cdpo, ipo, simpo, slic, grpo, ppo, reward" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "data"), [("kto", "unpaired.jsonl"), ("reward", "paired")])
def test_merge(files, tmp_path, method, data, capsys):
    lora = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
    lora += ["--lora_task_type", "SEQ_CLS"] if method == "reward" else []
    assert train(files, method, data, tmp_path / "out", *lora, "--learning_rate", "0.1") == 0
    assert command.main(["merge", "--adapter", str(tmp_path / "out")]) == 0
    ids = torch.arange(24).reshape(2, 12) + 5
    merged_class = AutoModelForCausalLM if method == "kto" else AutoModelForSequenceClassification
    merged = merged_class.from_pretrained(tmp_path / "out-merged")
    base = merged_class.from_pretrained(files / "tiny")
    with torch.no_grad():
        if method == "kto":
            adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
            torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-5)
            assert (merged(ids).logits - base(ids).logits).abs().max() > 1e-3
        else:
            assert merged(ids, attention_mask=torch.ones_like(ids)).logits.shape == (2, 1)
    assert command.main(["merge", "--adapter", str(tmp_path / "out")]) == 2
    assert "exists. Choose another folder" in capsys.readouterr().err
    assert command.main(["merge", "--adapter", str(files / "tiny")]) == 2
    assert "it is not the folder of an adapter" in capsys.readouterr().err


# -- the pages -----------------------------------------------------------------------------------------------------

DOCS = EXAMPLES.parent / "docs"
SMALL = {
    "sample": ["--max_tokens", "4", "--num_prompts", "4"],
    "train": [*QUIET, "--max_steps", "1", "--warmup_steps", "0"],
    "rounds": [*QUIET, *"--max_steps 1 --warmup_steps 0 --max_tokens 4 --rounds 1 --prompts_per_round 4".split()],
}
"""Flags that make a documented command short, by subcommand."""


def blocks(page, language):
    """The code blocks of a page of the docs, in order."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / f"{page}.md").read_text(), flags=re.S)


def commands(page):
    """The words of each command line of a page, in order."""
    return [line.partition(" #")[0].split() for block in blocks(page, "bash") for line in block.splitlines()]


def run_halos_trl(words):
    assert command.main([*words, *SMALL.get(words[0], [])]) == 0, words


def run_command_for_halos_users(words):
    """Run a command of docs/from_halos.md; of those of other projects, check what they are given."""
    program, *rest = words
    if program == "halos-trl":
        run_halos_trl(rest)
    elif program == "accelerate":
        launched = launch_command_parser().parse_args(rest[1:])
        assert rest[0] == "launch" and launched.module and launched.training_script == "halos_trl.cli.main"
        assert Path(launched.config_file).is_file()
        run_halos_trl(launched.training_script_args)
    elif program == "alpaca_eval":
        (path,) = re.findall(r"--model_outputs=(\S+\.json)", " ".join(words))
        assert [item["instruction"] for item in json.loads(Path(path).read_text())] == ["Say a.", "Say b."]
    else:
        assert program == "lm_eval"
        named = dict(pair.split("=") for pair in rest[rest.index("--model_args") + 1].split(","))
        assert AutoModelForCausalLM.from_pretrained(named["pretrained"]).config.vocab_size > 0
        assert AutoTokenizer.from_pretrained(named["tokenizer"]).chat_template


@pytest.mark.slow
def test_commands_for_halos_users_run(files, tmp_path, monkeypatch):
    """The commands of docs/from_halos.md, unchanged, with folders named like the Hub models."""
    monkeypatch.chdir(tmp_path)
    for name in ("Meta-Llama-3-8B", "Meta-Llama-3-8B-Instruct"):
        shutil.copytree(files / "tiny", f"meta-llama/{name}")
    shutil.copytree(EXAMPLES.parent / "configs", "configs")
    shutil.copy(files / "prompts.jsonl", ".")
    for kind, name in {"binary": "feedback.json", "pairwise": "pairs.json"}.items():
        shutil.copy(Path(__file__).parent / "data" / "halos" / f"{kind}_feedback.json", name)
    instructions = [
        {"instruction": text, "output": "o", "generator": "g", "dataset": "d"} for text in ("Say a.", "Say b.")
    ]
    datasets.Dataset.from_list(instructions).to_json("tatsu-lab/alpaca_eval/data/eval-00000-of-00001.jsonl")

    (sft,) = blocks("from_halos", "python")
    short = sft.replace('_dir="llama3-8b_sft"', '_dir="llama3-8b_sft", use_cpu=True, bf16=False, max_steps=2')
    assert short != sft
    exec(compile(short, "docs/from_halos.md", "exec"), {})
    assert not same(weights_of(Path("llama3-8b_sft")), weights_of(Path("meta-llama/Meta-Llama-3-8B")))
    for words in commands("from_halos"):
        run_command_for_halos_users(words)

    assert not same(weights_of(Path("llama3-8b_sft_kto")), weights_of(Path("llama3-8b_sft")))
    pairs = json.loads(Path("pairwise_feedback_dataset.json").read_text())
    assert pairs and {pair["type"] for pair in pairs} == {"pairwise_feedback"}
    assert Path("llama3-8b-online/round-01/policy/model.safetensors").is_file()


@pytest.mark.slow
def test_commands_of_the_pages_run(files, tmp_path, monkeypatch):
    """Each command of docs/command.md and docs/rounds.md as it stands there, on a tiny model."""
    found = [words[1:] for page in ("command", "rounds") for words in commands(page) if words[:1] == ["halos-trl"]]
    assert {words[0] for words in found} == {"sample", "label", "train", "rounds", "merge", "plan", "report"}
    monkeypatch.chdir(tmp_path)
    shutil.copytree(files / "tiny", "MODEL")
    shutil.copy(files / "prompts.jsonl", ".")
    Path("rewards.py").write_text("def score(completion, number):\n    return float(len(completion) + number)\n")
    lora = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
    assert train(files, "kto", "unpaired.jsonl", "policy-lora", *lora) == 0
    assert train(files, "kto", "unpaired.jsonl", "policy-humanline", "--humanline", "true") == 0
    for words in found:
        run_halos_trl(words)
    for output in (
        "samples.jsonl",
        "feedback.jsonl",
        "policy",
        "run/round-01/policy",
        "run-dpo/rounds.csv",
        "policy-merged",
        "policy/report.html",
        "policy/comparison.html",
    ):
        assert Path(output).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--reward_function", "rewards.py:evne"), "there is no file rewards.py"),
        (("--reward_model", "some-model"), "Both `--reward_model` and `--reward_function` are given"),
        (("--threshold", "medain"), "The threshold is 'medain'"),
        (("--temperature", "0"), "`temperature` is 0, which gives the same completion"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_it_begins(files, tmp_path, flags, message, capsys):
    assert rounds(files, tmp_path / "run", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "begun, it would refuse the mended flags"


def test_a_reward_model_that_is_none_is_refused_before_it_begins(files, tmp_path, capsys):
    run, model = str(tmp_path / "run"), str(tmp_path / "nowhere")
    named = ["--model_name_or_path", str(files / "tiny"), "--dataset_name", str(files / "prompts.jsonl")]
    assert command.main(["rounds", "kto", *named, "--output_dir", run, "--reward_model", model, *QUIET]) == 2
    assert f"The reward model '{model}' cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
