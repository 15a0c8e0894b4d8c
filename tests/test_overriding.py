"""Methods of TRL and transformers that users override have the same effect as in a subclass of TRL's trainer."""

import copy

import pytest
import torch
import trl
from conftest import paired_rows, perturbed, unpaired_rows, weights
from policy_runs import build, scored
from transformers import LlamaForSequenceClassification

import halos_trl

TRAINERS = {
    "DPO": (halos_trl.DPOTrainer, halos_trl.DPOConfig, paired_rows, {}),
    "DPO, a loss of TRL": (halos_trl.DPOTrainer, halos_trl.DPOConfig, paired_rows, {"loss_type": "robust"}),
    "cDPO": (halos_trl.CDPOTrainer, halos_trl.CDPOConfig, paired_rows, {}),
    "IPO": (halos_trl.IPOTrainer, halos_trl.IPOConfig, paired_rows, {}),
    "SimPO": (halos_trl.SimPOTrainer, halos_trl.SimPOConfig, paired_rows, {}),
    "SLiC": (halos_trl.SLiCTrainer, halos_trl.SLiCConfig, paired_rows, {}),
    "KTO": (halos_trl.KTOTrainer, halos_trl.KTOConfig, unpaired_rows, {}),
    "GRPO": (halos_trl.GRPOTrainer, halos_trl.GRPOConfig, lambda n: scored(n // 2, sizes=(2,)), {}),
    "PPO": (halos_trl.PPOTrainer, halos_trl.PPOConfig, lambda n: scored(n // 2, sizes=(2,)), {}),
    "Bradley-Terry": (halos_trl.BradleyTerryTrainer, halos_trl.BradleyTerryConfig, paired_rows, {}),
}
HOSTS = {"DPO": trl.DPOTrainer, "KTO": trl.KTOTrainer, "Bradley-Terry": trl.RewardTrainer}
"""TRL's own class of the same method."""

SPLITS = [(8, 1), (2, 4)]
"""Two splits of an optimizer step of eight examples."""


@pytest.fixture
def fit(model, tokenizer, make_config):
    """`fit("DPO", override=mixin, size=2, accumulate=4)`: two steps of a subclass with the mixin in front."""

    def run(name, override=object, *, host=None, size=8, accumulate=1, train=True, rows=16, max_steps=2, **settings):
        trainer_class, config_class, make_rows, options = TRAINERS[name]
        base = host or trainer_class
        subclass = type("Mine", (override, base) if override is not object else (base,), {})
        config = make_config(
            config_class if host is None else getattr(trl, host.__name__.replace("Trainer", "Config")),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            train_sampling_strategy="sequential",
            max_steps=max_steps,
            **options,
            **settings,
        )
        data = make_rows(rows)
        if name in ("GRPO", "PPO"):
            trainer = build(subclass, config, model, tokenizer, data)
        else:
            policy = scorer(model) if name == "Bradley-Terry" else copy.deepcopy(model)
            has_reference = getattr(subclass, "needs_reference", name != "Bradley-Terry")
            reference = {"ref_model": perturbed(model)} if has_reference else {}
            trainer = subclass(
                model=policy, args=config, train_dataset=data, eval_dataset=data.select(range(5)),
                processing_class=tokenizer, **reference,
            )  # fmt: skip
        if train:
            trainer.train()
        return trainer

    return run


def scorer(model):
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return LlamaForSequenceClassification(config).float().eval()


def log_lines(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class OwnLoss:
    """A mean over rows that knows nothing of the trainer."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        weight = inputs["attention_mask"] / inputs["attention_mask"].sum(-1, keepdim=True)
        loss = (
            (logits.float().flatten(2).logsumexp(-1) * weight).sum(-1).mean() if logits.dim() == 3 else logits.mean()
        )
        return (loss, {}) if return_outputs else loss


@pytest.mark.parametrize("name", ["DPO", "KTO", "PPO", "Bradley-Terry"])
def test_own_loss_is_averaged_over_micro_batches(fit, name):
    whole, split = (fit(name, OwnLoss, size=size, accumulate=n) for size, n in SPLITS)
    assert log_lines(split) == pytest.approx(log_lines(whole), rel=1e-5)
    torch.testing.assert_close(weights(split.model), weights(whole.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", HOSTS)
def test_own_loss_gives_trls_run(fit, name):
    ours, theirs = fit(name, OwnLoss, size=2, accumulate=4), fit(name, OwnLoss, host=HOSTS[name], size=2, accumulate=4)
    assert log_lines(ours) == pytest.approx(log_lines(theirs), rel=1e-6)
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=0, atol=1e-7)


class Regularized:
    """TRL's pattern: the trainer's loss and a term of one's own, here of the weights alone."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        squares = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
        return (loss[0] + 0.01 * squares, loss[1]) if return_outputs else loss + 0.01 * squares


@pytest.mark.parametrize("name", ["DPO, a loss of TRL", "KTO", "GRPO", "Bradley-Terry"])
def test_term_added_to_the_trainers_loss_counts_once(fit, name):
    whole, split = (fit(name, Regularized, size=size, accumulate=n) for size, n in SPLITS)
    assert log_lines(split) == pytest.approx(log_lines(whole), rel=1e-5)
    torch.testing.assert_close(weights(split.model), weights(whole.model), rtol=0, atol=1e-6)
    plain = fit(name, max_steps=1)
    start = fit(name, train=False).model
    added = 0.01 * sum(p.double().square().sum().item() for p in start.parameters())
    assert log_lines(whole)[0] == pytest.approx(log_lines(plain)[0] + added, rel=1e-4)


class Halved:
    """The private half of TRL's `compute_loss`, which people override all the same."""

    def _compute_loss(self, model, inputs, return_outputs):
        result = super()._compute_loss(model, inputs, return_outputs)
        return (result[0] / 2, result[1]) if return_outputs else result / 2


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO"])
def test_private_half_of_compute_loss_is_called(fit, name):
    plain, halved = fit(name, max_steps=1), fit(name, Halved, max_steps=1)
    assert log_lines(halved)[0] == pytest.approx(log_lines(plain)[0] / 2, rel=1e-6)


@pytest.mark.parametrize("name", TRAINERS)
def test_mean_of_two_losses_of_a_batch_gives_the_weights_of_one(fit, name):
    """R-Drop's pattern: a second call changes neither the number, nor what the step goes on to do."""
    seen = []

    class Twice:
        def compute_loss(self, model, inputs, *args, **kwargs):
            losses = [super(Twice, self).compute_loss(model, inputs, *args, **kwargs) for _ in range(2)]
            seen.append([loss.item() for loss in losses])
            return (losses[0] + losses[1]) / 2

    called = fit(name, Twice, size=2, accumulate=4, max_steps=2)
    once = fit(name, size=2, accumulate=4, max_steps=2)
    assert len(seen) == 8 and all(first == second for first, second in seen)
    # The halves of a gradient are added to it one by one, so the last digit may differ.
    torch.testing.assert_close(weights(called.model), weights(once.model), rtol=0, atol=1e-7)
    for twice, single in zip(called.state.log_history, once.state.log_history, strict=True):
        # Tokens are counted where they are seen, as in TRL.
        same = [key for key in single if key != "num_tokens" and "runtime" not in key and "per_second" not in key]
        assert {key: twice[key] for key in same} == pytest.approx({key: single[key] for key in same}, abs=1e-5)


def test_reward_model_may_be_called_with_the_whole_batch(fit):
    """`model(**inputs)`, as TRL's reward trainer does."""

    class Whole:
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            chosen, rejected = model(**inputs, use_cache=False).logits[:, 0].chunk(2)
            return -torch.nn.functional.logsigmoid(chosen - rejected).mean()

    mine, own = fit("Bradley-Terry", Whole, size=2, accumulate=4), fit("Bradley-Terry", size=2, accumulate=4)
    torch.testing.assert_close(weights(mine.model), weights(own.model), rtol=0, atol=1e-6)


OVERRIDABLE = (
    "training_step", "get_batch_samples", "log", "evaluate", "prediction_step", "evaluation_loop", "create_optimizer",
    "create_scheduler", "get_train_dataloader", "get_eval_dataloader", "compute_loss", "save_model",
    "_prepare_dataset", "_save_checkpoint", "create_model_card",
)  # fmt: skip


@pytest.mark.parametrize("name", ["DPO", "KTO", "PPO", "Bradley-Terry"])
def test_methods_that_are_documented_for_overriding_are_called(fit, name):
    called = set()

    def passing_on(method):
        def override(self, *args, **kwargs):
            called.add(method)
            return getattr(super(recorder, self), method)(*args, **kwargs)

        return override

    recorder = type("Recorder", (), {})
    for method in OVERRIDABLE:
        setattr(recorder, method, passing_on(method))
    settings = {"size": 2, "accumulate": 2, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    mine, plain = fit(name, recorder, **settings), fit(name, **settings)
    for trainer in (mine, plain):
        trainer.evaluate(trainer.eval_dataset or trainer.train_dataset)
    assert called == set(OVERRIDABLE)
    torch.testing.assert_close(weights(mine.model), weights(plain.model), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["DPO", "KTO", "PPO"])
def test_own_get_batch_samples_without_the_trainers(fit, name):
    """Then a batch stands for itself, as in TRL: the mean of the micro-batches' means, and no error."""

    class Mine:
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            return [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)], None

    trainer = fit(name, Mine, size=4, accumulate=2)
    assert len(log_lines(trainer)) == 2
    if name == "DPO":  # equal micro-batches, and nothing that belongs to the whole step
        torch.testing.assert_close(
            weights(trainer.model), weights(fit(name, size=4, accumulate=2).model), rtol=0, atol=1e-6
        )
