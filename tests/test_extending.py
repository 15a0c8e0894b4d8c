"""The methods in docs/custom_methods.md, extracted from the page and trained."""

import copy
import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import paired_rows, perturbed, unpaired_rows, weights
from policy_runs import scored

import halos_trl
from halos_trl import GRPOConfig, GRPOTrainer, KTOConfig, ScoredTrainer
from halos_trl.forward.score import score_tokens
from halos_trl.records import GroupLogps, LossOutput, PairedLogps, UnpairedLogps

ROOT = Path(__file__).parents[1]


def quoted(marker):
    """The Python block of the page that follows an HTML comment."""
    text = (ROOT / "docs" / "custom_methods.md").read_text()
    return re.search(rf"<!-- {re.escape(marker)} -->\n```python\n(.*?)```\n", text, flags=re.S).group(1)


def run_as_module(source, name, tmp_path):
    """Import source code as a module: dataclasses look their module up by name."""
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dummy_kto(tmp_path):
    return run_as_module(quoted("examples/custom_method.py"), "readme_dummy_kto", tmp_path).DummyKTOTrainer


@pytest.fixture
def margin(tmp_path):
    return run_as_module(quoted("paired method"), "readme_margin", tmp_path)


@pytest.fixture
def weighted(tmp_path):
    return run_as_module(quoted("scored method"), "readme_weighted", tmp_path)


@pytest.fixture
def fit(model, tokenizer, make_config):
    def run(trainer_class, config_class, data, *, train=True, **overrides):
        trainer = trainer_class(
            model=copy.deepcopy(model),
            ref_model=perturbed(model) if trainer_class.needs_reference else None,
            args=make_config(config_class, **({"train_sampling_strategy": "sequential"} | overrides)),
            train_dataset=data,
            processing_class=tokenizer,
        )
        if train:
            trainer.train()
        return trainer

    return run


def test_readme_quotes_the_example_file():
    assert quoted("examples/custom_method.py") == (ROOT / "examples" / "custom_method.py").read_text()


def test_dummy_kto_is_its_formula(fit, dummy_kto):
    """Two desirable rows of log-ratio 1 and 3, two undesirable of -1 and 2, one token each, beta 0.5."""
    trainer = fit(dummy_kto, KTOConfig, unpaired_rows(4), train=False, beta=0.5)
    ratios = torch.tensor([[1.0], [-1.0], [3.0], [2.0]], requires_grad=True)
    desirable = torch.tensor([True, False, True, False])
    output = trainer.loss(UnpairedLogps(ratios, torch.zeros(4, 1), torch.ones(4, 1), desirable))

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    desirable_kl, undesirable_kl = 2.0, 0.5  # (1 + 3) / 2 and (-1 + 2) / 2
    expected = [
        1 - sigmoid(0.5 * (1 - undesirable_kl)),
        1 - sigmoid(0.5 * (desirable_kl + 1)),
        1 - sigmoid(0.5 * (3 - undesirable_kl)),
        1 - sigmoid(0.5 * (desirable_kl - 2)),
    ]
    torch.testing.assert_close(output.losses.detach(), torch.tensor(expected))
    torch.testing.assert_close(output.chosen_rewards, torch.tensor([0.5, 1.5]))
    torch.testing.assert_close(output.rejected_rewards, torch.tensor([-0.5, 1.0]))
    output.losses.mean().backward()
    assert (ratios.grad[desirable] < 0).all(), "desirable rows are pushed up"
    assert (ratios.grad[~desirable] > 0).all()


@pytest.mark.parametrize("label", [True, False])
def test_dummy_kto_on_a_micro_batch_of_one_kind(fit, dummy_kto, label):
    trainer = fit(dummy_kto, KTOConfig, unpaired_rows(4), train=False)
    ratios = torch.ones(2, 1)
    output = trainer.loss(UnpairedLogps(ratios, 0 * ratios, ratios, torch.tensor([label, label])))
    assert torch.isfinite(output.losses).all()


def test_dummy_kto_trains_and_logs(fit, dummy_kto):
    trainer = fit(dummy_kto, KTOConfig, unpaired_rows(24), beta=0.5)
    first, *_, last = [e for e in trainer.state.log_history if "loss" in e]
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "entropy"} <= set(first)
    assert "kl" not in first, "it does not use the package's estimate"
    assert last["loss"] < first["loss"]
    assert last["rewards/margins"] > first["rewards/margins"]


def test_dummy_kto_under_humanline_and_with_an_adapter(model, tokenizer, make_config, dummy_kto):
    from peft import LoraConfig

    trainer = dummy_kto(
        copy.deepcopy(model), args=make_config(KTOConfig, humanline=True), train_dataset=unpaired_rows(24),
        processing_class=tokenizer, peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    steps = [e for e in trainer.state.log_history if "loss" in e]
    assert "unclamped" in steps[-1]
    assert steps[0]["rewards/chosen"] == 0.0


def test_flags_that_a_method_does_not_read_are_refused(fit, dummy_kto, margin, weighted):
    """They change nothing in these two losses, and would look as if they did."""
    for name, value in {"loss_type": "apo_zero_unpaired", "desirable_weight": 3.0, "undesirable_weight": 3.0}.items():
        with pytest.raises(ValueError, match=f"`{name}=.*has no effect: the loss of DummyKTOTrainer does not read"):
            fit(dummy_kto, KTOConfig, unpaired_rows(8), **{name: value})
    for name, value in {"loss_type": "ipo", "ld_alpha": 0.5, "use_weighting": True, "label_smoothing": 0.1}.items():
        with pytest.raises(ValueError, match=f"`{name}=.*has no effect: the loss of MarginTrainer does not read"):
            fit(margin.MarginTrainer, margin.MarginConfig, paired_rows(8), **{name: value})
    for name in ("sync_ref_model", "precompute_ref_log_probs"):
        with pytest.raises(ValueError, match=f"`{name}=True` has no effect: MarginTrainer uses no reference"):
            fit(margin.MarginTrainer, margin.MarginConfig, paired_rows(8), **{name: True})
    with pytest.raises(ValueError, match="the class does not declare that the loss of MarginTrainer clamps"):
        fit(margin.MarginTrainer, margin.MarginConfig, paired_rows(8), humanline=True)
    for name, value in {"epsilon": 0.2, "epsilon_high": 0.3, "sequence_level": True}.items():
        with pytest.raises(ValueError, match=f"`{name}=.*has no effect: the loss of WeightedTrainer does not read"):
            fit(weighted.WeightedTrainer, weighted.WeightedConfig, scored(4), **{name: value})


def test_what_was_said_of_a_loss_does_not_hold_for_the_one_that_replaces_it():
    class Own(halos_trl.DPOTrainer):
        def loss(self, record):
            raise NotImplementedError

    class Renamed(halos_trl.DPOTrainer):
        pass

    assert Renamed.takes_precomputed and Renamed.takes_humanline and "ld_alpha" in Renamed.takes_options
    assert not (Own.takes_precomputed or Own.takes_humanline or Own.takes_options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda output: output._replace(losses=output.losses[:, None] + output.losses),
            r"shape \(8, 8\); expected \(8,\)",
        ),
        (lambda output: output._replace(losses=output.losses.mean()), r"shape \(\); expected \(8,\)"),
        (lambda output: output._replace(metrics={"share": 0.5}), "metric 'share' as float"),
        (lambda output: output.losses, "`loss` returned Tensor"),
    ],
)
def test_what_a_loss_may_get_wrong_is_refused(fit, margin, wrong, message):
    class Wrong(margin.MarginTrainer):
        def loss(self, record):
            return wrong(super().loss(record))

    with pytest.raises(ValueError, match=message):
        fit(Wrong, margin.MarginConfig, paired_rows(8))


def test_metrics_of_ones_own_are_logged_whatever_their_name(fit, margin):
    class Measured(margin.MarginTrainer):
        def loss(self, record):
            return super().loss(record)._replace(metrics={"unclamped_tokens": torch.tensor(3.0)})

    trainer = fit(Measured, margin.MarginConfig, paired_rows(8), max_steps=1)
    assert trainer.state.log_history[0]["unclamped_tokens"] == 3.0


def test_paired_method_is_its_formula_and_trains(fit, margin):
    trainer = fit(margin.MarginTrainer, margin.MarginConfig, paired_rows(24), margin=2.0)
    assert trainer.ref_model is None
    record = PairedLogps(
        torch.tensor([[-1.0, -2.0]]), torch.tensor([[-4.0]]), None, None, torch.ones(1, 2), torch.ones(1, 1)
    )
    output = trainer.loss(record)
    assert output.losses.tolist() == [0.0]  # 2 + 1.5 - 4 < 0
    assert trainer.loss(record.swapped()).losses.tolist() == [4.5]  # 2 + 4 - 1.5
    first, *_, last = [e for e in trainer.state.log_history if "loss" in e]
    assert last["loss"] < first["loss"]


def test_scored_method_is_its_formula(fit, weighted):
    trainer = fit(weighted.WeightedTrainer, weighted.WeightedConfig, scored(4), train=False, temperature=2.0)
    record = GroupLogps(
        torch.tensor([[-1.0, -2.0], [-4.0, 9.0]]), None, torch.tensor([[1, 1], [1, 0]]), torch.tensor([2.0, -2.0])
    )
    output = trainer.loss(record)
    expected = [math.e * 1.5, 4.0 / math.e]  # exp(A / 2) times the negative mean log-prob
    torch.testing.assert_close(output.losses, torch.tensor(expected))
    assert output.metrics["weight"].item() == pytest.approx((math.e + 1 / math.e) / 2)


def test_scored_method_trains_and_logs_its_own_metrics(fit, weighted):
    trainer = fit(weighted.WeightedTrainer, weighted.WeightedConfig, scored(8), max_steps=12)
    assert trainer.ref_model is None
    first, *_, last = [e for e in trainer.state.log_history if "loss" in e]
    assert {"weight", "scores", "advantages/abs", "entropy"} <= set(first)
    assert not {"kl", "clip_fraction", "rewards/chosen"} & set(first)
    assert last["loss"] < first["loss"]


SPLITS = [(12, 1), (3, 4), (2, 6)]
"""Splits of a step of at most 12 rows; with groups of 3, 5, 2 and 4, the last one leaves micro-batches empty."""


def test_scored_losses_of_rows_are_averaged_over_the_rows_of_the_step(fit, weighted):
    """Whatever the split, and where micro-batches have no row; and the mean of the definition in float64."""
    settings = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    runs = [
        fit(
            weighted.WeightedTrainer, weighted.WeightedConfig, scored(4),
            per_device_train_batch_size=size, gradient_accumulation_steps=n, **settings,
        )
        for size, n in SPLITS
    ]  # fmt: skip
    first, *others = [[(e["loss"], e["weight"]) for e in run.state.log_history if "loss" in e] for run in runs]
    for run, lines in zip(runs[1:], others, strict=True):
        torch.testing.assert_close(torch.tensor(lines), torch.tensor(first), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights(run.model), weights(runs[0].model), rtol=0, atol=1e-6)
    start = fit(weighted.WeightedTrainer, weighted.WeightedConfig, scored(4), train=False)
    losses = []
    for index in next(iter(runs[0].get_train_dataloader().batch_sampler)):
        row = start.train_dataset[index]
        tokens = score_tokens(start.model, start.data_collator([row]))
        mean = tokens.logps_BT.double().sum() / tokens.mask_BT.sum()
        losses.append(-math.exp(row["advantage"]) * mean.item())
    assert len(losses) == 12
    assert first[0][0] == pytest.approx(sum(losses) / 12, rel=1e-5)


def test_a_loss_that_is_no_number_without_tokens_never_sees_such_a_row(fit):
    class Mean(ScoredTrainer):
        averages_over = "rows"

        def loss(self, record):
            means_B = (record.policy * record.mask).sum(-1) / record.mask.sum(-1)
            return LossOutput(-means_B, means_B[:0].detach(), means_B[:0].detach(), {"rows": means_B.mean().detach()})

    trainer = fit(Mean, GRPOConfig, scored(3), per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert all(math.isfinite(e[name]) for e in trainer.state.log_history if "loss" in e for name in ("loss", "rows"))


@pytest.mark.parametrize(
    ("unit", "shape", "message"),
    [
        ("tokens", "rows", r"shape \(8,\); expected \(8, \d+\), one loss for each token.*`averages_over = 'rows'`"),
        ("rows", "tokens", r"shape \(8, \d+\); expected \(8,\), one loss for each row.*`averages_over = 'tokens'`"),
        ("sequences", "rows", "`averages_over` of Own is 'sequences'. Use 'tokens'"),
    ],
)
def test_scored_losses_of_another_unit_are_refused(fit, unit, shape, message):
    class Own(GRPOTrainer):
        averages_over = unit

        def loss(self, record):
            output = super().loss(record)
            return output if shape == "tokens" else output._replace(losses=output.losses.sum(-1))

    with pytest.raises(ValueError, match=message):
        fit(Own, GRPOConfig, scored(4, sizes=(4,)))


def test_a_loss_of_ones_own_in_place_of_grpos_logs_its_own_metrics(fit):
    class Own(GRPOTrainer):
        def loss(self, record):
            losses_BT = -record.policy * record.advantages[:, None]
            none_B = losses_BT.detach().new_empty(0)
            return LossOutput(losses_BT, none_B, none_B, {"mine": torch.tensor(3.0)})

    trainer = fit(Own, GRPOConfig, scored(4), max_steps=1)
    assert trainer.state.log_history[0]["mine"] == 3.0
    assert "kl" not in trainer.state.log_history[0]


def test_card_of_ones_own_method_claims_no_paper(fit, dummy_kto, margin, tmp_path):
    for trainer_class, config_class, data, papers in (
        (dummy_kto, KTOConfig, unpaired_rows(8), ("2402.01306", "ethayarajh")),
        (margin.MarginTrainer, margin.MarginConfig, paired_rows(8), ("2305.18290", "rafailov")),
    ):
        trainer = fit(trainer_class, config_class, data, max_steps=1)
        trainer.create_model_card()
        card = (tmp_path / "out" / "README.md").read_text()
        assert f"**{trainer_class.__name__.removesuffix('Trainer')}**" in card
        assert not any(paper in card for paper in papers)
        assert not re.search(r"^- (kto|dpo)$", card, flags=re.M)


def test_a_method_without_a_loss_says_what_to_write(fit):
    from halos_trl import UnpairedPreferenceTrainer

    class Empty(UnpairedPreferenceTrainer):
        pass

    with pytest.raises(NotImplementedError, match="Empty must define"):
        fit(Empty, KTOConfig, unpaired_rows(8))
