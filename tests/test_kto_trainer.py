"""KTOTrainer: equality with TRL where intended, any split of a step; options work or are refused."""

import copy

import datasets
import pytest
import torch
import transformers
import trl
from conftest import assistant, paired_rows, perturbed, unpaired_rows, weights
from packaging.version import Version
from peft import LoraConfig, get_peft_model

from halos_trl import KTOConfig, KTOTrainer


class TRLWithOurPartners(trl.KTOTrainer):
    """TRL pairs prompt i with completion i-1 of its batch; HALOs and we with i+1. Everything else is TRL's."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)

        def rotate(rows):
            rows["KL_completion_ids"] = rows["completion_ids"][1:] + rows["completion_ids"][:1]
            return rows

        return dataset.map(rotate, batched=True, batch_size=args.per_device_train_batch_size)


@pytest.fixture
def fit(model, tokenizer, make_config):
    """Train a copy of the policy against a reference that differs from it; the trainer comes back."""

    def run(data, trainer_class=KTOTrainer, config_class=KTOConfig, *, train=True, ref="near", **overrides):
        settings = {"train_sampling_strategy": "sequential"} | overrides
        extra = {k: settings.pop(k) for k in ("eval_dataset", "callbacks", "peft_config") if k in settings}
        trainer = trainer_class(
            model=copy.deepcopy(model),
            ref_model=perturbed(model) if ref == "near" else ref,
            args=make_config(config_class, **settings),
            train_dataset=data,
            processing_class=tokenizer,
            **extra,
        )
        if train:
            trainer.train()
        return trainer

    return run


def logged(trainer, *names):
    return [[entry[name] for name in names] for entry in trainer.state.log_history if names[0] in entry]


# -- equal to TRL --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_three_steps_equal_trl(fit, loss_type):
    data = unpaired_rows(24)
    settings = {"loss_type": loss_type, "beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    if Version(transformers.__version__) < Version("5.2") and loss_type != "kto":
        # There TRL shuffles whatever `train_sampling_strategy` says, so one step holds all rows.
        data, settings["per_device_train_batch_size"] = unpaired_rows(24), 24
    ours = fit(data, **settings)
    theirs = fit(data, TRLWithOurPartners, trl.KTOConfig, **settings)

    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=0, atol=1e-6)
    assert len(ours.state.log_history) == len(theirs.state.log_history) == 4
    for mine, trls in zip(ours.state.log_history[:3], theirs.state.log_history[:3], strict=True):
        assert set(mine) == set(trls)
        for name, value in trls.items():
            assert mine[name] == pytest.approx(value, rel=1e-5, abs=5e-6), name  # float32 sums of 30 nats
    if loss_type == "kto":
        assert any(entry["kl"] > 0 for entry in ours.state.log_history[:3]), "the KL term must have a say"


# -- one optimizer step is one batch -------------------------------------------------------------------------------


def test_loss_and_weights_do_not_depend_on_the_split(fit):
    data = unpaired_rows(16)
    whole = fit(data, max_steps=2, per_device_train_batch_size=8)
    for size in (1, 2, 4):
        split = fit(data, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        torch.testing.assert_close(weights(split.model), weights(whole.model), rtol=0, atol=1e-6)
        names = ("loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "entropy")
        for mine, theirs in zip(logged(split, *names), logged(whole, *names), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_last_smaller_microbatch_weighs_by_its_examples(fit):
    """6 rows as 6, and as 4 + 2: TRL would count each row of the second micro-batch twice as much."""
    data = unpaired_rows(6)
    whole = fit(data, max_steps=1, per_device_train_batch_size=6)
    split = fit(data, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    torch.testing.assert_close(weights(split.model), weights(whole.model), rtol=0, atol=1e-6)
    assert logged(split, "loss")[0] == pytest.approx(logged(whole, "loss")[0], abs=1e-6)


def test_log_line_averages_everything_since_the_last_one(fit):
    data = unpaired_rows(16)
    each = logged(fit(data, max_steps=4, per_device_train_batch_size=4), "kl", "rewards/chosen", "loss")
    every_other = fit(data, max_steps=4, per_device_train_batch_size=4, logging_steps=2)
    kl, _, loss = zip(*each, strict=True)
    assert [row[0] for row in logged(every_other, "kl")] == pytest.approx(
        [(kl[0] + kl[1]) / 2, (kl[2] + kl[3]) / 2], rel=1e-5
    )
    assert [row[0] for row in logged(every_other, "loss")] == pytest.approx(
        [(loss[0] + loss[1]) / 2, (loss[2] + loss[3]) / 2], abs=1e-4
    )


@pytest.mark.parametrize("per_device", [1, 4])
def test_shuffled_by_default_and_deterministic(fit, per_device):
    data = unpaired_rows(16)
    steps = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": 8 // per_device}
    shuffled = fit(data, train_sampling_strategy="random", **steps)
    again = fit(data, train_sampling_strategy="random", **steps)
    in_order = fit(data, **steps)
    assert KTOConfig(output_dir="x", bf16=False, use_cpu=True).train_sampling_strategy == "random"
    assert torch.equal(weights(shuffled.model), weights(again.model))
    assert not torch.equal(weights(shuffled.model), weights(in_order.model))


@pytest.mark.skipif("train_sampling_strategy" not in trl.DPOConfig.__dataclass_fields__, reason="transformers < 5.2")
def test_group_by_length_batches_rows_of_a_length(fit):
    trainer = fit(unpaired_rows(64), train_sampling_strategy="group_by_length", per_device_train_batch_size=4)
    rows = trainer.train_dataset
    lengths = [len(p) + len(c) for p, c in zip(rows["prompt_ids"], rows["completion_ids"], strict=True)]

    def spread(order):
        chunks = [order[i : i + 4] for i in range(0, 64, 4)]
        return sum(max(lengths[i] for i in chunk) - min(lengths[i] for i in chunk) for chunk in chunks)

    order = list(trainer.get_train_dataloader().batch_sampler.sampler)
    assert sorted(order) == list(range(64))
    assert spread(order) < spread(list(range(64)))


def test_streaming_equals_map_style(fit):
    data = unpaired_rows(24)
    streamed = fit(data.to_iterable_dataset())
    assert torch.equal(weights(streamed.model), weights(fit(data).model))


def test_leftover_example_of_an_epoch_trains_with_kl_zero_and_says_so(fit, said):
    trainer = fit(unpaired_rows(9), max_steps=2)
    assert logged(trainer, "kl")[1] == [0.0]
    assert torch.isfinite(weights(trainer.model)).all()
    assert "its KL term is 0" in said()


def test_kl_is_that_of_each_prompt_with_the_next_completion_written_out(fit):
    """Cut by its own prompt as it is trained, and again behind the prompt that it is paired with."""
    limit = 14
    trainer = fit(unpaired_rows(8, seed=2), train=False, max_length=limit)
    prompts, completions = trainer.train_dataset["prompt_ids"][:], trainer.train_dataset["completion_ids"][:]
    assert any(len(p) + len(c) > limit for p, c in zip(prompts, completions, strict=True))
    sums = []
    for i, prompt in enumerate(prompts):
        j = (i + 1) % len(prompts)
        partner = completions[j][: limit - len(prompts[j])]
        ids = torch.tensor([(prompt + partner)[:limit]])
        log_ratio = 0.0
        for sign, model in ((1, trainer.model), (-1, trainer.ref_model)):
            with torch.no_grad():
                logps = model(ids).logits.double().log_softmax(-1)[0, :-1]
            log_ratio += sign * logps.gather(-1, ids[0, 1:, None]).squeeze(-1)[len(prompt) - 1 :].sum().item()
        sums.append(log_ratio)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.estimate_kl([batch]).item() == pytest.approx(max(sum(sums) / len(sums), 0), abs=1e-6)
    assert sum(sums) > 0, "a KL of 0 would equal anything below it"


# -- precomputed reference log-probs -------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [None, 14])
def test_precomputed_reference_equals_online_reference(fit, max_length):
    """With the whole data set in each step, the next row of the data set is also the partner inside the step."""
    data = unpaired_rows(8)
    online = fit(data, max_length=max_length)
    stored = fit(data, max_length=max_length, precompute_ref_log_probs=True)
    torch.testing.assert_close(weights(stored.model), weights(online.model), rtol=0, atol=1e-6)
    assert logged(stored, "kl")[0] == pytest.approx(logged(online, "kl")[0], abs=5e-6)


def test_precompute_works_with_shuffling_and_accumulation(fit):
    settings = {"precompute_ref_log_probs": True, "train_sampling_strategy": "random", "max_steps": 2}
    whole = fit(unpaired_rows(16), **settings)
    split = fit(unpaired_rows(16), **settings, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    torch.testing.assert_close(weights(split.model), weights(whole.model), rtol=0, atol=1e-6)
    assert logged(whole, "kl")[0][0] != 0


def test_precomputed_sums_are_refused_for_a_loss_that_may_read_tokens(fit):
    from halos_trl import UnpairedPreferenceTrainer

    class OwnTrainer(UnpairedPreferenceTrainer):
        pass

    with pytest.raises(ValueError, match="may read single tokens of the reference"):
        fit(unpaired_rows(8), OwnTrainer, precompute_ref_log_probs=True)


def test_precomputing_with_an_adapter_that_takes_base_weights_is_refused(fit):
    """TRL would store the log-probs of the base that is left, which is not what the policy starts from."""
    adapter = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="pissa")
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa'.*moves a part of the base weights"):
        fit(unpaired_rows(8), ref=None, peft_config=adapter, precompute_ref_log_probs=True)


# -- the reference -------------------------------------------------------------------------------------------------


def test_instance_with_changed_weights_is_its_own_reference(fit, model, tokenizer, make_config, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    from transformers import AutoModelForCausalLM

    changed = perturbed(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), scale=0.5)
    trainer = KTOTrainer(changed, args=make_config(KTOConfig, max_steps=1), train_dataset=unpaired_rows(8))
    trainer.train()
    assert logged(trainer, "rewards/chosen", "rewards/rejected", "kl") == [[0.0, 0.0, 0.0]]


# -- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end"])
def test_evaluation_inside_a_step_leaves_the_step_alone(fit, event):
    class EvaluateAt(transformers.TrainerCallback):
        def evaluate(self, args, state, control, **kwargs):
            self.trainer.evaluate(unpaired_rows(8, seed=1))

    callback = EvaluateAt()
    setattr(callback, event, callback.evaluate)
    split = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "beta": 0.5}
    undisturbed = fit(unpaired_rows(16), **split)
    disturbed = fit(unpaired_rows(16), **split, train=False, callbacks=[callback])
    callback.trainer = disturbed
    disturbed.train()
    assert torch.equal(weights(disturbed.model), weights(undisturbed.model))


def test_evaluation_estimates_kl_per_batch_and_accepts_raw_data(fit):
    trainer = fit(unpaired_rows(16), eval_dataset={"a": unpaired_rows(8, 1), "b": unpaired_rows(8, 2)}, train=False)
    metrics = trainer.evaluate()
    of_a, of_b = [entry["eval_kl"] for entry in trainer.state.log_history]
    raw = trainer.evaluate(unpaired_rows(8, 1))
    assert raw["eval_kl"] == of_a != of_b
    assert raw["eval_loss"] == metrics["eval_a_loss"]


# -- data formats --------------------------------------------------------------------------------------------------


def test_paired_data_is_unpaired(fit):
    trainer = fit(paired_rows(8), max_steps=1)
    assert len(trainer.train_dataset) == 16
    assert sum(trainer.train_dataset["label"]) == 8


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("prompts", [["a"], ["a" * 99, "a"]], ids=["one row", "one row left"])
def test_a_single_row_is_refused(fit, prompts, streaming):
    """Other bad rows: tests/test_rows.py."""
    data = datasets.Dataset.from_list([{"prompt": prompt, "completion": "b", "label": True} for prompt in prompts])
    with pytest.raises(ValueError, match="one row"):
        fit(data.to_iterable_dataset() if streaming else data, max_length=64)


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_dataset_is_refused(fit, streaming):
    data = datasets.IterableDataset.from_generator(lambda: iter(())) if streaming else unpaired_rows(2).select([])
    with pytest.raises(ValueError, match="train dataset is empty"):
        fit(data)


def test_pairs_with_a_label_of_their_own_keep_the_labels_of_their_sides(fit, said):
    """TRL lets the column stand in for what it makes of the pairs: all rows would be desirable."""
    data = paired_rows(4).add_column("label", [True] * 4).add_column("completion", [assistant("no")] * 4)
    trainer = fit(data, max_steps=1)
    assert sorted(trainer.train_dataset["label"]) == [False] * 4 + [True] * 4
    assert trainer.train_dataset["completion_ids"] == fit(paired_rows(4), train=False).train_dataset["completion_ids"]
    assert "have the columns ['completion', 'label'], which are ignored" in said()


def test_reasoning_counts_as_a_completion(fit):
    rows = unpaired_rows(4).to_list()
    for row in rows:
        row["completion"][0]["reasoning_content"] = "hm"
    rows[2]["completion"] = [{"role": "assistant", "content": "", "reasoning_content": "hm"}]
    fit(datasets.Dataset.from_list(rows), max_steps=1)


@pytest.mark.parametrize("streaming", [False, True])
def test_prompt_that_fills_max_length_is_dropped_and_counted(fit, said, streaming):
    rows = [{"prompt": "x" * n, "completion": " b", "label": n % 2 == 0} for n in (2, 60, 3, 70, 4, 5)]
    data = datasets.Dataset.from_list(rows)
    trainer = fit(data.to_iterable_dataset() if streaming else data, max_length=32, per_device_train_batch_size=2)
    if streaming:
        assert "Dropped 2 rows of the streamed train dataset so far" in said()
    else:
        assert "Dropped 2 of 6 rows of the train dataset (the first is row 1)" in said()
        assert len(trainer.train_dataset) == 4


def test_all_rows_dropped_is_an_error(fit):
    rows = [{"prompt": "x" * 99, "completion": " b", "label": True}] * 3
    with pytest.raises(ValueError, match="No row of the train dataset"):
        fit(datasets.Dataset.from_list(rows), max_length=32)


@pytest.mark.parametrize("label", [True, False])
def test_one_sided_batches_are_legal(fit, label):
    rows = [row | {"label": label} for row in unpaired_rows(8).to_list()]
    trainer = fit(datasets.Dataset.from_list(rows), learning_rate=1e-3)
    side, other = ("chosen", "rejected") if label else ("rejected", "chosen")
    last = trainer.state.log_history[2]
    assert last["loss"] > 0
    assert f"rewards/{side}" in last
    assert f"rewards/{other}" not in last
    assert torch.isfinite(weights(trainer.model)).all()


def test_step_of_one_example_is_refused(fit):
    with pytest.raises(ValueError, match="optimizer step has a single example"):
        fit(unpaired_rows(8), per_device_train_batch_size=1)
    fit(unpaired_rows(8), per_device_train_batch_size=1, loss_type="apo_zero_unpaired")


def test_evaluation_batch_of_one_example_is_refused(fit):
    settings = {"eval_strategy": "steps", "eval_dataset": unpaired_rows(4)}
    with pytest.raises(ValueError, match="evaluation batch has a single example"):
        fit(unpaired_rows(8), per_device_eval_batch_size=1, **settings)


def test_gradient_that_is_not_finite_never_reaches_the_weights(fit):
    """The loss is finite; the gradient of one weight is not, from the second step on."""
    trainer = fit(unpaired_rows(24), train=False)
    parameter = next(trainer.model.parameters())
    parameter.register_hook(lambda grad: grad.index_fill(0, torch.tensor(0), float("nan") if steps() else 0.0))

    def steps():
        return trainer.state.global_step

    with pytest.raises(ValueError, match="gradient's norm is nan at step 2"):
        trainer.train()
    assert torch.isfinite(weights(trainer.model)).all()


@pytest.mark.parametrize("adapter", [False, True])
def test_policy_as_reference_is_refused(model, tokenizer, make_config, adapter):
    policy = get_peft_model(model, LoraConfig(target_modules="all-linear")) if adapter else model
    with pytest.raises(ValueError, match="shares parameters"):
        KTOTrainer(policy, model, make_config(KTOConfig), train_dataset=unpaired_rows(8), processing_class=tokenizer)


@pytest.mark.parametrize("others", [[], ["default"]])
def test_active_adapter_of_another_name_is_refused(model, tokenizer, make_config, others):
    policy = get_peft_model(model, LoraConfig(target_modules="all-linear"), adapter_name="mine")
    for name in others:
        policy.add_adapter(name, LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"\['mine'\] is active.*must be called 'default'"):
        KTOTrainer(policy, args=make_config(KTOConfig), train_dataset=unpaired_rows(8), processing_class=tokenizer)


def test_trl_config_is_refused_with_the_import_to_use(model, tokenizer, make_config):
    with pytest.raises(ValueError, match=r"Use `halos_trl\.KTOConfig`, which extends it"):
        KTOTrainer(model, args=make_config(trl.KTOConfig), train_dataset=unpaired_rows(8), processing_class=tokenizer)


@pytest.mark.parametrize("which", ["policy", "reference"])
def test_nan_stops_at_its_step_and_never_reaches_the_weights(fit, which):
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1 and which == "policy":
                self.poison(model, model)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1 and which == "reference":
                self.poison(trainer.ref_model, model)

        def poison(self, target, model):
            target.model.norm.weight.data[0] = float("nan")
            self.before = weights(model).clone()

    poison = Poison()
    trainer = fit(unpaired_rows(24), train=False, callbacks=[poison])
    # A step begins after its KL estimate, so the loss meets the policy's NaN, and the estimate the reference's.
    message = {
        "policy": "The policy model returned .* NaN or infinite at step 2, in rows",
        "reference": "KL .* at step 2",
    }
    with pytest.raises(ValueError, match=message[which]):
        trainer.train()
    assert torch.equal(weights(trainer.model).nan_to_num(7.0), poison.before.nan_to_num(7.0))
