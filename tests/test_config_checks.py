"""Settings of a wrong type or without effect raise errors that name them, at construction."""

import copy
import dataclasses
import math
import typing

import numpy as np
import pytest
import trl
import yaml
from conftest import paired_rows

import halos_trl
from halos_trl.configs.field_types import check_types

METHODS = ("DPO", "CDPO", "IPO", "SimPO", "SLiC", "KTO", "GRPO", "PPO", "BradleyTerry")
CONFIGS = {name: getattr(halos_trl, f"{name}Config") for name in METHODS}


def plain_fields(config_class, *kinds):
    """Names of the fields that take nothing but `kinds` (and perhaps None)."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        parts = set(typing.get_args(hints[field.name]) or [hints[field.name]]) - {type(None)}
        if parts <= set(kinds) and field.init:
            yield field.name


def refusal(make_config, config_class, **settings):
    with pytest.raises(ValueError) as refused:
        make_config(config_class, **settings)
    return str(refused.value)


def refused_for(config, name, value):
    """The error of a config's check for another value."""
    with pytest.raises(ValueError) as refused:
        check_types(changed(config, **{name: value}))
    return str(refused.value)


def changed(config, **changes):
    copied = copy.copy(config)
    vars(copied).update(changes)
    return copied


@pytest.mark.parametrize("name", METHODS)
def test_switches_take_true_or_false_only(name, make_config):
    switches = list(plain_fields(CONFIGS[name], bool))
    assert {"precompute_ref_log_probs", "humanline", "sync_ref_model"} <= set(switches) or name == "BradleyTerry"
    assert len(switches) > 25
    config = make_config(CONFIGS[name])
    for switch in switches:
        for value in ("false", "no", "true", "", 1, 0, [True], {}):
            message = refused_for(config, switch, value)
            assert message.startswith(f"`{switch}={value!r}` cannot work: it is a `"), message
    assert "`disable_dropout='no'`" in refusal(make_config, CONFIGS[name], disable_dropout="no")


@pytest.mark.parametrize("name", METHODS)
def test_numbers_are_numbers(name, make_config):
    numbers = list(plain_fields(CONFIGS[name], int, float))
    assert {"learning_rate", "max_length", "per_device_train_batch_size", "weight_decay"} <= set(numbers)
    config = make_config(CONFIGS[name])
    for number in numbers:
        values = [True, False, "much", "", [1.0], (1,), {}, math.nan, b"1", 1j]
        for value in values + ([math.inf, -math.inf] if number != "max_grad_norm" else []):
            message = refused_for(config, number, value)
            assert message.startswith(f"`{number}={value!r}` cannot work: it is "), message
    assert "Pass an integer or None" in refusal(make_config, CONFIGS[name], max_length="long")
    assert "Pass an integer" in refusal(make_config, CONFIGS[name], max_steps=1.5)


@pytest.mark.parametrize("name", METHODS)
def test_missing_numbers_are_refused(name, make_config):
    for number in ("learning_rate", "weight_decay", "per_device_train_batch_size", "logging_steps", "seed"):
        assert f"`{number}=None`" in refusal(make_config, CONFIGS[name], **{number: None})
    assert make_config(CONFIGS[name], max_length=None, max_grad_norm=None).max_grad_norm == 0


@pytest.mark.parametrize("name", METHODS)
def test_choices(name, make_config):
    if "train_sampling_strategy" in CONFIGS[name].__dataclass_fields__:
        for value in ("bogus", None, 3):
            assert "Use one of" in refusal(make_config, CONFIGS[name], train_sampling_strategy=value)
    if "truncation_mode" in CONFIGS[name].__dataclass_fields__:
        assert "'keep_end', 'keep_start'" in refusal(make_config, CONFIGS[name], truncation_mode="keep_middle")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DPO", {"loss_type": 3}),
        ("DPO", {"loss_type": [3]}),
        ("DPO", {"loss_weights": [True]}),
        ("DPO", {"f_divergence_type": 3}),
        ("DPO", {"pad_token": 4}),
        ("DPO", {"model_init_kwargs": [1]}),
        ("DPO", {"per_device_train_batch_size": 0}),
        ("BradleyTerry", {"chat_template_path": 4}),
    ],
)
def test_other_values(name, settings, make_config):
    assert f"`{next(iter(settings))}=" in refusal(make_config, CONFIGS[name], **settings)


def test_numbers_in_other_forms(make_config):
    """As read by `TrlParser` from a flag or from YAML, in which 1e-6 without a decimal point is a string."""
    given = {
        "learning_rate": "1e-6",
        "max_length": "512",
        "max_steps": 1e3,
        "beta": np.float64(0.25),
        "seed": np.int64(3),
    }
    config = make_config(halos_trl.DPOConfig, **given)
    assert [getattr(config, name) for name in given] == [1e-6, 512, 1000, 0.25, 3]
    assert type(config.max_steps) is type(config.max_length) is type(config.seed) is int
    with pytest.raises(ValueError, match=r"max_length='5\.5'"):
        make_config(halos_trl.DPOConfig, max_length="5.5")
    assert make_config(halos_trl.DPOConfig, max_grad_norm=math.inf).max_grad_norm == math.inf


def test_strings_in_a_yaml_file_are_what_trls_parser_makes_of_them(tmp_path):
    settings = {"output_dir": "out", "use_cpu": True, "bf16": "no", "learning_rate": "1e-6", "humanline": "false"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    parser = trl.TrlParser((halos_trl.KTOConfig,))
    (config,) = parser.parse_args_and_config(args=["--config", str(tmp_path / "run.yaml")])
    assert (config.learning_rate, config.bf16, config.humanline) == (1e-6, False, False)


def test_a_users_own_fields_are_checked_too(make_config):
    @dataclasses.dataclass
    class Mine(halos_trl.DPOConfig):
        margin: float = 1.0
        later: "OnlyForTheTypeChecker" = None  # noqa: F821

    @dataclasses.dataclass
    class Other(halos_trl.DPOConfig):
        margin: float = 1.0

    assert "`margin='wide'`" in refusal(make_config, Other, margin="wide")
    assert make_config(Mine).margin == 1.0
    assert "`beta='much'`" in refusal(make_config, Mine, beta="much")


# -- options without effect ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 0.3}, r"no effect with `loss_type=\['sigmoid'\]`.*\(robust, exo_pair.*`CDPOTrainer`"),
        ({"label_smoothing": 0.3, "loss_type": ["hinge", "sft"]}, r"no effect with `loss_type=\['hinge', 'sft'\]`"),
        ({"discopop_tau": 0.3}, r"`discopop_tau=0.3` has no effect"),
        ({"f_alpha_divergence_coef": 0.3}, r"use `f_divergence_type='alpha_divergence'`"),
    ],
)
def test_options_that_the_loss_does_not_read(settings, message, make_config, model, tokenizer):
    config = make_config(halos_trl.DPOConfig, **settings)
    with pytest.raises(ValueError, match=message):
        halos_trl.DPOTrainer(model=model, args=config, train_dataset=paired_rows(8), processing_class=tokenizer)


def test_options_that_one_of_the_losses_reads(make_config, model, tokenizer):
    config = make_config(halos_trl.DPOConfig, label_smoothing=0.1, loss_type=["sigmoid", "robust"])
    halos_trl.DPOTrainer(model=model, args=config, train_dataset=paired_rows(8), processing_class=tokenizer)
