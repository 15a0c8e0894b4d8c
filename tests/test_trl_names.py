"""TRL scripts with one changed import, and frameworks that import their classes from TRL."""

import copy
import dataclasses
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
import trl
from conftest import cpu_config, paired_rows, unpaired_rows, weights

import halos_trl

SCRIPTS = Path(trl.__file__).parent / "scripts"
PATCHED = ("DPOTrainer", "DPOConfig", "KTOTrainer", "KTOConfig", "RewardTrainer", "RewardConfig")


@pytest.fixture(scope="module")
def files(tmp_path_factory, _tokenizer, _tiny):
    """A tiny model and a folder with data of either kind."""
    folder = tmp_path_factory.mktemp("files")
    _tiny.save_pretrained(folder / "tiny")
    _tokenizer.save_pretrained(folder / "tiny")
    for name, rows in (("unpaired", unpaired_rows(12)), ("paired", paired_rows(12))):
        (folder / name).mkdir()
        rows.to_json(folder / name / "train.jsonl")
        rows.to_json(folder / name / "test.jsonl")
    return folder


def arguments(files, method, output_dir):
    data = "unpaired" if method == "kto" else "paired"
    settings = {
        "model_name_or_path": files / "tiny", "dataset_name": files / data, "output_dir": output_dir, "max_steps": 2,
        "per_device_train_batch_size": 4, "learning_rate": 0.01, "use_cpu": "true", "bf16": "false",
        "save_strategy": "no", "report_to": "none", "eval_strategy": "steps", "eval_steps": 2,
        "logging_steps": 1, "disable_tqdm": "true",
    }  # fmt: skip
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("method", ["dpo", "kto", "reward"])
def test_trls_own_script_with_the_name_of_the_package_replaced(method, files, tmp_path, monkeypatch, capsys):
    source = (SCRIPTS / f"{method}.py").read_text()
    assert source.count("from trl import") == 2
    script = tmp_path / f"{method}_of_trl.py"
    script.write_text(source.replace("from trl import", "from halos_trl import"))
    monkeypatch.setattr(sys, "argv", [script.name, *arguments(files, method, tmp_path / "out")])
    seen = []
    train = halos_trl.trainers.run.TrainingRun.get_batch_samples
    monkeypatch.setattr(
        halos_trl.trainers.run.TrainingRun,
        "get_batch_samples",
        lambda self, *args: seen.append(type(self).__module__) or train(self, *args),
    )
    runpy.run_path(str(script), run_name="__main__")
    assert "Training completed" in capsys.readouterr().out
    assert set(seen) == {f"halos_trl.trainers.{method}"}
    start, end = (_weights_of(folder, method) for folder in (files / "tiny", tmp_path / "out"))
    assert not torch.equal(start, end)


def _weights_of(folder, method):
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors) if name.startswith("model.")])


def test_helpers_are_trls_own():
    helpers = {name for name in halos_trl.__all__ if hasattr(trl, name)} - {*PATCHED, "GRPOConfig", "GRPOTrainer"}
    assert helpers >= {
        "DatasetMixtureConfig", "ModelConfig", "ScriptArguments", "TrlParser", "get_dataset", "get_peft_config",
        "get_quantization_config", "LogCompletionsCallback", "maybe_unpair_preference_dataset",
    }  # fmt: skip
    assert all(getattr(halos_trl, name) is getattr(trl, name) for name in helpers)
    assert all(hasattr(halos_trl, name) for name in halos_trl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'DPOTrainr'"):
        halos_trl.DPOTrainr  # noqa: B018


def test_reward_names():
    assert halos_trl.RewardTrainer is halos_trl.BradleyTerryTrainer
    assert halos_trl.RewardConfig is halos_trl.BradleyTerryConfig


# -- patching ------------------------------------------------------------------------------------------------------


def held():
    """The values of the replaced names in TRL's modules."""
    modules = [trl, trl.trainer, sys.modules["trl.trainer.dpo_trainer"], sys.modules["trl.trainer.dpo_config"]]
    return {(m.__name__, name): vars(m)[name] for m in modules for name in PATCHED if name in vars(m)}


def test_patch_undoes_itself():
    before = held()
    with halos_trl.patch_trl():
        assert [getattr(trl, name) for name in PATCHED] == [getattr(halos_trl, name) for name in PATCHED]
        from trl.trainer.dpo_trainer import DPOTrainer

        assert DPOTrainer is halos_trl.DPOTrainer
        assert trl.GRPOTrainer is not halos_trl.GRPOTrainer
        assert trl.trainer.dpo_config.DPOConfig is not halos_trl.DPOConfig  # instances of TRL's are pickled by it
    assert held() == before
    with pytest.raises(KeyError), halos_trl.patch_trl():
        raise KeyError
    assert held() == before


def test_patching_twice_and_undoing_in_either_order():
    before = held()
    first, second = halos_trl.patch_trl(), halos_trl.patch_trl()
    first.undo()
    second.undo()
    first.undo()
    assert held() == before


def test_what_somebody_else_has_put_there_since_is_left_alone(said):
    handle = halos_trl.patch_trl()
    trl.KTOTrainer = other = type("Other", (), {})
    handle.undo()
    assert trl.KTOTrainer is other and trl.DPOTrainer is not halos_trl.DPOTrainer
    assert "`trl.KTOTrainer` was replaced by other code" in said()
    trl.KTOTrainer = halos_trl.KTOTrainer.trl_class


def test_modules_that_imported_trls_classes_earlier_are_named(said, monkeypatch):
    early = types.ModuleType("early_framework")
    early.Base = trl.KTOConfig
    monkeypatch.setitem(sys.modules, "early_framework", early)
    with halos_trl.patch_trl():
        assert "early_framework imported TRL's classes before `patch_trl` was called" in said()


@pytest.mark.parametrize("loss_type", [["ipo"], ["sigmoid", "sft"]])
@pytest.mark.parametrize("humanline", [False, True])
def test_trls_losses_in_the_place_of_trls_trainer(loss_type, humanline, tokenizer, model, tmp_path):
    def trained(trainer_class, config_class):
        settings = {"loss_type": loss_type, "humanline": humanline, "max_steps": 2}
        trainer = trainer_class(
            model=copy.deepcopy(model),
            args=cpu_config(config_class, tmp_path / "out", **settings),
            train_dataset=paired_rows(8),
            processing_class=copy.deepcopy(tokenizer),
        )
        trainer.train()
        return weights(trainer.model)

    expected = trained(halos_trl.DPOTrainer, halos_trl.DPOConfig)
    with halos_trl.patch_trl():
        assert torch.equal(trained(trl.DPOTrainer, trl.DPOConfig), expected)
        # A framework extends what it finds.
        assert torch.equal(trained(type("Framework", (trl.DPOTrainer,), {}), trl.DPOConfig), expected)


# -- configs of frameworks -----------------------------------------------------------------------------------------


class Mixin:
    """As axolotl adds settings: a mixin in front of TRL's config."""


def framework_config(base):
    return dataclasses.make_dataclass("FrameworkConfig", [("sample_packing", bool, False)], bases=(Mixin, base))


@pytest.mark.parametrize("method", ["DPO", "KTO", "Reward"])
def test_config_derived_from_trls(method, model, tokenizer, tmp_path):
    trainer_class, config_class = getattr(halos_trl, f"{method}Trainer"), getattr(halos_trl, f"{method}Config")
    rows = unpaired_rows(8) if method == "KTO" else paired_rows(8)

    def build(config):
        policy = model if method != "Reward" else str(tmp_path / "base")
        return trainer_class(model=policy, args=config, train_dataset=rows, processing_class=tokenizer)

    model.save_pretrained(tmp_path / "base")
    derived = cpu_config(framework_config(getattr(trl, f"{method}Config")), tmp_path / "out")
    name = f"halos_trl.{config_class.__name__}"
    with pytest.raises(ValueError, match=rf"Derive it from `{name}`, .*class FrameworkConfig\({name}\).*patch_trl"):
        build(derived)
    with pytest.raises(ValueError, match=f"lacks the settings of this package. Use `{name}`"):
        build(cpu_config(getattr(trl, f"{method}Config"), tmp_path / "out"))
    with halos_trl.patch_trl():
        trainer = build(cpu_config(framework_config(getattr(trl, f"{method}Config")), tmp_path / "out"))
    assert not trainer.args.sample_packing and isinstance(trainer.args, config_class)
