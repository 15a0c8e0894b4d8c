"""BradleyTerryTrainer: TRL's loss, any split of a step, and reward models with one logit or HALOs' two."""

import copy
import math
import re

import datasets
import pytest
import torch
import trl
from conftest import assistant, paired_rows, user, weights
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from halos_trl import BradleyTerryConfig, BradleyTerryTrainer, toy
from halos_trl.trainers.reward import load_reward_model
from halos_trl.trainers.reward_scores import RewardModelScores


@pytest.fixture(scope="module")
def _scorer():
    return classifier(1)


@pytest.fixture
def scorer(_scorer):
    """A fresh reward model with a fixed initialization."""
    return copy.deepcopy(_scorer)


def classifier(labels):
    config = toy.tiny_model(toy.build_tokenizer()).config
    config.num_labels = labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return LlamaForSequenceClassification(config).float().eval()


@pytest.fixture
def fit(scorer, tokenizer, make_config):
    def run(data, trainer_class=BradleyTerryTrainer, config_class=BradleyTerryConfig, *, train=True, **overrides):
        extra = {k: overrides.pop(k) for k in ("eval_dataset", "peft_config") if k in overrides}
        settings = {"train_sampling_strategy": "sequential"} | overrides
        trainer = trainer_class(
            model=copy.deepcopy(scorer),
            args=make_config(config_class, **settings),
            train_dataset=data,
            processing_class=tokenizer,
            **extra,
        )
        if train:
            trainer.train()
        return trainer

    return run


def learnable_rows(n, seed=0):
    """Pairs whose chosen completion is sorted and whose rejected one is the same letters in reverse."""
    prompts = [p for p in toy.make_prompts(2 * n, seed, "feedback") if len(set(toy.answer(p))) > 1][:n]
    return datasets.Dataset.from_list(
        [
            {
                "prompt": user(p),
                "chosen": assistant(toy.answer(p)),
                "rejected": assistant(toy.answer(p)[::-1]),
            }
            for p in prompts
        ]
    )


# -- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"center_rewards_coefficient": 0.1}, {"max_length": 14}])
def test_three_steps_equal_trl(fit, options):
    data = paired_rows(24)
    ours, theirs = fit(data, **options), fit(data, trl.RewardTrainer, trl.RewardConfig, **options)
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=0, atol=1e-6)
    steps = [[e for e in t.state.log_history if "loss" in e] for t in (ours, theirs)]
    assert len(steps[0]) == 3
    for mine, trls in zip(*steps, strict=True):
        assert set(mine) == set(trls)
        for name, value in trls.items():
            assert mine[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_loss_is_minus_log_sigmoid_of_the_score_difference(fit):
    trainer = fit(paired_rows(4), train=False)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        chosen, rejected = (
            trainer.model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[:, 0].chunk(2)
        )
        loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx((1 + (rejected - chosen).exp()).log().mean().item(), abs=1e-6)
    assert not torch.equal(chosen, rejected)


@pytest.mark.parametrize("size", [1, 3])
def test_weights_do_not_depend_on_the_split(fit, size):
    data = paired_rows(12)
    whole = fit(data, max_steps=2, per_device_train_batch_size=6)
    split = fit(data, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=6 // size)
    torch.testing.assert_close(weights(split.model), weights(whole.model), rtol=0, atol=1e-6)


def test_last_smaller_microbatch_weighs_by_its_pairs(fit):
    data = paired_rows(6)
    whole = fit(data, max_steps=1, per_device_train_batch_size=6)
    split = fit(data, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    torch.testing.assert_close(weights(split.model), weights(whole.model), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_learns_to_score_chosen_above_rejected_on_held_out_pairs(fit):
    trainer = fit(
        learnable_rows(256), eval_dataset=learnable_rows(64, seed=1), max_steps=60, optim="adamw_torch",
        learning_rate=3e-3, per_device_train_batch_size=16, per_device_eval_batch_size=32, train=False,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] > 0.95 > before["eval_accuracy"]
    assert after["eval_margin"] > before["eval_margin"]
    assert after["eval_loss"] < 0.3 < before["eval_loss"]


# -- bad input -----------------------------------------------------------------------------------------------------


def test_two_logits_are_refused_with_the_function_that_reads_them(make_config, tokenizer, tmp_path):
    model = classifier(2)
    model.save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    for policy in (model, str(tmp_path / "two")):
        with pytest.raises(ValueError, match="load_reward_model"):
            BradleyTerryTrainer(
                policy, make_config(BradleyTerryConfig), train_dataset=paired_rows(6), processing_class=tokenizer
            )


def test_rows_dropped_for_their_length_are_counted(fit, said):
    rows = paired_rows(8).to_list()
    rows[5]["rejected"] = assistant("a" * 40)
    trainer = fit(datasets.Dataset.from_list(rows), max_length=40, train=False)
    assert "Dropped 1 of 8 rows of the train dataset (the first is row 5): `chosen` or `rejected` is longer" in said()
    # Rows that were tokenized before are dropped by TRL.
    fit(trainer.train_dataset, max_length=len(trainer.train_dataset[0]["chosen_ids"]), train=False)
    assert re.search(r"TRL dropped \d of 7 rows of the train dataset", said())


def test_group_by_length_puts_pairs_of_a_length_together(fit):
    """transformers' length sampler reads `input_ids`, which pairs do not have."""
    rows = learnable_rows(32)
    trainer = fit(rows, train=False, train_sampling_strategy="group_by_length", eval_dataset=rows)
    lengths = [len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in trainer.train_dataset]
    order = [lengths[i] for i in trainer._get_train_sampler()]
    steps = [order[start : start + 8] for start in range(0, 32, 8)]
    assert sorted(order) == sorted(lengths) != order
    assert all(step == sorted(step, reverse=True) for step in steps)
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_trl_config_is_refused_with_the_import_to_use(scorer, tokenizer, make_config):
    with pytest.raises(ValueError, match=r"Use `halos_trl\.BradleyTerryConfig`"):
        BradleyTerryTrainer(
            scorer, make_config(trl.RewardConfig), train_dataset=paired_rows(4), processing_class=tokenizer
        )


# -- saved models --------------------------------------------------------------------------------------------------


def test_checkpoint_and_card(fit, tokenizer, tmp_path):
    trainer = fit(paired_rows(8), max_steps=1, save_strategy="steps", save_steps=1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Bradley-Terry" in card
    assert "bradley1952rank" in card
    assert "text-generation" not in card, "a reward model generates nothing"
    trainer.save_model(tmp_path / "saved")
    loaded = load_reward_model(str(tmp_path / "saved"))
    ids = torch.tensor([tokenizer("ab c")["input_ids"]])
    torch.testing.assert_close(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)


def test_two_logits_of_a_halos_checkpoint_become_logit_1(tokenizer, tmp_path):
    halos = classifier(2)
    halos.save_pretrained(tmp_path / "halos")
    ids = torch.tensor([tokenizer("ab c")["input_ids"], tokenizer("dd e")["input_ids"]])
    ours = load_reward_model(str(tmp_path / "halos")).eval()
    assert ours.config.num_labels == 1
    assert ours(ids).logits.shape == (2, 1)
    torch.testing.assert_close(ours(ids).logits[:, 0], halos(ids).logits[:, 1])
    ours.save_pretrained(tmp_path / "single")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "single").eval()
    torch.testing.assert_close(again(ids).logits, ours(ids).logits)


def test_another_number_of_logits_is_refused(tmp_path):
    classifier(3).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="has 3 labels"):
        load_reward_model(str(tmp_path / "three"))


# -- heads that would stay random ----------------------------------------------------------------------------------


@pytest.fixture
def language_model(model, tokenizer, tmp_path):
    """The folder of a language model, from which a reward model starts with a new head."""
    folder = tmp_path / "language-model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train_adapter(policy, tokenizer, make_config, **lora):
    trainer = BradleyTerryTrainer(
        policy,
        make_config(BradleyTerryConfig),
        train_dataset=paired_rows(24),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, **lora),
    )
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.mark.parametrize(
    "lora",
    [
        {"task_type": "SEQ_CLS"},
        {"modules_to_save": ["score"]},
        {"modules_to_save": ["score"], "target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_adapter_with_a_trained_head_scores_the_same_when_reloaded(language_model, tokenizer, make_config, lora):
    trainer = train_adapter(language_model, tokenizer, make_config, **lora)
    ids = torch.tensor([tokenizer("ab c")["input_ids"], tokenizer("dd e")["input_ids"]])
    loaded = load_reward_model(trainer.args.output_dir).eval()
    assert type(loaded) is LlamaForSequenceClassification
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, rtol=0, atol=1e-6)
    # An adapter of a reward model needs no head of its own.
    loaded.save_pretrained(f"{language_model}-scorer")
    adapter = train_adapter(f"{language_model}-scorer", tokenizer, make_config)
    again = load_reward_model(adapter.args.output_dir).eval()
    torch.testing.assert_close(again(ids).logits, adapter.model.eval()(ids).logits, rtol=0, atol=1e-6)
    assert (again(ids).logits - loaded(ids).logits).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({}, r"neither trains nor saves \['score.weight'\].*SEQ_CLS"),
        ({"target_modules": ["q_proj", "score"]}, r"neither trains nor saves \['score.base_layer.weight'"),
        ({"task_type": "CAUSAL_LM"}, r"task_type='CAUSAL_LM'.*--lora_task_type SEQ_CLS"),
    ],
)
def test_adapter_that_leaves_a_new_head_random_is_refused(language_model, tokenizer, make_config, lora, message):
    with pytest.raises(ValueError, match=message):
        train_adapter(language_model, tokenizer, make_config, **lora)


def test_new_head_that_is_frozen_or_missing_in_the_adapter_is_refused(language_model, tokenizer, make_config):
    frozen = AutoModelForSequenceClassification.from_pretrained(language_model, num_labels=1)
    frozen.score.requires_grad_(False)
    trained_beside = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(language_model, num_labels=1), LoraConfig(r=2)
    )
    trained_beside.base_model.model.score.requires_grad_(True)
    for policy, message in ((frozen, "are frozen"), (trained_beside, "neither trains nor saves")):
        with pytest.raises(ValueError, match=message):
            BradleyTerryTrainer(
                policy, make_config(BradleyTerryConfig), train_dataset=paired_rows(8), processing_class=tokenizer
            )


def test_language_model_is_no_reward_model(language_model, tokenizer, make_config):
    with pytest.raises(ValueError, match=r"saved as \['LlamaForCausalLM'\] and has no \['score.weight'\]"):
        load_reward_model(language_model)
    new = AutoModelForSequenceClassification.from_pretrained(language_model, num_labels=1)
    new.config.pad_token_id = tokenizer.pad_token_id
    with pytest.raises(ValueError, match=r"`reward_model` was loaded from .*LlamaForCausalLM.* random"):
        RewardModelScores(new, tokenizer)
    trainer = BradleyTerryTrainer(
        language_model, make_config(BradleyTerryConfig), train_dataset=paired_rows(24), processing_class=tokenizer
    )
    RewardModelScores(trainer.model, tokenizer)  # trained in this process, not saved


def test_adapter_without_a_head_is_no_reward_model(language_model, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(language_model, num_labels=1)
    get_peft_model(base, LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="newly initialized, so every score would be random"):
        load_reward_model(str(tmp_path / "adapter"))
