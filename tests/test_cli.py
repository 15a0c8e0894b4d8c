"""Flags, config files, data formats, errors and model cards of the example scripts, in this process."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import runpy
import shutil
import sys
import traceback
from pathlib import Path

import datasets
import pytest
import torch
import trl
import yaml
from conftest import paired_rows, unpaired_rows
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from halos_trl import BradleyTerryConfig, BradleyTerryTrainer, KTOConfig, KTOTrainer, cli, model_card, toy
from halos_trl.merge import merge_adapter

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_kto.py"
ON_CPU = [
    *("--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--disable_tqdm", "true"),
    *("--report_to", "none", "--save_strategy", "no", "--max_steps", "2", "--per_device_train_batch_size", "4"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory, _tokenizer, _tiny):
    """A folder with the tiny model and the same rows in every readable format."""
    folder = tmp_path_factory.mktemp("files")
    _tiny.save_pretrained(folder / "tiny")
    _tokenizer.save_pretrained(folder / "tiny")
    rows, held_out = unpaired_rows(12), unpaired_rows(4, seed=1)
    rows.to_json(folder / "rows.jsonl")
    rows.to_json(folder / "rows.json", lines=False)
    rows.to_parquet(folder / "rows.parquet")
    plain = [{"prompt": r["prompt"][0]["content"], "completion": r["completion"][0]["content"]} for r in rows]
    standard = datasets.Dataset.from_list([{**p, "label": r["label"]} for p, r in zip(plain, rows, strict=True)])
    standard.to_csv(folder / "standard.csv")
    standard.to_json(folder / "standard.jsonl")
    paired_rows(12).to_json(folder / "paired.jsonl")
    (folder / "folder").mkdir()
    rows.to_json(folder / "folder" / "train.jsonl")
    held_out.to_json(folder / "folder" / "test.jsonl")
    rows.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": rows, "test": held_out}).save_to_disk(folder / "saved-splits")
    (folder / "empty.jsonl").touch()
    (folder / "broken.jsonl").write_text('{"prompt": "a"\n')
    (folder / "empty-folder").mkdir()
    (folder / "notes.txt").write_text("no rows")
    return folder


@pytest.fixture
def here(files, monkeypatch):
    monkeypatch.chdir(files)
    return files


def parse(*flags, model="tiny", data="rows.jsonl", toy_defaults=None):
    named = [*(("--model_name_or_path", model) if model else ()), *(("--dataset_name", data) if data else ())]
    return cli.parse(KTOConfig, "unpaired", toy_defaults, [*named, *ON_CPU, *flags])


def config_file(folder, **settings):
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.fixture
def train(here, tmp_path, monkeypatch):
    """`train(*flags)`: the example script's `main`, in this process. Returns its output directory."""
    spec = importlib.util.spec_from_file_location("train_kto", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def run(*flags, output_dir="out", model="tiny"):
        target = tmp_path / output_dir
        named = ("--model_name_or_path", model, "--output_dir", str(target))
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *named, *ON_CPU, *flags])
        example.main()
        return target

    return run


# Data


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("rows.jsonl", ["train"]),
        ("rows.json", ["train"]),
        ("rows.parquet", ["train"]),
        ("standard.csv", ["train"]),
        ("folder", ["train", "test"]),
        ("saved", ["train"]),
        ("saved-splits", ["train", "test"]),
    ],
)
def test_every_format_gives_the_same_rows(here, name, splits, streaming):
    arguments = trl.ScriptArguments(dataset_name=name, dataset_streaming=streaming)
    data = cli.load_data(arguments, trl.DatasetMixtureConfig())
    assert list(data) == splits
    assert isinstance(data["train"], datasets.IterableDataset if streaming else datasets.Dataset)
    expected = datasets.Dataset.from_json("standard.jsonl") if name.startswith("standard") else unpaired_rows(12)
    assert list(data["train"]) == list(expected)
    if "test" in splits:
        assert list(data["test"]) == list(unpaired_rows(4, seed=1))


@pytest.mark.parametrize(
    "flags",
    [
        ["--dataset_name", "standard.csv"],
        ["--dataset_name", "paired.jsonl"],
        ["--dataset_name", "folder", "--eval_strategy", "steps", "--eval_steps", "1"],
        ["--dataset_name", "saved-splits", "--dataset_streaming", "--eval_strategy", "steps", "--eval_steps", "1"],
    ],
    ids=["standard", "paired", "evaluated", "streamed"],
)
def test_example_trains_on(train, flags):
    state = json.loads((train(*flags, "--logging_steps", "1") / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2]
    evaluations = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert len(evaluations) == (2 if "--eval_strategy" in flags else 0)


def test_mixture_of_a_config_file(here, tmp_path):
    path = config_file(
        tmp_path,
        model_name_or_path="tiny",
        datasets=[{"path": "json", "data_files": "rows.jsonl"}, {"path": "parquet", "data_files": ["rows.parquet"]}],
        test_split_size=0.25,
        eval_strategy="epoch",
    )
    script_args, training_args, _, data = parse("--config", path, model=None, data=None)
    assert {name: len(split) for name, split in data.items()} == {"train": 18, "test": 6}
    assert cli.eval_split(script_args, training_args, data) is data["test"]
    assert not script_args.embedded
    assert script_args.used_datasets == ["rows.jsonl", "rows.parquet"]


def test_halos_files_in_a_mixture_become_rows(here, tmp_path):
    """Together with TRL's rows, with the split of the part."""
    items = [
        {"prompt": [{"role": "user", "content": f"ask {i}"}], "output": "yes", "label": i % 2, "split": split}
        | {"type": "binary_feedback"}
        for i, split in enumerate(["train", "test", "train"])
    ]
    (tmp_path / "items.json").write_text(json.dumps(items))
    files = {"train": str(tmp_path / "items.json")}
    for part in ({"path": files["train"]}, {"path": "json", "data_files": files}):
        both = [part, {"path": "json", "data_files": "rows.jsonl"}]
        path = config_file(tmp_path, model_name_or_path="tiny", datasets=both)
        rows = parse("--config", path, model=None, data=None)[3]["train"]
        assert len(rows) == 2 + 12 and rows["label"][:2] == [False, False]
        assert rows["sources"][0] == [f"{files['train']}#0"] and rows["sources"][2] is None
    mixed = config_file(tmp_path, datasets=[{"path": "json", "data_files": [files["train"], "rows.jsonl"]}])
    with pytest.raises(ValueError, match=r"is in one of HALOs.* formats, together with rows\.jsonl"):
        parse("--config", mixed, data=None)


# Flags and config files


def test_flags_reach_their_configs(here):
    script_args, training_args, model_args, data = parse(
        *("--beta", "0.3", "--learning-rate=1e-3", "--use_peft", "--lora_r", "4", "--dtype", "bfloat16"),
        *(
            "--model_init_kwargs",
            '{"attn_implementation": "eager"}',
            "--model_revision",
            "v2",
            "--ignore_bias_buffers",
        ),
    )
    assert (training_args.beta, training_args.learning_rate, model_args.lora_r) == (0.3, 1e-3, 4)
    assert training_args.ddp_broadcast_buffers is False
    # What `model_init_kwargs` says wins over the flag of the same meaning.
    assert training_args.model_init_kwargs == {
        "revision": "v2",
        "attn_implementation": "eager",
        "dtype": "bfloat16",
    }
    assert cli.eval_split(script_args, training_args, data) is None
    assert script_args.used_datasets == ["rows.jsonl"]


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_flag_wins_over_config_file_wins_over_default(here, tmp_path, form):
    path = config_file(tmp_path, beta=0.3, learning_rate="1e-3", humanline=True, dataset_name="rows.jsonl")
    _, training_args, model_args, _ = parse(*form.format(path).split(), "--beta", "0.7", data=None)
    assert training_args.beta == 0.7
    assert training_args.learning_rate == 1e-3
    assert training_args.humanline is True
    assert training_args.desirable_weight == 1.0
    assert model_args.model_name_or_path == "tiny"


def test_abbreviated_flag_is_no_missing_flag(here):
    """argparse accepts unique prefixes; a model passed with one must not be replaced by the embedded task."""
    flags = ["--model_name", "tiny", "--dataset_na=rows.jsonl", *ON_CPU]
    script_args, _, model_args, data = cli.parse(KTOConfig, "unpaired", None, flags)
    assert not script_args.embedded
    assert (model_args.model_name_or_path, len(data["train"])) == ("tiny", 12)


@pytest.fixture
def embedded(here, monkeypatch):
    """The embedded task with the slow parts replaced; returns the kinds of feedback that were asked for."""
    kinds = []
    monkeypatch.setattr(toy, "load_model_path", lambda: str(here / "tiny"))
    rows = datasets.DatasetDict({"train": unpaired_rows(8), "test": unpaired_rows(4)})
    monkeypatch.setattr(toy, "load_feedback_data", lambda kind: kinds.append(kind) or rows)
    return kinds


def test_toy_defaults_give_way_to_config_file_and_flags(embedded, here, tmp_path):
    toy_defaults = {"learning_rate": 1e-3, "num_train_epochs": 3, "per_device_train_batch_size": 64}
    path = config_file(tmp_path, num_train_epochs=5, per_device_train_batch_size=32, logging_steps=7)
    script_args, args, model_args, data = cli.parse(
        KTOConfig, "unpaired", toy_defaults, ["--config", path, "--per_device_train_batch_size", "16", "--use_cpu"]
    )
    assert script_args.embedded and embedded == ["unpaired"]
    assert model_args.model_name_or_path == str(here / "tiny")
    assert args.learning_rate == 1e-3  # the script's toy default
    assert (args.output_dir, args.max_length, args.bf16) == ("outputs/toy", 64, False)  # common toy defaults
    assert (args.num_train_epochs, args.logging_steps) == (5, 7)  # config file
    assert args.per_device_train_batch_size == 16  # flag
    assert args.beta == 0.1  # nobody said anything
    assert len(data["train"]) == 8


def test_toy_defaults_hold_for_the_embedded_task_only(here):
    _, args, _, _ = parse(toy_defaults={"learning_rate": 1e-3})
    assert (args.learning_rate, args.max_length) == (1e-6, 1024)


def test_toy_flags_are_refused_like_any_other(embedded):
    with pytest.raises(ValueError, match="--merge_adapter"):
        parse("--merge_adapter", model=None, data=None)


def test_help_lists_every_flag_of_trl_and_ours(capsys):
    with pytest.raises(SystemExit) as ending:
        cli.parse(KTOConfig, "unpaired", None, ["--help"])
    assert ending.value.code == 0
    text = capsys.readouterr().out
    trl_classes = (trl.ScriptArguments, trl.KTOConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    flags = {f"--{field.name}" for kind in trl_classes for field in dataclasses.fields(kind) if field.init}
    flags |= {"--merge_adapter", "--humanline", "--log_epsilon_p", "--log_epsilon_r", "--config"}
    assert flags <= set(text.replace(",", " ").replace("`", " ").split())
    assert "embedded" in text
    # State of the run that is no flag.
    assert "used_datasets" not in text


# Errors: what was passed, why it cannot work, what to do instead


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_bnb_nested_quant"], r"`--use_bnb_nested_quant` would have no effect without `--load_in_4bit`"),
        (["--merge_adapter"], r"`--merge_adapter` .* without `--use_peft`.*Add `--use_peft`"),
        (["--load_in_4bit"], r"need `--use_peft`: quantized weights cannot be trained"),
        (["--load_in_8bit"], r"need `--use_peft`"),
        (["--lora_r", "4", "--use_dora"], r"`--lora_r`, `--use_dora` would have no effect without `--use_peft`"),
        (["--bata", "1"], r"Unknown argument `--bata`. Did you mean `--beta`\?"),
        (["--log_epsilon_P", "-2"], r"`--log_epsilon_P`. Did you mean `--log_epsilon_p`\?"),
        (["--log_epsilon_R=2"], r"Did you mean `--log_epsilon_r`\?"),
        (["++log_epsilon_P=-2"], r"Did you mean `--log_epsilon_p`\?"),
        (["++lr=5e-6"], r"Did you mean `--learning_rate`\?"),
        (["++loss.desirable_weight=2"], r"Did you mean `--desirable_weight`\?"),
        (["++model.max_grad_norm=5"], r"Did you mean `--max_grad_norm`\?"),
        (["++warmup=0.1"], r"Did you mean `--warmup_steps`\?"),
        (["stray"], r"Unknown argument `stray`"),
        (["--beta", "-1"], r"beta=-1.0"),
        (["--dataset_train_split", "trian"], r"splits \['train'\], not 'trian'. .*--dataset_train_split"),
        (["--eval_strategy", "steps"], r"not 'test'.*`--eval_strategy no`.*into a folder"),
        (["--dataset_config", "x"], r"`rows.jsonl` is local"),
        (["--streaming"], r"use `--dataset_streaming`"),
        (["--test_split_size", "0.5"], r"apply to a `datasets` mixture"),
        (["--resume_from_checkpoint", "true", "--output_dir", "nowhere"], r"`nowhere` has no complete checkpoint"),
        (["--resume_from_checkpoint", "folder"], "cannot be resumed from: trainer_state.json is missing"),
        (["--config", "nowhere.yaml"], r"`--config nowhere.yaml` cannot be opened"),
        (["--config", "rows.parquet"], r"`--config rows.parquet` cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_flags(here, flags, message):
    with pytest.raises(ValueError, match=message):
        parse(*flags)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", r"./nowhere` is a local path, but there is no such folder"),
        ("/nowhere/model", r"local path, but there is no such folder"),
        ("rows.jsonl", r"local path, but there is no such folder"),
        ("folder", r"without `config.json`. Pass the folder that `save_pretrained` wrote"),
        (None, r"name a dataset but not `--model_name_or_path`"),
    ],
)
def test_refused_models(here, model, message):
    with pytest.raises(ValueError, match=message):
        parse(model=model)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere.jsonl", r"local path, but there is no such file"),
        ("./nowhere", r"local path, but there is no such file"),
        ("notes.txt", r"suffix '.txt'; supported are \['.arrow', '.csv'"),
        ("empty.jsonl", r"empty file"),
        ("broken.jsonl", r"`--dataset_name broken.jsonl` cannot be loaded: "),
        ("empty-folder", r"`--dataset_name empty-folder` cannot be loaded: .*any data files"),
        (None, r"name a model but not `--dataset_name`"),
    ],
)
def test_refused_datasets(here, data, message):
    with pytest.raises(ValueError, match=message):
        parse(data=data)


def test_dataset_unknown_to_the_hub(here, monkeypatch):
    def load_dataset(path, **_):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"`--dataset_name org/missing` cannot be loaded: .*doesn't exist on the Hub"):
        parse(data="org/missing")


def test_lost_connection_is_not_blamed_on_the_flags(here, monkeypatch):
    def load_dataset(path, **_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match="no route"):
        parse(data="org/there")


def test_refused_config_files(here, tmp_path):
    with pytest.raises(
        ValueError, match=r"sets `leraning_rate`, which this script does not have. Did you mean `learning_rate`"
    ):
        parse("--config", config_file(tmp_path, leraning_rate=1))
    with pytest.raises(ValueError, match=r"sets `log_epsilon_P`, .* Did you mean `log_epsilon_p`\?"):
        parse("--config", config_file(tmp_path, log_epsilon_P=-2.0))
    mixture = config_file(tmp_path, datasets=[{"path": "json", "data_files": "rows.jsonl"}])
    with pytest.raises(ValueError, match="Both `dataset_name` and a `datasets` mixture"):
        parse("--config", mixture)
    with pytest.raises(ValueError, match="Use `streaming`, and `name` inside the mixture"):
        parse("--config", mixture, "--dataset_streaming", data=None)


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"hf_secret", "contains a str, not settings by name"),
        (b"user: hf_secret\npassword: hf_secret: 5\n", "line 2, column 20"),
        (b"a: *hf_secret", "line 1, column 4"),
        (b"- hf_secret", "contains a list"),
        (b"\xffhf_secret", "not UTF-8 text"),
    ],
)
def test_config_file_of_another_kind_is_not_quoted(tmp_path, content, where):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match=where) as raised:
        parse("--config", str(tmp_path / "other"))
    report = "".join(traceback.format_exception(raised.value))
    assert "hf_secret" not in report.replace(str(tmp_path), "").split("ValueError", 1)[1]
    assert raised.value.__cause__ is None


EXAMPLES = [path for path in sorted(EXAMPLE.parent.glob("*.py")) if "cli.parse(" in path.read_text()]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_hand_over_what_their_flags_choose(path):
    """`--use_peft`, `--load_in_4bit` and `--eval_strategy` are flags of every example."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    (trainer,) = [c for c in calls if getattr(c.func, "id", "").endswith("Trainer")]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in trainer.keywords}
    assert given["peft_config"] == "get_peft_config(model_args)"
    assert given["quantization_config"] == "get_quantization_config(model_args)"
    assert given["eval_dataset"] in ("cli.eval_split(script_args, training_args, data)", "held_out")
    assert given["args"] == "training_args" and given["model"] == "model_args.model_name_or_path"


def test_own_method_trains_the_adapter_that_its_flags_ask_for(here, tmp_path, monkeypatch):
    module = runpy.run_path(str(EXAMPLE.parent / "custom_method.py"))
    flags = "--dataset_name folder --use_peft --lora_r 2 --eval_strategy steps --eval_steps 1".split()
    named = ["--model_name_or_path", "tiny", "--output_dir", str(tmp_path / "own")]
    monkeypatch.setattr(sys, "argv", ["custom_method.py", *named, *ON_CPU, *flags])
    module["main"]()
    assert (tmp_path / "own" / "adapter_model.safetensors").is_file()
    history = json.loads((tmp_path / "own" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in line for line in history)


def test_wrong_type_ends_with_a_short_usage(here, capsys):
    with pytest.raises(SystemExit):
        parse("--beta", "much")
    said = capsys.readouterr().err
    assert "argument --beta: invalid float value: 'much'" in said
    assert len(said.splitlines()) < 5


def test_adapter_folder_is_no_model(here, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="contains an adapter: merge it into its base model first"):
        parse(model=str(tmp_path))


# Runs: resuming and merging


def test_resumed_run_ends_where_the_whole_one_does(train):
    flags = ["--dataset_name", "rows.jsonl", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    whole = train(*flags, "--learning_rate", "0.01", output_dir="whole")
    resumed = whole.parent / "resumed"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    train(*flags, "--learning_rate", "0.01", "--resume_from_checkpoint", "true", output_dir="resumed")
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    middle = (whole / "checkpoint-2" / "model.safetensors").read_bytes()
    assert middle != (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        ["--humanline"],  # trains beside a reference adapter, which must not be merged
        ["--use_dora", "--use_rslora", "--dtype", "bfloat16"],
    ],
    ids=["humanline", "bfloat16 dora"],
)
def test_merged_model_is_base_plus_adapter(train, flags, capsys):
    common = ("--dataset_name", "rows.jsonl", "--use_peft", "--learning_rate", "0.05", "--merge_adapter")
    out = train(*common, *flags, output_dir="adapter/")
    merged = AutoModelForCausalLM.from_pretrained(f"{out}-merged")
    dtype = torch.bfloat16 if "bfloat16" in flags else torch.float32
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    adapter = AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected, base = adapter(ids).logits, AutoModelForCausalLM.from_pretrained("tiny")(ids).logits
        got = merged.float()(ids).logits
    assert (expected - base).abs().max() > 0.01
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    assert f"Merged model saved to {out}-merged" in capsys.readouterr().out


# Model cards


def trained_card(make_config, tokenizer, model, dataset_name=None, trainer_class=KTOTrainer, peft=None, **settings):
    trainer = trainer_class(
        model=model,
        args=make_config(KTOConfig, **settings),
        train_dataset=unpaired_rows(8),
        processing_class=tokenizer,
        peft_config=peft,
    )
    trainer.create_model_card(dataset_name=dataset_name)
    return read_card(Path(trainer.args.output_dir))


def read_card(folder):
    text = (folder / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert "None" not in text
    return yaml.safe_load(header), body


def test_card_of_a_local_base(make_config, tokenizer, here, tmp_path):
    data, text = trained_card(make_config, tokenizer, str(here / "tiny"), dataset_name=str(here / "rows.jsonl"))
    assert data == {
        "library_name": "transformers",
        "model_name": "out",
        "tags": ["generated_from_trainer", "halos-trl", "kto", "trl"],
    }
    assert "This model was trained from the local model `tiny` on `rows.jsonl` with **KTO**" in text
    assert str(here) not in text and str(tmp_path) not in text
    assert "huggingface.co/tiny" not in text and "datasets/rows" not in text
    assert 'model="out"' in text


def test_card_of_a_hub_base_and_dataset(make_config, tokenizer, model):
    model.config.name_or_path = "org/base"
    data, text = trained_card(make_config, tokenizer, model, dataset_name=["org/rows", "org/more"])
    assert data["base_model"] == "org/base"
    assert data["datasets"] == ["org/rows", "org/more"]
    assert "trained from [org/base](https://huggingface.co/org/base) on" in text
    assert (
        "on [org/rows](https://huggingface.co/datasets/org/rows) and "
        "[org/more](https://huggingface.co/datasets/org/more) with" in text
    )


def test_card_of_a_model_from_memory(make_config, tokenizer, model):
    data, text = trained_card(make_config, tokenizer, model)
    assert "base_model" not in data and "datasets" not in data
    assert "trained from a `llama` model that was built in memory with **KTO**" in text


def test_card_of_an_adapter(make_config, tokenizer, model):
    model.config.name_or_path = "org/base"
    data, text = trained_card(
        make_config, tokenizer, model, peft=LoraConfig(r=4, lora_alpha=8, use_dora=True, task_type="CAUSAL_LM")
    )
    assert (data["base_model"], data["library_name"]) == ("org/base", "peft")
    assert "This LoRA adapter was trained from [org/base]" in text
    for row in ("| `adapter` | LoRA |", "| `lora_r` | 4 |", "| `lora_alpha` | 8 |", "| `use_dora` | True |"):
        assert row in text
    assert "not on the Hub" not in text


def test_card_of_an_adapter_on_a_local_base(make_config, tokenizer, here):
    data, text = trained_card(make_config, tokenizer, str(here / "tiny"), peft=LoraConfig(task_type="CAUSAL_LM"))
    assert "base_model" not in data
    assert "from the local model `tiny`" in text and "The base model is not on the Hub" in text
    assert str(here) not in text


def test_card_names_method_papers_and_settings(make_config, tokenizer, model):
    data, text = trained_card(
        make_config,
        tokenizer,
        model,
        humanline=True,
        log_epsilon_p=-0.5,
        beta=0.3,
        num_train_epochs=2,
        max_length=None,
    )
    assert "humanline" in data["tags"]
    assert "with **KTO** under the humanline clamp" in text
    assert (
        "[KTO: Model Alignment as Prospect Theoretic Optimization](https://huggingface.co/papers/2402.01306)" in text
    )
    assert "https://huggingface.co/papers/2509.24207" in text
    assert "| `beta` | 0.3 |" in text and "| `log_epsilon_p` | -0.5 |" in text and "| `learning_rate` | 0.1 |" in text
    # `max_steps` (3) rules, so epochs had no effect; there was no limit to name.
    assert "| `max_steps` | 3 |" in text and "num_train_epochs" not in text and "max_length" not in text
    assert f"| torch | {torch.__version__} |" in text and "| halos_trl |" in text


def test_card_without_humanline_does_not_mention_it(make_config, tokenizer, model):
    data, text = trained_card(make_config, tokenizer, model, max_steps=-1, num_train_epochs=2)
    assert "umanline" not in text and "log_epsilon" not in text and "humanline" not in data["tags"]
    assert "| `num_train_epochs` | 2 |" in text and "max_steps" not in text


def test_card_shows_no_signature_and_no_password(make_config, tokenizer, model, monkeypatch):
    monkeypatch.setattr(
        model_card,
        "run_urls",
        lambda: {"wandb": "https://w.ai/run/1?apiKey=hf_secret", "trackio": "https://t.x/?runs=a"},
    )
    names = [
        "https://data.x.com/rows.jsonl?X-Amz-Signature=hf_secret",
        "https://me:hf_secret@x.com/part/",
        "zip://inner.jsonl::https://data.x.com/a.zip?sig=hf_secret",
        "s3://hf_secret:x@bucket",
        "https://x.com/?sig=hf_secret#hf_secret",
    ]
    _, text = trained_card(make_config, tokenizer, model, dataset_name=names)
    assert "hf_secret" not in text
    assert "`rows.jsonl` and `part` and `inner.jsonl` and `bucket` and `x.com`" in text
    assert "(https://w.ai/run/1)" in text and "(https://t.x/?runs=a)" in text


def test_card_survives_names_that_are_no_plain_yaml(make_config, tokenizer, model, tmp_path):
    output_dir = tmp_path / "beta: 0.1 #1 [x]"
    data, text = trained_card(make_config, tokenizer, model, output_dir=str(output_dir))
    assert data["model_name"] == output_dir.name
    assert f"# {output_dir.name}" in text


def test_quick_start_fits_the_tokenizer(make_config, tokenizer, model):
    _, chat = trained_card(make_config, tokenizer, model)
    assert '"role": "user"' in chat
    plain_tokenizer = toy.build_tokenizer()
    plain_tokenizer.chat_template = None
    trainer = KTOTrainer(
        model=model,
        args=make_config(KTOConfig),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}] * 8),
        processing_class=plain_tokenizer,
    )
    trainer.create_model_card()
    _, plain = read_card(Path(trainer.args.output_dir))
    assert '"role"' not in plain and 'prompt = "' in plain


def test_card_of_a_reward_model(make_config, tokenizer, here):
    """Its score, not generated text, and a paper that is on no preprint server."""
    trainer = BradleyTerryTrainer(
        model=str(here / "tiny"),
        args=make_config(BradleyTerryConfig),
        train_dataset=paired_rows(8),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="SEQ_CLS"),
    )
    model_card.write(trainer, None, "rows.jsonl", None)
    data, text = read_card(Path(trainer.args.output_dir))
    assert data["library_name"] == "peft"
    assert "from the local model `tiny` on `rows.jsonl` with **Bradley-Terry**" in text
    assert 'pipeline("text-classification"' in text and "text-generation" not in text
    assert "introduced in *Rank Analysis" in text and "huggingface.co/papers/" not in text
    assert "umanline" not in text

    with torch.no_grad():
        trainer.model.base_model.model.score.modules_to_save["default"].weight.add_(0.1)
    trainer.save_model()
    merge_adapter(trainer, [])
    merged = AutoModelForSequenceClassification.from_pretrained(f"{trainer.args.output_dir}-merged")
    ids = torch.arange(24).reshape(2, 12) + 5
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = trainer.model.eval()(ids, attention_mask=mask).logits
        torch.testing.assert_close(merged(ids, attention_mask=mask).logits, expected, rtol=0, atol=1e-5)
    assert expected.shape == (2, 1) and expected.abs().min() > 1e-3


@pytest.mark.parametrize(
    ("name", "is_hub_id"),
    [
        ("gpt2", True),
        ("org/model-1.5", True),
        ("./org/model", False),
        ("/org", False),
        ("~/model", False),
        ("a/b/c", False),
        ("", False),
    ],
)
def test_hub_ids_and_paths(name, is_hub_id):
    assert model_card.is_hub_id(name) is is_hub_id


def test_existing_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_card.is_hub_id("org/model")
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert not model_card.is_hub_id("org/model")
