"""Sampling: generation, stored values, resuming."""

import copy
import json
import multiprocessing
import os
import random
import signal
import time
from itertools import chain

import datasets
import pytest
import torch
import yaml
from conftest import assistant, unpaired_rows, user

from halos_trl import toy
from halos_trl.cli import main as command
from halos_trl.cli.arguments import read_arguments
from halos_trl.cli.sample import SampleArguments
from halos_trl.data.prompts import unique_prompts
from halos_trl.sampling import SamplingSettings, TransformersSampler, prompt_tokens, samples, window_size

PLAIN = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 6}
ROWS = [{"prompt": user(text)} for text in toy.make_prompts(11, 0, "test")] + [{"prompt": user("a" * 30)}]


def drawn(model, tokenizer, rows=ROWS, skip=0, **settings):
    return list(samples(TransformersSampler(model, tokenizer, SamplingSettings(**PLAIN | settings)), rows, skip))


def test_greedy_completions_are_the_argmax_of_each_step_without_padding(model, tokenizer):
    found = drawn(model, tokenizer, temperature=0.0, batch_size=5)
    for row, (completion,) in zip(ROWS, found, strict=True):
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        made = []
        while len(made) < 6 and tokenizer.eos_token_id not in made:
            with torch.no_grad():
                made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
        assert completion.token_ids == made
        assert completion.text == tokenizer.decode(made, skip_special_tokens=True)
        assert completion.finish_reason == ("stop" if made[-1] == tokenizer.eos_token_id else "length")


def test_settings_of_the_model_do_not_mix_in(model, tokenizer):
    """Models bring a `generation_config.json` along, e.g. with top-k 20 and a repetition penalty."""
    expected = drawn(copy.deepcopy(model), tokenizer, n=2)
    for name, value in {"top_k": 1, "repetition_penalty": 5.0, "temperature": 0.1, "min_new_tokens": 6}.items():
        setattr(model.generation_config, name, value)
    assert drawn(model, tokenizer, n=2) == expected


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_are_the_models_own(model, tokenizer, temperature):
    for row, completions in zip(
        ROWS,
        drawn(model, tokenizer, n=3, logprobs=True, temperature=temperature, top_p=0.5, batch_size=7),
        strict=True,
    ):
        prompt = prompt_tokens(tokenizer, row, "")
        for completion in completions:
            with torch.no_grad():
                logits = model.double()(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
            model.float()
            logps = logits.log_softmax(-1)[range(len(completion.token_ids)), completion.token_ids]
            torch.testing.assert_close(torch.tensor(completion.logprobs), logps.float(), rtol=0, atol=2e-5)


def test_top_p_draws_from_the_nucleus_only(model, tokenizer):
    """With a tiny `top_p` the nucleus is the most likely token."""
    greedy = drawn(model, tokenizer, temperature=0.0)
    assert drawn(model, tokenizer, top_p=1e-6) == greedy
    assert drawn(model, tokenizer) != greedy


def test_draws_follow_the_models_distribution(model, tokenizer):
    """First tokens of 2,000 samples compared with their probabilities: chi-squared over the 20 likeliest, 5 sigma."""
    model.lm_head.weight.data *= 8  # away from uniform
    row = ROWS[0]
    with torch.no_grad():
        probs = model(torch.tensor([prompt_tokens(tokenizer, row, "")])).logits[0, -1].softmax(-1)
    (found,) = drawn(model, tokenizer, [row], n=2000, max_tokens=1, batch_size=500, temperature=1.0)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in found]), minlength=len(probs))
    top = probs.topk(20).indices
    deviation = ((counts[top] - 2000 * probs[top]) ** 2 / (2000 * probs[top] * (1 - probs[top]))).sum()
    assert deviation < 20 + 5 * 40**0.5


def test_rows_of_a_cut_run_are_those_of_a_whole_one(model, tokenizer):
    settings = {"n": 3, "batch_size": 4, "logprobs": True}
    assert window_size(SamplingSettings(**settings)) == 10  # so the 12 rows are two windows
    whole = drawn(model, tokenizer, **settings)
    assert len({c.text for completions in whole for c in completions}) > 30
    for skip in (0, 1, 9, 10, 11, 12):
        assert drawn(model, tokenizer, skip=skip, **settings) == whole[skip:]
    assert drawn(model, tokenizer, seed=1, **settings) != whole


def test_sampling_leaves_the_global_random_state_and_the_mode_alone(model, tokenizer):
    model.train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    drawn(model, tokenizer)
    assert torch.equal(torch.rand(1), expected) and model.training


# -- prompts -------------------------------------------------------------------------------------------------------


def text_of(tokenizer, prompt):
    return tokenizer.decode(prompt_tokens(tokenizer, {"prompt": prompt}, "Prompt 0"))


def test_chat_template_is_applied_once_and_a_begun_answer_is_continued(tokenizer):
    assert text_of(tokenizer, user("a")) == "<|user|>a<|assistant|>"
    assert text_of(tokenizer, user("a") + assistant("b")) == "<|user|>a<|assistant|>b"
    assert text_of(tokenizer, user("a") + assistant("")) == "<|user|>a<|assistant|>"
    assert (
        text_of(tokenizer, user("a") + assistant("b") + user("c"))
        == "<|user|>a<|assistant|>b<|end|><|user|>c<|assistant|>"
    )
    assert text_of(tokenizer, "<|user|>a<|assistant|>") == "<|user|>a<|assistant|>"


def test_unique_prompts_in_order_with_the_other_columns():
    rows = [
        {"prompt": user("b"), "completion": "x", "label": True, "answer": 1},
        {"prompt": user("a"), "completion": "y", "label": True, "answer": 2},
        {"prompt": user("b"), "completion": "z", "label": False, "answer": 3},
        {"messages": user("c") + assistant("d")},
        {"instruction": "e", "output": "f", "dataset": "g"},
        {"chosen": user("h") + assistant("i"), "rejected": user("h") + assistant("j")},
    ]
    assert unique_prompts(rows) == [
        {"prompt": user("b"), "answer": 1}, {"prompt": user("a"), "answer": 2}, {"prompt": user("c")},
        {"prompt": user("e")}, {"prompt": user("h")},
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"Row 1 of `d` has no prompt \(its columns: \['text'\]\)"):
        unique_prompts([rows[0], {"text": "a"}], "`d`")
    with pytest.raises(ValueError, match="Row 0 of data has an empty prompt"):
        unique_prompts([{"prompt": ""}])


def test_wrong_prompts_are_named(model, tokenizer):
    with pytest.raises(ValueError, match="Prompt 11 of the data has 32 tokens, more than `max_prompt_length` 20"):
        drawn(model, tokenizer, max_prompt_length=20)
    with pytest.raises(ValueError, match="Prompt 0 of the data is empty"):
        drawn(model, tokenizer, [{"prompt": ""}])
    with pytest.raises(ValueError, match=r"Prompt 0 of the data cannot be rendered.*roles: \['tool'\]"):
        drawn(model, tokenizer, [{"prompt": [{"role": "tool", "content": "a"}]}])


# -- ends ----------------------------------------------------------------------------------------------------------


def test_stop_texts_end_a_completion_and_are_not_in_it(model, tokenizer):
    plain = drawn(model, tokenizer, max_tokens=12, n=4)
    letter = next(char for (c, *_) in plain for char in c.text[2:] if char.isalpha() and char.isascii())
    stopped = drawn(model, tokenizer, max_tokens=12, n=4, stop=(letter,))
    hit = 0
    for expected, found in zip(chain(*plain), chain(*stopped), strict=True):
        assert found.text == expected.text.split(letter)[0]
        if letter in expected.text:
            hit += 1
            assert found.finish_reason == "stop"
            assert tokenizer.decode(found.token_ids, skip_special_tokens=True) == found.text + letter
            assert found.token_ids == expected.token_ids[: len(found.token_ids)]
    assert hit


def test_stop_text_of_several_tokens_with_text_behind_it(model, tokenizer):
    sampler = TransformersSampler(model, tokenizer, SamplingSettings(stop=("xyz", "bc"), **PLAIN))
    ids = tokenizer("abcxyz")["input_ids"]
    completion = sampler._completion([*ids, 0, 0], None)
    assert completion == ("a", ids[:3], None, "stop")


def test_added_token_as_stop_text_ends_like_the_end_token(model, tokenizer):
    sampler = TransformersSampler(model, tokenizer, SamplingSettings(stop=("<|user|>",), **PLAIN))
    assert sampler.stop_texts == []
    user_id = tokenizer.convert_tokens_to_ids("<|user|>")
    assert sampler.end_ids == [tokenizer.eos_token_id, user_id]
    completion = sampler._completion([40, 41, user_id, 0, 0], [0.0] * 5)
    assert completion.token_ids == [40, 41, user_id] and completion.finish_reason == "stop"
    assert completion.text == tokenizer.decode([40, 41]) and len(completion.logprobs) == 3


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"n": 0}, "`n` is 0"), ({"max_tokens": 0}, "`max_tokens` is 0"), ({"temperature": -1.0}, "`temperature` is"),
        ({"temperature": float("nan")}, "`temperature` is nan"), ({"top_p": 0.0}, "`top_p` is 0"),
        ({"top_p": 1.5}, "`top_p` is 1.5"), ({"stop": ("",)}, "empty text"),
        ({"temperature": 0.0, "n": 2}, "the same completion every time"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        SamplingSettings(**settings)


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory, _tokenizer, _tiny):
    folder = tmp_path_factory.mktemp("files")
    _tiny.save_pretrained(folder / "tiny")
    _tokenizer.save_pretrained(folder / "tiny")
    rows = unpaired_rows(24)
    rows = rows.add_column("answer", [f"answer {i}" for i in range(24)])
    datasets.concatenate_datasets([rows, rows]).to_json(folder / "rows.jsonl")
    return folder


def words(files, output, *more):
    return [
        "sample", "--model_name_or_path", str(files / "tiny"), "--dataset_name", str(files / "rows.jsonl"),
        "--output", str(output), "--num_samples_per_prompt", "3", "--max_tokens", "12", "--temperature", "1",
        "--batch_size", "4", "--logprobs", *more,
    ]  # fmt: skip


def run(*arguments):
    return command.main(words(*arguments))


def test_samples_have_the_fields_of_halos_and_the_columns_of_the_rows(files, tmp_path, capsys):
    output = tmp_path / "samples.jsonl"
    assert run(files, output, "--num_skip", "2", "--num_prompts", "3") == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    rows = unpaired_rows(24)
    assert [(item["prompt_id"], item["sample_id"]) for item in found] == [(i, j) for i in (2, 3, 4) for j in range(3)]
    for item in found:
        assert item["prompt"] == rows[item["prompt_id"]]["prompt"]
        assert item["answer"] == f"answer {item['prompt_id']}"
        assert (item["type"], item["dataset"], item["split"]) == ("sample", "rows_train", "train")
        assert item["generator"] == str(files / "tiny")
        assert isinstance(item["output"], str) and len(item["logprobs"]) == len(item["token_ids"]) <= 12
    shown = yaml.safe_load(
        capsys.readouterr().err.split("# halos-trl sample\n")[1].split("sampling:")[0].split("\r")[0]
    )
    assert shown["num_skip"] == 2 and shown["logprobs"] is True and shown["top_p"] == 0.95


def test_output_is_refused_finished_or_begun_otherwise_in_one_line(files, tmp_path, capsys):
    output = tmp_path / "samples.jsonl"
    assert run(files, output, "--num_prompts", "2") == 0
    before = output.read_bytes()
    capsys.readouterr()
    assert run(files, output, "--num_prompts", "2") == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("halos-trl sample: `") and "is finished" in last and "--overwrite" in last
    assert output.read_bytes() == before
    assert run(files, output, "--num_prompts", "2", "--overwrite") == 0
    assert output.read_bytes() == before


def test_alpaca_eval_file_is_an_array_of_instruction_output_and_generator(files, tmp_path, capsys):
    samples_file, array = tmp_path / "a.jsonl", tmp_path / "new" / "outputs.json"
    one = ["--num_samples_per_prompt", "1", "--num_prompts", "2", "--alpaca_eval", str(array)]
    assert run(files, samples_file, *one) == 0
    items = [json.loads(line) for line in samples_file.read_text().splitlines()]
    assert json.loads(array.read_text()) == [
        {"instruction": row["prompt"][0]["content"], "output": item["output"], "generator": str(files / "tiny")}
        for row, item in zip(unpaired_rows(2), items, strict=True)
    ]
    assert run(files, tmp_path / "b.jsonl", *one) == 2
    assert "outputs.json` exists" in capsys.readouterr().err
    assert not (tmp_path / "b.jsonl").exists()


def test_alpaca_eval_file_of_a_run_that_was_killed_before_it(files, tmp_path):
    """All samples are there, the array is not: the same command writes it."""
    samples_file, array = tmp_path / "a.jsonl", tmp_path / "outputs.json"
    one = ["--num_samples_per_prompt", "1", "--num_prompts", "2", "--alpaca_eval", str(array)]
    assert run(files, samples_file, *one) == 0
    whole = array.read_bytes()
    array.unlink()
    settings = tmp_path / ".a.jsonl.settings.yaml"
    settings.write_text(settings.read_text().replace("finished: true", "finished: false"))
    assert run(files, samples_file, *one) == 0
    assert array.read_bytes() == whole


@pytest.mark.parametrize(
    ("turns", "more", "message"),
    [
        (user("a"), [], "needs one output per prompt, not 3"),
        (user("a"), ["--alpaca_eval", "outputs.jsonl"], "AlpacaEval reads only `.json` files"),
        (
            [{"role": "system", "content": "s"}, *user("a")],
            ["--num_samples_per_prompt", "1"],
            "prompt 0 of `prompts.jsonl` has the roles ['system', 'user']",
        ),
    ],
)
def test_what_alpaca_eval_cannot_read_is_refused(files, tmp_path, monkeypatch, capsys, turns, more, message):
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_list([{"prompt": turns}]).to_json("prompts.jsonl")
    named = ["--dataset_name", "prompts.jsonl", "--alpaca_eval", "outputs.json", *more]
    assert run(files, tmp_path / "a.jsonl", *named) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


def _child(arguments):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os._exit(command.main(arguments))


def test_killed_three_times_and_resumed_gives_the_uninterrupted_file(files, tmp_path):
    assert run(files, tmp_path / "whole.jsonl") == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    output, draws = tmp_path / "cut.jsonl", random.Random(0)
    arguments = words(files, output)
    for part in (0.1, 0.4, 0.7):
        child = multiprocessing.get_context("fork").Process(target=_child, args=(arguments,))
        child.start()
        while not (output.exists() and output.stat().st_size > part * len(whole)):
            assert child.is_alive()
            time.sleep(0.001)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        size = output.stat().st_size
        assert size < len(whole)
        os.truncate(output, size - draws.randrange(1, 200))  # as if the kill had come in the middle of a write
    assert command.main(words(files, output, "--seed", "1")) == 2
    assert run(files, output) == 0
    assert output.read_bytes() == whole


# -- the help ------------------------------------------------------------------------------------------------------


def test_help_fits_a_screen_and_imports_no_torch(capsys):
    import subprocess
    import sys

    code = "import sys; from halos_trl.cli.main import main; main(['--help']); assert 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(shown.splitlines()) <= 24 and all(f"  {name} " in shown for name in command.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sampel"], "`sampel` is not a command. Did you mean `sample`?"),
        (["sample", "--num_sampels", "3"], "Unknown argument `--num_sampels`."),
        (["sample", "--dataset_name", "x"], "name a dataset but not `--model_name_or_path`"),
        (["sample", "--top_p", "3"], "`top_p` is 3.0"),
        (["sample", "--config", "missing.yaml"], "cannot be opened"),
        (["sample", "--num_prompts", "-1"], "expected at least 0 prompts to skip and at least 1"),
        (["sample", "--num_prompts", "0"], "at least 1 to sample for"),
        (["sample", "--num_skip", "-1"], "`--num_skip` is -1"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dtype: float23", "`dtype` is 'float23'; expected one of 'auto', 'float32'"),
        ("num_prompts: 2.5", "`num_prompts` is 2.5; expected an integer"),
        ("seed: true", "`seed` is True; expected an integer"),
        ("top_p: [1]", "`top_p` is [1]; expected a number"),
    ],
)
def test_values_of_a_config_file_are_checked_as_flags_are(tmp_path, setting, message, capsys):
    (tmp_path / "sample.yaml").write_text(setting)
    assert command.main(["sample", "--config", str(tmp_path / "sample.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_a_text_of_a_config_file_is_a_list_of_one(tmp_path):
    (tmp_path / "sample.yaml").write_text('stop: "###"\ntop_p: 1\n')
    arguments = read_arguments(SampleArguments, ["--config", str(tmp_path / "sample.yaml")], "sample")
    assert arguments.stop == ["###"] and arguments.top_p == 1


def test_a_model_that_is_not_there_is_one_line(files, tmp_path, capsys):
    flags = ["--dataset_name", str(files / "rows.jsonl"), "--output", str(tmp_path / "samples.jsonl")]
    assert command.main(["sample", "--model_name_or_path", str(tmp_path / "no-such-model"), *flags]) == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("halos-trl sample: ") and "no-such-model" in last


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("halos_trl.cli.sample.main", lambda argv: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.main(["sample"])
