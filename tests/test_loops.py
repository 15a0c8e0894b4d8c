"""Training and evaluation loops: sums are reset, means are over rows, no runs without a step, data loader settings."""

import copy
import re

import datasets
import pytest
import torch
from conftest import paired_rows, perturbed, unpaired_rows, weights
from policy_runs import scored
from test_overriding import scorer

import halos_trl

TRAINERS = {
    "DPO": (halos_trl.DPOTrainer, halos_trl.DPOConfig, paired_rows, {}),
    "DPO, a loss of TRL": (halos_trl.DPOTrainer, halos_trl.DPOConfig, paired_rows, {"loss_type": "robust"}),
    "KTO": (halos_trl.KTOTrainer, halos_trl.KTOConfig, unpaired_rows, {"loss_type": "apo_zero_unpaired"}),
    "GRPO": (halos_trl.GRPOTrainer, halos_trl.GRPOConfig, lambda n: scored(n // 2, sizes=(2,)), {}),
    "PPO": (halos_trl.PPOTrainer, halos_trl.PPOConfig, lambda n: scored(n // 2, sizes=(2,)), {}),
    "Bradley-Terry": (halos_trl.BradleyTerryTrainer, halos_trl.BradleyTerryConfig, paired_rows, {}),
}


@pytest.fixture
def make(model, tokenizer, make_config):
    """An untrained trainer of a method, evaluated on other rows than it is trained on."""

    def of(name, *, rows=24, data=None, base=None, data_collator=None, eval_dataset="other", **settings):
        trainer_class, config_class, make_rows, options = TRAINERS[name]
        config = make_config(
            config_class, **({"train_sampling_strategy": "sequential", "learning_rate": 0.0} | options | settings)
        )
        evaluated = make_rows(12).select(range(4, 11)) if eval_dataset == "other" else eval_dataset
        policy = scorer(model) if name == "Bradley-Terry" else copy.deepcopy(model)
        return (base or trainer_class)(
            model=policy,
            args=config,
            train_dataset=make_rows(rows) if data is None else data,
            eval_dataset=evaluated,
            processing_class=tokenizer,
            data_collator=data_collator,
            **({} if name == "Bradley-Terry" else {"ref_model": perturbed(model)}),
        )

    return of


TIMES = re.compile("runtime|per_second|preparation|^epoch$|^step$|flos")


def numbers(entry):
    return {name: value for name, value in entry.items() if not TIMES.search(name)}


def lines(trainer):
    return [numbers(entry) for entry in trainer.state.log_history if "loss" in entry]


# -- sums of another run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DPO, a loss of TRL", "KTO", "PPO", "Bradley-Terry"])
def test_evaluation_after_a_prediction_is_the_evaluation_alone(make, name):
    trainer = make(name, per_device_eval_batch_size=4)
    alone = numbers(trainer.evaluate())
    trainer.predict(trainer.train_dataset)
    assert numbers(trainer.evaluate()) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("name", ["DPO", "KTO", "PPO", "Bradley-Terry"])
def test_second_run_logs_what_the_first_did(make, name):
    """With a learning rate of 0 they are alike. The first ends in an evaluation, with a step that no line reports."""
    trainer = make(name, max_steps=3, logging_steps=2, eval_strategy="steps", eval_steps=3)
    trainer.train()
    first = lines(trainer)
    trainer.train()
    tokens = [line.pop("num_tokens") for line in (*first, *lines(trainer))]
    for once, again in zip(first, lines(trainer), strict=True):
        again.pop("num_tokens")
        assert again == pytest.approx(once, rel=1e-6)
    assert len(tokens) == 2 * len(first) and tokens == sorted(tokens)


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO"])
def test_run_that_was_out_of_memory_once_logs_as_one_that_was_not(make, name):
    class Large(TRAINERS[name][0]):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.state.global_step == 1 and self._train_batch_size > 7:
                raise RuntimeError("CUDA out of memory.")
            return loss

    settings = {"max_steps": 2, "logging_steps": 2, "seed": 7}
    retried = make(name, base=Large, auto_find_batch_size=True, **settings)
    retried.train()
    plain = make(name, per_device_train_batch_size=retried._train_batch_size, **settings)
    plain.train()
    assert retried._train_batch_size <= 7
    assert [line == pytest.approx(other, rel=1e-6) for line, other in zip(lines(retried), lines(plain), strict=True)]
    assert lines(retried)[0]["num_tokens"] == lines(plain)[0]["num_tokens"]


@pytest.mark.parametrize("name", TRAINERS)
def test_log_lines_hold_every_step_once_whatever_their_number(make, name):
    """Steps of equal size at a learning rate of 0, with losses computed twice: a line of n steps shows their mean."""
    size = 4 if name in ("GRPO", "PPO") else 3  # whole groups of two; as many desirable rows in each step
    data = datasets.concatenate_datasets([TRAINERS[name][2](24).select(range(2 * size))] * (12 // size))
    if "prompt_id" in data.column_names:
        data = data.remove_columns("prompt_id").add_column("prompt_id", [i // 2 for i in range(24)])

    def run(every):
        trainer = make(name, data=data, per_device_train_batch_size=size, max_steps=6, logging_steps=every)
        compute_loss = trainer.compute_loss

        def twice(*args, **how):
            compute_loss(*args, **how)
            return compute_loss(*args, **how)

        trainer.compute_loss = twice
        trainer.train()
        return lines(trainer)

    single = run(1)
    tokens = [line.pop("num_tokens") for line in single]
    assert tokens[3] == 2 * tokens[1] and tokens[5] == 3 * tokens[1]
    for every in (2, 6):
        found = run(every)
        assert [line.pop("num_tokens") for line in found] == tokens[every - 1 :: every]
        for name_ in found[0].keys() - {"grad_norm"}:
            means = [sum(line[name_] for line in single[i : i + every]) / every for i in range(0, 6, every)]
            if name_ in TOTALS:
                assert [line[name_] for line in found] == pytest.approx(means, rel=1e-5, abs=1e-7), name_


TOTALS = ("loss", "logps/chosen", "logps/rejected", "rewards/margins", "scores", "mean_reward", "margin", "accuracy")
"""Means over as many rows in every step."""


@pytest.mark.parametrize("name", TRAINERS)
def test_tokens_are_counted_on_after_a_resume(make, name, tmp_path):
    """Resumed behind a step that no log line had reported yet."""
    settings = {
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 2,
        "per_device_train_batch_size": 4,
    }
    whole = make(name, output_dir=str(tmp_path / "run"), **settings)
    whole.train()
    again = make(name, output_dir=str(tmp_path / "run"), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for trainer in (whole, again):
        assert trainer.state.log_history[-1]["step"] == 5
    found, expected = (
        [line["num_tokens"] for line in trainer.state.log_history if "loss" in line] for trainer in (again, whole)
    )
    assert found == expected and len(set(found)) == len(found)


# -- means over rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DPO", "DPO, a loss of TRL", "KTO", "Bradley-Terry"])
def test_loss_of_a_streamed_set_is_the_mean_over_its_rows(make, name):
    """Seven rows in batches of two: the last one holds a single row."""
    rows = TRAINERS[name][2](12).select(range(4, 11))
    whole = make(name, eval_dataset=rows, per_device_eval_batch_size=7).evaluate()["eval_loss"]
    each = [make(name, eval_dataset=rows.select([i]), per_device_eval_batch_size=1) for i in range(7)]
    assert sum(t.evaluate()["eval_loss"] for t in each) / 7 == pytest.approx(whole, rel=1e-5)
    for data in (rows, rows.to_iterable_dataset()):
        trainer = make(name, eval_dataset=data, per_device_eval_batch_size=2)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-5)
        assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(whole, rel=1e-5)


def test_own_prediction_step_decides_the_evaluation_loss(make):
    class Doubled(halos_trl.DPOTrainer):
        def prediction_step(self, *args, **kwargs):
            loss, logits, labels = super().prediction_step(*args, **kwargs)
            return 2 * loss, logits, labels

    once, twice = make("DPO").evaluate()["eval_loss"], make("DPO", base=Doubled).evaluate()["eval_loss"]
    assert twice == pytest.approx(2 * once, rel=1e-6)


# -- runs of zero steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DPO", "GRPO", "Bradley-Terry"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, "`max_steps=0` allows no optimizer step"),
        ({"max_steps": -1, "num_train_epochs": 0}, "`num_train_epochs=0` without `max_steps`"),
        ({"dataloader_drop_last": True, "rows": 6}, "drops batches of fewer than 8 rows"),
    ],
    ids=["steps", "epochs", "drop_last"],
)
def test_settings_without_a_step_are_refused(make, name, settings, message):
    if name in ("GRPO", "PPO") and "dataloader_drop_last" in settings:
        message = "`dataloader_drop_last=True` cannot work"  # no batch is full where groups stay whole
    with pytest.raises(ValueError, match=re.escape(message)):
        make(name, **settings).train()


def test_stream_of_no_row_is_refused(make):
    stream = unpaired_rows(8).to_iterable_dataset()
    trainer = make("KTO", data=stream)
    trainer.train_dataset = trainer.train_dataset.filter(lambda row: False)
    with pytest.raises(ValueError, match="yields no batch"):
        trainer.train()


def test_evaluation_without_a_batch_is_refused(make):
    with pytest.raises(ValueError, match="drops batches of fewer than 8 rows"):
        make("DPO", dataloader_drop_last=True, per_device_eval_batch_size=8).evaluate()


# -- settings of the loader ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["KTO", "PPO", "Bradley-Terry"])
def test_every_setting_reaches_the_loader(make, name):
    settings = {
        "num_workers": 2,
        "prefetch_factor": 3,
        "persistent_workers": True,
        "pin_memory": False,
        "multiprocessing_context": "fork",
        "in_order": False,
    }
    config = TRAINERS[name][1]
    known = {f"dataloader_{k}": v for k, v in settings.items() if f"dataloader_{k}" in config.__dataclass_fields__}
    assert len(known) >= 5
    trainer = make(name, **known)
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        for setting, value in known.items():
            found = getattr(loader, setting.removeprefix("dataloader_"))
            found = found.get_start_method() if setting.endswith("context") else found
            assert found == value, setting
    fields = {field for field in config.__dataclass_fields__ if field.startswith("dataloader_")}
    assert fields == {f"dataloader_{k}" for k in settings} & fields | {"dataloader_drop_last"}, "a new setting"


@pytest.mark.parametrize("name", ["GRPO", "PPO"])
def test_own_collator_sees_the_columns_that_were_kept(make, name):
    data = TRAINERS[name][2](24)
    data = data.add_column("source", [f"row {i}" for i in range(len(data))])
    seen = []

    class Recording:
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, rows):
            seen.extend(row["source"] for row in rows)
            return self.inner(rows)

    inner = make(name).data_collator.collate_tokens
    trainer = make(name, data=data, data_collator=Recording(inner), remove_unused_columns=False, max_steps=3)
    trainer.train()
    assert len(seen) >= 24 and set(seen) == {f"row {i}" for i in range(24)}
    plain = make(name, data=data, max_steps=3)
    plain.train()
    torch.testing.assert_close(weights(trainer.model), weights(plain.model), rtol=0, atol=0)


def test_split_batches_is_refused_where_groups_stay_whole(make):
    with pytest.raises(ValueError, match="split_batches"):
        make("GRPO", accelerator_config={"split_batches": True})
