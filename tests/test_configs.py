"""Every YAML file in configs/: its keys are explained and valid for its method, and it trains."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import paired_rows, unpaired_rows, weights
from policy_runs import scored

import halos_trl
from halos_trl import cli, toy

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
METHODS = {
    "kto": ("KTO", "unpaired"),
    "dpo": ("DPO", "paired"),
    "cdpo": ("CDPO", "paired"),
    "ipo": ("IPO", "paired"),
    "simpo": ("SimPO", "paired"),
    "slic": ("SLiC", "paired"),
    "grpo": ("GRPO", "scored"),
    "ppo": ("PPO", "scored"),
    "reward": ("BradleyTerry", "paired"),
}
HUMANLINE = {"humanline", "log_epsilon_p", "log_epsilon_r", "humanline_sync_steps"}
# What a test changes to fit two steps on a CPU; everything else is the file's.
SMALL = (
    "--max_steps 2 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --use_cpu true --bf16 false "
    "--report_to none --save_strategy no --disable_tqdm true --logging_steps 1"
).split()


def of_method(path):
    """(name of the method's classes, kind of data) of a file in configs/."""
    return METHODS[path.stem.removesuffix("-humanline")]


def with_lora(text):
    """The file with its commented-out LoRA lines switched on."""
    return re.sub(r"^# ((?:use_peft|lora_\w+): )", r"\1", text, flags=re.M)


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Flags that name a model of a few thousand parameters and rows of either kind."""
    folder = tmp_path_factory.mktemp("named")
    tokenizer = toy.build_tokenizer()
    toy.tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    unpaired_rows(8).to_json(folder / "unpaired.jsonl")
    paired_rows(8).to_json(folder / "paired.jsonl")
    scored(4).to_json(folder / "scored.jsonl")

    def flags(kind, output_dir):
        names = {"model_name_or_path": folder / "model", "dataset_name": folder / f"{kind}.jsonl"}
        return [f"--{k}={v}" for k, v in (names | {"output_dir": output_dir}).items()]

    return flags


def test_the_files_are_those_of_the_methods():
    humanline = {f"{name}-humanline" for name in METHODS if name != "reward"}
    assert {path.stem for path in CONFIGS} >= METHODS.keys() | humanline
    unknown = {path.stem.removesuffix("-humanline") for path in CONFIGS} - METHODS.keys()
    assert not unknown, f"give {unknown} a row in METHODS"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_is_explained_and_none_names_a_model_or_a_dataset(path):
    lines = [line for line in with_lora(path.read_text()).splitlines() if re.match(r"\w+:", line)]
    settings = yaml.safe_load(with_lora(path.read_text()))
    assert len(lines) == len(settings), "one key on each line"
    assert [line for line in lines if not re.search(r"\s# \S{3,}|\s# \S+ \S+", line)] == []
    assert not {"model_name_or_path", "dataset_name", "output_dir", "datasets"} & settings.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_names_the_script_and_the_file(path):
    script = f"examples/train_{path.stem.removesuffix('-humanline')}.py"
    assert f"python {script} --config configs/{path.name}" in path.read_text()
    assert (ROOT / script).is_file()


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem.endswith("-humanline")], ids=lambda path: path.stem)
def test_humanline_file_adds_four_keys_and_changes_none(path):
    plain = yaml.safe_load(path.with_name(path.name.replace("-humanline", "")).read_text())
    settings = yaml.safe_load(path.read_text())
    assert {k: v for k, v in settings.items() if k not in HUMANLINE} == plain
    assert HUMANLINE <= settings.keys()
    assert settings["humanline"] is True


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_halos_hyperparameters_and_the_methods_own_defaults(path):
    settings = yaml.safe_load(path.read_text())
    assert (settings["learning_rate"], settings["warmup_steps"], settings["num_train_epochs"]) == (5e-6, 0.1, 1)
    assert (settings["lr_scheduler_type"], settings["weight_decay"]) == ("constant_with_warmup", 0.01)
    assert settings.get("adam_epsilon", 1e-8) == 1e-8 and settings.get("sequence_level", False) is False
    assert settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] == 32
    assert (settings["max_grad_norm"], settings["max_length"], settings["seed"]) == (1.0, 1250, 1)
    config_class = getattr(halos_trl, f"{of_method(path)[0]}Config")
    loss = {"beta", "epsilon", "tau", "gamma_beta_ratio", "lambda_coef", "desirable_weight", "undesirable_weight"}
    loss |= {"cliprange", "critic_coef", "kl_coef", "gamma", "lam", "ppo_epochs", "v_head_max_grad_norm"}
    for field in dataclasses.fields(config_class):
        if field.name in settings.keys() & (loss | HUMANLINE - {"humanline", "humanline_sync_steps"}):
            assert settings[field.name] == field.default, field.name
    if "humanline_sync_steps" in settings:
        long_period = of_method(path)[0] in ("KTO", "DPO", "CDPO", "IPO")  # from docs/evidence.md
        assert settings["humanline_sync_steps"] == (32 if long_period else 1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_steps_with_the_file(path, named, tmp_path):
    name, kind = of_method(path)
    argv = [*named(kind, tmp_path / "out"), "--config", str(path), *SMALL]
    config_class, trainer_class = getattr(halos_trl, f"{name}Config"), getattr(halos_trl, f"{name}Trainer")
    script_args, training_args, model_args, data = cli.parse(config_class, kind, argv=argv)
    assert not script_args.embedded
    for key, value in yaml.safe_load(path.read_text()).items():
        if f"--{key}" not in argv:
            set_value = getattr(training_args, key)
            assert (
                set_value == [value] if key == "loss_type" and isinstance(set_value, list) else set_value == value
            ), key
    training_args.learning_rate = 1e-3
    training_args.weight_decay = 0.0  # moves weights without a gradient
    trainer = trainer_class(model_args.model_name_or_path, args=training_args, train_dataset=data["train"])
    before = weights(trainer.model)
    trainer.train()
    # An untrained model gives every token less than e^-1, where the clamp of raw log-probs passes no gradient.
    assert torch.equal(before, weights(trainer.model)) == (path.stem == "simpo-humanline")
    assert torch.isfinite(weights(trainer.model)).all()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_lora_lines_are_true(path, named, tmp_path):
    from trl import get_peft_config

    name, kind = of_method(path)
    changed = tmp_path / path.name
    changed.write_text(with_lora(path.read_text()))
    argv = [*named(kind, tmp_path / "out"), "--config", str(changed), *SMALL]
    _, _, model_args, _ = cli.parse(getattr(halos_trl, f"{name}Config"), kind, argv=argv)
    peft = get_peft_config(model_args)
    assert (peft.r, peft.lora_alpha, peft.lora_dropout, peft.use_rslora) == (64, 256, 0.05, False)
    assert peft.target_modules == "all-linear"
    assert peft.task_type == ("SEQ_CLS" if path.stem == "reward" else "CAUSAL_LM")


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_start_with_a_command(script):
    spec = importlib.util.spec_from_file_location(f"example_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"python examples/{script.name} " in module.__doc__
    assert callable(module.main)
    assert len(script.read_text().splitlines()) < 60


# -- warm-up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "warmup"),
    [
        ({"warmup_steps": 0.1, "max_steps": 40}, None),
        ({"warmup_steps": 4, "max_steps": 5}, None),
        ({"warmup_steps": 5, "max_steps": 5}, 5),
        ({"warmup_steps": 150, "max_steps": 5}, 150),
        ({"warmup_steps": 0.95, "max_steps": 10}, 10),  # rounded up
        ({"warmup_steps": 150, "max_steps": 5, "lr_scheduler_type": "constant"}, None),
    ],
)
@pytest.mark.parametrize("name", ["DPO", "BradleyTerry"])
def test_run_that_ends_inside_its_warm_up_is_warned_of(name, settings, warmup, make_config, tokenizer, named, said):
    config = make_config(
        getattr(halos_trl, f"{name}Config"), **{"lr_scheduler_type": "constant_with_warmup"} | settings
    )
    model = next(flag.split("=")[1] for flag in named("paired", "out") if flag.startswith("--model"))
    trainer = getattr(halos_trl, f"{name}Trainer")(
        model=model, args=config, train_dataset=paired_rows(8), processing_class=tokenizer
    )
    trainer.create_optimizer_and_scheduler(settings["max_steps"])
    message = (
        f"The run has {settings['max_steps']} optimizer steps, but the warm-up of the learning rate takes {warmup} "
    )
    assert (message in said()) == (warmup is not None)


def test_warm_up_as_a_share_of_the_run(make_config):
    config = make_config(halos_trl.DPOConfig, warmup_steps=0.1, lr_scheduler_type="constant_with_warmup")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_scheduler(
        config.lr_scheduler_type, optimizer, num_warmup_steps=config.get_warmup_steps(40), num_training_steps=40
    )
    rates = []
    for _ in range(6):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
