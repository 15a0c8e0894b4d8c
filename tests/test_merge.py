"""Merging an adapter: the saved model equals base plus adapter, also with tied weights; others are not written."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import paired_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from halos_trl import DPOConfig, DPOTrainer
from halos_trl.merge import merge_adapter, merged_model, outputs_of, refuse_other_model

IDS = torch.arange(24)[None]


@pytest.mark.parametrize(
    ("lora", "stays_tied"),
    [
        ({"target_modules": ["down_proj"]}, True),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 4, 5]}}, True),
    ],
    ids=str,
)
def test_merged_model_is_base_plus_adapter(model, tmp_path, lora, stays_tied):
    assert model.config.tie_word_embeddings
    base = model.double().eval()
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, init_lora_weights=False, **lora)).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected = outputs_of(adapted, IDS)
    merged_model(adapted).save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    torch.testing.assert_close(outputs_of(loaded, IDS), expected, rtol=0, atol=1e-5)
    assert (outputs_of(base, IDS) - expected).abs().max() > 1e-2
    assert loaded.config.tie_word_embeddings == stays_tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == stays_tied


@pytest.fixture
def trained(model, tokenizer, make_config, tmp_path):
    model.save_pretrained(tmp_path / "base")
    trainer = DPOTrainer(
        str(tmp_path / "base"),
        args=make_config(DPOConfig, max_steps=1),
        train_dataset=paired_rows(8),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"]),
    )
    trainer.train()
    trainer.save_model()
    return trainer


def test_what_lay_in_the_folder_is_moved_away(trained, said):
    target = Path(f"{trained.args.output_dir}-merged")
    target.mkdir()
    (target / "adapter_config.json").write_text("{}")  # `from_pretrained` would load it on top
    for number in (1, 2):
        merge_adapter(trained, [])
        loaded = AutoModelForCausalLM.from_pretrained(target)
        torch.testing.assert_close(outputs_of(loaded, IDS), outputs_of(trained.model, IDS), rtol=0, atol=1e-5)
        assert f"{target} already existed and was renamed to {target}.previous-{number}" in said()
    assert json.loads((target.with_name(f"{target.name}.previous-1") / "adapter_config.json").read_text()) == {}
    assert sorted(p.name for p in target.parent.glob("*-merged*")) == [
        "out-merged", "out-merged.previous-1", "out-merged.previous-2",
    ]  # fmt: skip


def test_model_that_is_not_the_trained_one_is_not_written(trained):
    with torch.no_grad():
        trained.model.base_model.model.model.norm.weight.mul_(1.5)  # trained, but not a part of the adapter
    with pytest.raises(ValueError, match=r"The outputs of the merged model differ from the adapter.* unmerged"):
        merge_adapter(trained, [])
    assert not list(Path(trained.args.output_dir).parent.glob("*-merged*"))


def test_what_rounding_explains_is_accepted():
    expected = torch.tensor([[-1.0, -2.0]])
    refuse_other_model(expected, expected + 0.09, 0.0, torch.bfloat16)
    refuse_other_model(expected, expected + 1.0, 5.0, torch.bfloat16)
    wrong = ((0.01, 0.0, torch.float32), (0.5, 1.0, torch.bfloat16), (torch.nan, 9.0, torch.float16))
    for off, change, dtype in wrong:
        with pytest.raises(ValueError, match="outputs of the merged model differ"):
            refuse_other_model(expected, expected + off, change, dtype)
