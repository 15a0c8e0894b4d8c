"""GRPOTrainer: results do not depend on the split of a step, groups stay whole, reference per token, refusals."""

import re

import datasets
import pytest
import torch
import trl
from conftest import paired_rows, unpaired_rows, weights
from peft import LoraConfig
from policy_runs import GRPO, build, logged, scored
from test_drop_in import mixture_of_experts

from halos_trl import GRPOConfig, GRPOTrainer
from halos_trl.advantages import group_advantages
from halos_trl.losses import grpo
from halos_trl.records import GroupLogps

NAMES = (
    "loss", "kl", "entropy", "weighted_advantage", "clip_fraction", "scores", "advantages/abs", "num_tokens",
    "grad_norm",
)  # fmt: skip


@pytest.fixture
def fit(model, tokenizer, make_config):
    def run(data, *, train=True, ref="near", peft_config=None, callbacks=None, eval_dataset=None, **overrides):
        config = make_config(GRPOConfig, **(GRPO | overrides))
        extra = {"peft_config": peft_config, "callbacks": callbacks, "eval_dataset": eval_dataset}
        trainer = build(GRPOTrainer, config, model, tokenizer, data, ref=ref, **extra)
        if train:
            trainer.train()
        return trainer

    return run


# -- the loss ------------------------------------------------------------------------------------------------------


def test_step_equals_the_loss_written_out(fit):
    """One step on all rows: token mean of the pure loss, with advantages of whole groups, computed apart."""
    data = scored(4)
    trainer = fit(data, train=False, per_device_train_batch_size=14, train_sampling_strategy="sequential")
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)

    def logps(model):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)

    mask = batch["completion_mask"][:, 1:]
    advantages = group_advantages(torch.tensor(data["score"]), data["prompt_id"])
    torch.testing.assert_close(sorted(batch["advantage"].tolist()), sorted(advantages.tolist()), rtol=0, atol=1e-6)
    record = GroupLogps(logps(trainer.model), logps(trainer.ref_model).detach(), mask, batch["advantage"])
    expected = grpo(record, **GRPO).losses.sum() / mask.sum()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)


def test_options_reach_the_loss(fit):
    data = scored(4)
    plain = weights(fit(data, max_steps=1).model)
    for option in ({"epsilon_high": 2.0}, {"scale_rewards": False}, {"sequence_level": True}, {"beta": 3.0}):
        assert not torch.equal(weights(fit(data, max_steps=1, **option).model), plain), option


# -- one optimizer step is one batch -------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_loss_and_weights_do_not_depend_on_the_split(fit, strategy):
    """Groups of 2 to 5 rows in steps of at most 8: they cross micro-batches, and some micro-batches stay empty."""
    data = scored(10)
    whole = fit(data, train_sampling_strategy=strategy, max_steps=4)
    for size in (1, 2, 4):
        steps = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        split = fit(data, train_sampling_strategy=strategy, max_steps=4, **steps)
        torch.testing.assert_close(weights(split.model), weights(whole.model), rtol=0, atol=1e-6)
        for mine, theirs in zip(logged(split, *NAMES), logged(whole, *NAMES), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert all(clipped > 0 for (clipped,) in logged(whole, "clip_fraction")), "the clip must have a say"


def test_humanline_does_not_depend_on_the_split(fit):
    data = scored(10)
    settings = {"humanline": True, "ref": None, "log_epsilon_p": -0.01, "log_epsilon_r": 0.01}
    whole = fit(data, **settings)
    split = fit(data, **settings, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    torch.testing.assert_close(weights(split.model), weights(whole.model), rtol=0, atol=1e-6)
    unclamped = logged(whole, "unclamped")
    assert unclamped == [pytest.approx(row, abs=1e-6) for row in logged(split, "unclamped")]
    assert 0 < unclamped[1][0] < 1


def test_epochs_reshuffle_and_end_when_all_rows_were_seen(fit):
    data = scored(10)
    trainer = fit(
        data, train=False, num_train_epochs=2, max_steps=-1, per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    seen, compute_loss = [], trainer.compute_loss

    def spy(model, inputs, *args, **kwargs):
        seen.append(inputs["score"][inputs["completion_mask"].any(-1)].tolist())
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    # 36 rows in groups of 2 to 5: five steps of at most 8 hold them, each of two micro-batches.
    assert trainer.state.global_step == 10
    assert trainer.state.epoch == 2
    first, second = ([score for batch in seen[start : start + 10] for score in batch] for start in (0, 10))
    rows = sorted(torch.tensor(data["score"]).tolist())  # no two scores are equal
    assert sorted(first) == sorted(second) == rows
    assert first != second


def test_steps_hold_whole_groups_with_their_advantages(fit):
    trainer = fit(scored(10), train=False, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    loader = trainer.get_train_dataloader()
    micro_batches = list(loader)
    assert len(micro_batches) == len(loader) == 5 * 4
    for i in range(0, len(micro_batches), 4):
        step = micro_batches[i : i + 4]
        real = torch.cat([batch["completion_mask"].any(-1) for batch in step])
        advantages = torch.cat([batch["advantage"] for batch in step])[real]
        assert advantages.sum().abs() < 1e-5, "advantages of a whole group add up to 0"


def test_steps_that_stay_half_empty_are_reported(fit, said):
    """Groups of 5 in steps of 8: one group in each, 5/8 of the room; steps of 10 hold two."""
    data = scored(4, sizes=(5,))
    fit(data, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1)
    assert re.search("62% .*takes 4 steps, although 3 would .*multiple of the usual", said())


@pytest.mark.parametrize(("rows", "size"), [(20, 10), (5, 8), (20, 3)])
def test_steps_that_are_full_enough_are_not_reported(fit, said, rows, size):
    """Full steps; a single step that the rows do not fill; and steps that are 5/6 full, of groups split into 3 + 2."""
    fit(scored(rows // 5, sizes=(5,)), per_device_train_batch_size=size, max_steps=1)
    assert "because groups stay whole" not in said()


# -- mixture of experts --------------------------------------------------------------------------------------------


def test_evaluation_loss_contains_the_weighted_aux_loss(tokenizer, make_config):
    policy, held_out = mixture_of_experts(tokenizer), scored(4, seed=1)
    losses = {}
    for coefficient in (0.0, 10.0):
        # On padded rows, as the term is computed by hand below.
        settings = make_config(
            GRPOConfig, router_aux_loss_coef=coefficient, per_device_eval_batch_size=14, packed="off"
        )
        trainer = build(GRPOTrainer, settings, policy, tokenizer, held_out, eval_dataset=held_out)
        losses[coefficient] = trainer.evaluate()["eval_loss"]
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        aux = policy(batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True).aux_loss
    assert aux > 0.1
    assert losses[10.0] - losses[0.0] == pytest.approx(10 * aux.item(), abs=1e-5)


# -- precomputed reference log-probs -------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [None, 17])
def test_precomputed_reference_is_exact_per_token(fit, max_length):
    online = fit(scored(10), max_length=max_length, epsilon=0.01)
    stored = fit(scored(10), max_length=max_length, epsilon=0.01, precompute_ref_log_probs=True)
    torch.testing.assert_close(weights(stored.model), weights(online.model), rtol=0, atol=1e-6)
    for mine, theirs in zip(logged(stored, *NAMES), logged(online, *NAMES), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_precomputed_reference_with_split_and_evaluation(fit):
    settings = {"precompute_ref_log_probs": True, "eval_dataset": scored(4, seed=1)}
    whole = fit(scored(10), **settings)
    split = fit(scored(10), **settings, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    torch.testing.assert_close(weights(split.model), weights(whole.model), rtol=0, atol=1e-6)
    assert whole.evaluate()["eval_loss"] == pytest.approx(split.evaluate()["eval_loss"], abs=1e-6)


# -- data ----------------------------------------------------------------------------------------------------------


def test_labelled_paired_listed_and_standard_rows(fit, tokenizer):
    assert len(fit(unpaired_rows(8), max_steps=1).train_dataset) == 8
    assert len(fit(paired_rows(8), max_steps=1).train_dataset) == 16
    lists = [{"prompt": p, "completions": [" b", " c"], "scores": [0.0, 1.0]} for p in ("a", "d")]
    trainer = fit(datasets.Dataset.from_list(lists), max_steps=1)
    assert all(ids[-1] == tokenizer.eos_token_id for ids in trainer.train_dataset["completion_ids"])
    assert sorted(trainer.train_dataset["advantage"]) == pytest.approx([-0.5 / 0.51] * 2 + [0.5 / 0.51] * 2)


def test_column_advantage_of_raw_rows_is_replaced(fit, said):
    data = scored(4)
    trainer = fit(data.add_column("advantage", [7.0] * 14), train=False)
    assert "The train dataset has a column `advantage`. It is replaced" in said()
    assert list(trainer.train_dataset["advantage"]) == list(fit(data, train=False).train_dataset["advantage"])


def test_prepared_rows_keep_their_advantages_in_evaluation(fit, said):
    trainer = fit(scored(4), eval_dataset=scored(4, seed=1), train=False)
    trainer.evaluate(trainer.eval_dataset.remove_columns("advantage").add_column("advantage", [7.0] * 14))
    assert trainer.state.log_history[-1]["eval_advantages/abs"] == 7.0
    assert "It is replaced" not in said()


def test_equal_scores_are_legal_and_only_the_penalty_acts(fit):
    data = scored(4).remove_columns("score").add_column("score", [0.3] * 14)
    trainer = fit(data, beta=0.0, weight_decay=0.0, max_steps=2)
    before = fit(data, train=False)
    assert torch.equal(weights(trainer.model), weights(before.model))
    assert logged(trainer, "advantages/abs") == [[0.0]] * 2


def test_group_of_one_and_oversized_group_are_counted(fit, said):
    trainer = fit(scored(2, sizes=(1, 20)), max_steps=2)
    assert "1 of 2 prompts of the train dataset have a single completion" in said()
    assert "1 groups of the train dataset have more completions than fit into an optimizer step (8)" in said()
    assert torch.isfinite(weights(trainer.model)).all()


def test_evaluation_accepts_raw_and_prepared_data(fit):
    held_out = scored(4, seed=1)
    trainer = fit(scored(10), eval_dataset={"a": held_out, "b": scored(4, seed=2)}, per_device_eval_batch_size=64)
    metrics = trainer.evaluate()
    assert trainer.evaluate(held_out)["eval_loss"] == metrics["eval_a_loss"] != metrics["eval_b_loss"]
    assert trainer.model.training is False
    entry = trainer.state.log_history[-1]
    assert entry["eval_scores"] == pytest.approx(sum(held_out["score"]) / 14)


def test_evaluation_does_not_depend_on_its_batch_size(fit):
    settings = {"eval_dataset": scored(4, seed=1), "train": False}
    whole, split = (fit(scored(10), per_device_eval_batch_size=n, **settings).evaluate() for n in (14, 3))
    assert split["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)


def test_lora_trains_and_saves(fit, tmp_path):
    trainer = fit(scored(10), ref=None, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    kl = logged(trainer, "kl")
    assert kl[0] == [0.0]
    assert kl[2] != [0.0]
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


# -- refusals ------------------------------------------------------------------------------------------------------


def test_trls_online_grpo_is_pointed_to(model, tokenizer, make_config):
    with pytest.raises(ValueError, match=r"`reward_funcs` belongs to `trl\.GRPOTrainer`.*offline"):
        GRPOTrainer(model, reward_funcs=len, train_dataset=scored(4), processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"Its settings are not those of this method. Use `halos_trl.GRPOConfig`"):
        GRPOTrainer(
            model,
            args=make_config(trl.GRPOConfig, per_device_train_batch_size=8),
            train_dataset=scored(4),
            processing_class=tokenizer,
        )
