"""Arguments of a wrong type are refused by name, before anything is loaded."""

import peft
import pytest
import torch
import transformers
from conftest import paired_rows

from halos_trl import BradleyTerryConfig, BradleyTerryTrainer, DPOConfig, DPOTrainer


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("model", 5, r"`model` is 5 \(int\)"),
        ("model", "", "`model` is ''"),
        ("model", "./not-there", "no such folder"),
        ("model", torch.nn.Linear(2, 2), "`model` is a value of type Linear"),
        ("model", transformers.LlamaForCausalLM, "`model` is the class LlamaForCausalLM itself"),
        ("ref_model", "org/model", r"`ref_model` is 'org/model' \(str\)"),
        ("processing_class", "tokenizer", "`processing_class` is 'tokenizer'"),
        ("processing_class", None, "`processing_class` was not passed"),
        ("eval_dataset", {}, "`eval_dataset` is an empty dict"),
        ("data_collator", 5, "`data_collator` is 5"),
        ("compute_metrics", "accuracy", "`compute_metrics` is 'accuracy'"),
        ("callbacks", transformers.TrainerCallback(), "`callbacks` is a value of type TrainerCallback"),
        ("callbacks", [print], r"`callbacks\[0\]`"),
        ("optimizers", None, "`optimizers` is None"),
        ("optimizers", (torch.optim.SGD, None), r"`optimizers\[0\]` is the class SGD itself"),
        ("peft_config", {"r": 4}, "`peft_config` is a value of type dict"),
        ("peft_config", peft.LoraConfig(r="4"), "`r='4'`"),
        ("quantization_config", {"load_in_4bit": True}, "`quantization_config` is a value of type dict"),
    ],
)
def test_names_the_argument(model, tokenizer, make_config, argument, value, message):
    arguments = {"model": model, "processing_class": tokenizer, "train_dataset": paired_rows(4)} | {argument: value}
    with pytest.raises((TypeError, ValueError), match=message):
        DPOTrainer(args=make_config(DPOConfig), **arguments)
    if argument == "model":
        with pytest.raises((TypeError, ValueError), match=message):
            BradleyTerryTrainer(args=make_config(BradleyTerryConfig), **arguments)


@pytest.mark.parametrize("head", ["encoder-decoder", "none", "meta"])
def test_a_model_that_gives_no_log_probs(model, tokenizer, make_config, head):
    made = {
        "encoder-decoder": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=8)
        ),
        "none": lambda: model.model,
        "meta": lambda: model.to("meta"),
    }
    message = {
        "encoder-decoder": "has an encoder and a decoder",
        "none": "no language-model head",
        "meta": "meta device",
    }
    with pytest.raises(ValueError, match=message[head]):
        DPOTrainer(made[head](), args=make_config(DPOConfig), train_dataset=paired_rows(4), processing_class=tokenizer)


def test_an_optimizer_of_other_parameters(model, tokenizer, make_config):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    arguments = {"args": make_config(DPOConfig), "train_dataset": paired_rows(4), "processing_class": tokenizer}
    with pytest.raises(ValueError, match="contains none of the trained parameters"):
        DPOTrainer(model, optimizers=(optimizer, None), **arguments)
    DPOTrainer(model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None), **arguments)


@pytest.mark.parametrize(
    ("argument", "function", "message"),
    [
        ("data_collator", lambda rows: rows, "`data_collator` returned a value of type list"),
        ("data_collator", lambda rows: {}, "`data_collator` returned an empty batch"),
        ("compute_metrics", lambda prediction: 5.0, "`compute_metrics` returned 5.0"),
    ],
)
def test_what_a_users_function_returns(model, tokenizer, make_config, argument, function, message):
    data = {"train_dataset": paired_rows(4), "eval_dataset": paired_rows(4)}
    trainer = DPOTrainer(
        model, args=make_config(DPOConfig), processing_class=tokenizer, **data, **{argument: function}
    )
    assert getattr(trainer, argument) is function
    with pytest.raises((TypeError, ValueError), match=message):
        trainer.evaluate()
