"""Saved files contain no access token."""

import copy
import pickle

import pytest
import torch
from conftest import paired_rows, unpaired_rows

import halos_trl
from halos_trl import BradleyTerryConfig, BradleyTerryTrainer, KTOConfig, KTOTrainer

TOKENS = {"hub_token": "hf_secret", "model_init_kwargs": {"token": "hf_secret", "revision": "main"}}


CONFIGS = [n for n in halos_trl.__all__ if "hub_token" in getattr(getattr(halos_trl, n), "__dataclass_fields__", ())]


@pytest.mark.parametrize("name", CONFIGS)
def test_pickled_config_has_no_token_and_a_copy_has(make_config, name):
    config = make_config(getattr(halos_trl, name), **TOKENS)
    assert b"hf_secret" not in pickle.dumps(config)
    loaded = pickle.loads(pickle.dumps(config))
    assert (loaded.hub_token, loaded.model_init_kwargs) == (None, {"token": None, "revision": "main"})
    for twin in (copy.copy(config), copy.deepcopy(config), config):
        assert type(twin) is type(config)
        assert (twin.hub_token, twin.model_init_kwargs) == ("hf_secret", TOKENS["model_init_kwargs"])
    assert "hf_secret" not in str(config.to_dict())
    assert copy.deepcopy(config).model_init_kwargs is not config.model_init_kwargs


@pytest.mark.parametrize(
    ("trainer_class", "config_class", "rows"),
    [(KTOTrainer, KTOConfig, unpaired_rows), (BradleyTerryTrainer, BradleyTerryConfig, paired_rows)],
)
def test_no_saved_file_holds_the_token(model, tokenizer, make_config, tmp_path, trainer_class, config_class, rows):
    model.save_pretrained(tmp_path / "base")
    trainer = trainer_class(
        str(tmp_path / "base"),
        args=make_config(config_class, max_steps=1, save_strategy="steps", save_steps=1, hub_token="hf_secret"),
        train_dataset=rows(8),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [path.parent.name for path in files].count("checkpoint-1") > 3
    for path in files:
        assert b"hf_secret" not in path.read_bytes(), path
    assert trainer.args.hub_token == "hf_secret"
    saved = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert type(saved) is config_class and saved.max_steps == 1
