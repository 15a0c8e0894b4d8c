"""Every loss equals the numbers of the original HALOs code, stored in `data/losses.json` and `data/logps.json`.

A case holds inputs and expected outputs. `produce` computes, from the inputs, a dictionary with the same keys as the
expected one, so a statistic that nobody computes fails as loudly as a wrong one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from halos_trl import losses
from halos_trl.advantages import gae, group_advantages
from halos_trl.humanline import Humanline
from halos_trl.logprobs import masked_mean, masked_var, sequence_sum, token_entropy, token_logps
from halos_trl.records import GroupLogps, PairedLogps, PolicyStep, UnpairedLogps

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "losses.json").read_text())["cases"]
LOGPS = json.loads((DATA / "logps.json").read_text())["cases"]

RTOL, ATOL = 1e-6, 1e-11
# HALOs forms these as float32 quotients.
FLOAT32_KEYS = {"unclamped", "chosen_unclamped", "rejected_unclamped"}
# Statistics of the data, not of a loss: HALOs reads them off the labels.
NOT_OURS = {"group_size", "scores"}

# HALOs' IPO divides by the number of tokens whose clamped log-ratio is not exactly 0; ours by the number n of
# completion tokens. Where they differ, losses, rewards, margins, accuracies and gradients are derived here instead:
#
#     mean = sum / n      loss = (mean chosen - mean rejected - target)^2      target = 1 / (2 tau)
#     d(mean loss)/d(chosen token)   = +2 (mean chosen - mean rejected - target) / n / B
#     d(mean loss)/d(rejected token) = -2 (mean chosen - mean rejected - target) / n / B
#
# and 0 for a token strictly outside the bounds. Per row: (sum of the clamped log-ratios, n, columns outside).
REPLACED: dict[str, dict[str, Any]] = {
    "s-ipo-07": {  # humanline off; one token of five rows has log-ratio 0
        "target": 1 / 0.6,
        "chosen": [(-1.0, 1, ()), (-1 + 1.5 + 0 - 1.9702 - 0.0481 - 1.127, 6, ()), (-1 + 1.5, 2, ())],
        "rejected": [
            (-1 + 1.5, 2, ()),
            (-1 + 1.5 + 0 + 2.0934, 4, ()),
            (-1 + 1.5 + 0 - 0.9456 - 2.4121 + 0.1794, 6, ()),
        ],
    },
    "s-ipo-08": {  # bounds [-1, 1.5]: 2.1336 and 1.5301 become 1.5, -1.0517 becomes -1
        "target": 1 / 0.6,
        "chosen": [(-1 + 1.5 + 0 + 1.4223 - 0.7066 + 1.5, 6, (5,)), (-1.0, 1, ()), (-1 + 1.5 + 0, 3, ())],
        "rejected": [
            (-1 + 1.5, 2, ()),
            (-1 + 1.5 + 0 - 1 - 0.1875 + 1.5, 6, (3, 5)),
            (-1 + 1.5 + 0 + 1.2898 + 1.4907, 5, ()),
        ],
    },
    "s-ipo-09": {  # bounds [0, 1]: negative log-ratios become 0 and keep their place in n, 1.505 becomes 1
        "target": 2.0,
        "chosen": [(0.5 + 1, 5, (1, 2, 3, 4)), (0.5 + 0, 2, (2,)), (0.5, 1, ()), (0.5, 1, ())],
        "rejected": [
            (0.5 + 0.3969 + 0.0781, 5, (3, 4)),
            (0.5 + 0 + 0, 3, (2, 3)),
            (0.5 + 0 + 0, 3, (3, 4)),
            (0.5, 1, ()),
        ],
    },
}


def hand_derived(case: dict[str, Any]) -> dict[str, Any]:
    """The expected outputs of a replaced case; what does not depend on the length stays as it is."""
    rows = REPLACED[case["id"]]
    sides = {name: [total / n for total, n, _ in rows[name]] for name in ("chosen", "rejected")}
    margins = [c - r for c, r in zip(sides["chosen"], sides["rejected"], strict=True)]
    errors = [margin - rows["target"] for margin in margins]
    grad = {}
    for name, sign in (("chosen", 1), ("rejected", -1)):
        mask = case["inputs"][f"{name}_mask"]
        grad[f"policy_{name}_logps"] = [
            [sign * 2 * error / n / len(mask) * (m and t not in outside) for t, m in enumerate(row)]
            for row, error, (_, n, outside) in zip(mask, errors, rows[name], strict=True)
        ]
    return case["expected"] | {
        "losses": [error**2 for error in errors],
        "loss": sum(error**2 for error in errors) / len(errors),
        "chosen_rewards": sides["chosen"],
        "rejected_rewards": sides["rejected"],
        "margins": margins,
        "accuracies": [float(margin > 0) for margin in margins],
        "grad": grad,
    }


def tables(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Inputs as float64 tensors; an empty side is stored as [] and becomes (0, T)."""
    numeric = {k: v for k, v in inputs.items() if k.endswith(("logps", "mask", "values", "values_old", "logits"))}
    width = inputs.get("sequence_length", 0)
    return {
        name: torch.zeros(0, width, dtype=torch.float64) if value == [] else torch.tensor(value, dtype=torch.float64)
        for name, value in numeric.items()
    }


def paired(case: dict[str, Any], humanline: Humanline | None) -> dict[str, Any]:
    t = tables(case["inputs"])
    chosen, rejected = t["policy_chosen_logps"].requires_grad_(), t["policy_rejected_logps"].requires_grad_()
    record = PairedLogps(
        policy_chosen=chosen,
        policy_rejected=rejected,
        reference_chosen=t.get("reference_chosen_logps"),
        reference_rejected=t.get("reference_rejected_logps"),
        chosen_mask=t["chosen_mask"],
        rejected_mask=t["rejected_mask"],
    )
    out = getattr(losses, case["method"])(record, humanline=humanline, **case["params"])
    out.losses.mean().backward()
    return {
        "losses": out.losses,
        "loss": out.losses.mean(),
        "chosen_rewards": out.chosen_rewards,
        "rejected_rewards": out.rejected_rewards,
        "margins": out.chosen_rewards - out.rejected_rewards,
        "accuracies": out.chosen_rewards > out.rejected_rewards,
        "chosen_unclamped": out.metrics["unclamped/chosen"],
        "rejected_unclamped": out.metrics["unclamped/rejected"],
        "grad": {"policy_chosen_logps": chosen.grad, "policy_rejected_logps": rejected.grad},
    }


def kto(case: dict[str, Any], humanline: Humanline | None) -> dict[str, Any]:
    t, beta = tables(case["inputs"]), case["params"]["beta"]
    chosen, rejected = t["policy_chosen_logps"].requires_grad_(), t["policy_rejected_logps"].requires_grad_()
    kl_policy = t["policy_KL_logps"].requires_grad_()

    total, count = losses.kto_kl(kl_policy, t["reference_KL_logps"], t["KL_mask"], humanline)
    assert not total.requires_grad and not count.requires_grad
    if "other_rank_KL_mask" in t:
        other_total, other_count = losses.kto_kl(
            t["other_rank_policy_KL_logps"], t["other_rank_reference_KL_logps"], t["other_rank_KL_mask"], humanline
        )
        total, count = total + other_total, count + other_count
    kl = (total / count.clamp(min=1)).clamp(min=0)

    record = UnpairedLogps(
        policy=torch.cat([chosen, rejected]),
        reference=torch.cat([t["reference_chosen_logps"], t["reference_rejected_logps"]]),
        mask=torch.cat([t["chosen_mask"], t["rejected_mask"]]),
        desirable=torch.arange(len(chosen) + len(rejected)) < len(chosen),
    )
    out = losses.kto(record, kl=kl, humanline=humanline, **case["params"])
    out.losses.mean().backward()
    # HALOs' rewards carry no beta.
    chosen_rewards, rejected_rewards = out.chosen_rewards / beta, out.rejected_rewards / beta
    # An empty side has mean 0.
    means = [rewards.sum() / max(len(rewards), 1) for rewards in (chosen_rewards, rejected_rewards)]
    return {
        "losses": out.losses,
        "loss": out.losses.mean(),
        "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards,
        "KL": kl,
        "margin": means[0] - means[1],
        "chosen_unclamped": out.metrics["unclamped/chosen"],
        "rejected_unclamped": out.metrics["unclamped/rejected"],
        "grad": {
            "policy_chosen_logps": chosen.grad,
            "policy_rejected_logps": rejected.grad,
            "policy_KL_logps": kl_policy.grad,
        },
    }


def grpo(case: dict[str, Any], humanline: Humanline | None) -> dict[str, Any]:
    inputs, t = case["inputs"], tables(case["inputs"])
    policy, mask = t["policy_logps"].requires_grad_(), t["mask"]
    scores = torch.tensor(inputs["scores"] + inputs.get("other_rank_scores", []), dtype=torch.float64)
    group_ids = inputs["prompt_ids"] + inputs.get("other_rank_prompt_ids", [])
    advantages = group_advantages(scores, group_ids)[: len(policy)]
    record = GroupLogps(policy, t["reference_logps"], mask, advantages)
    out = losses.grpo(record, humanline=humanline, **case["params"])
    loss = out.losses.sum() / mask.sum()
    loss.backward()
    return {
        "advantages": advantages,
        "loss": loss,
        "KL": out.metrics["kl"],
        "weighted_advantage": out.metrics["weighted_advantage"],
        "mean_abs_advantage": out.metrics["mean_abs_advantage"],
        "unclamped": out.metrics["unclamped"],
        "grad": {"policy_logps": policy.grad},
    }


def ppo(case: dict[str, Any], humanline: Humanline | None) -> dict[str, Any]:
    t, params = tables(case["inputs"]), case["params"]
    policy, values, mask = t["policy_logps"].requires_grad_(), t["values"].requires_grad_(), t["mask"]
    # The score stands on the last completion token.
    last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(-1, keepdim=True)
    scores = torch.tensor(case["expected"]["scores"], dtype=torch.float64)
    rewards = torch.zeros_like(mask).scatter(1, last, scores.unsqueeze(-1))
    rollout = gae(t["values_old"], rewards, mask, gamma=params["gamma"], lam=params["lam"])
    step = PolicyStep(
        policy, t["reference_logps"], mask, values, rollout.advantages, rollout.discounted_future_rewards
    )
    weights = {"cliprange": params["cliprange"], "critic_coef": params["critic_coef"], "kl_coef": params["KL_coef"]}
    out = losses.ppo(step, humanline=humanline, **weights)
    loss = out.losses.sum() / mask.sum()
    loss.backward()
    # HALOs logs the values of the rollout, which are the current ones in the first epoch.
    first_epoch = losses.ppo(step._replace(values=t["values_old"]), humanline=humanline, **weights).metrics
    return {
        **rollout._asdict(),
        "loss": loss,
        **{name: out.metrics[name] for name in ("critic_loss", "policy_loss", "clipfrac", "policykl", "seqratio")},
        "unclamped": out.metrics["unclamped"],
        "values_mean": first_epoch["values_mean"],
        "values_var": first_epoch["values_var"],
        "returns_mean": masked_mean(rollout.returns, mask),
        "returns_var": masked_var(rollout.returns, mask),
        "entropy": masked_mean(token_entropy(t["logits"]), mask),
        "grad": {"policy_logps": policy.grad, "values": values.grad},
    }


PRODUCE = {"dpo": paired, "cdpo": paired, "ipo": paired, "simpo": paired, "slic": paired} | {
    "kto": kto,
    "grpo": grpo,
    "ppo": ppo,
}


def produce(case: dict[str, Any]) -> dict[str, Any]:
    bounds = case["humanline"]
    humanline = bounds and Humanline(bounds["log_epsilon_P"], bounds["log_epsilon_R"])
    return PRODUCE[case["method"]](case, humanline)


def assert_equal(name: str, got: Any, want: Any) -> None:
    if isinstance(want, dict):
        assert got.keys() == want.keys(), name
        for key, value in want.items():
            assert_equal(f"{name}.{key}", got[key], value)
    elif want is None:
        assert got is None, name
    else:
        want = torch.tensor(want, dtype=torch.float64)
        got = torch.as_tensor(got).detach()
        assert got.dtype in (torch.float64, torch.bool) or got.numel() == 1, f"{name} lost precision: {got.dtype}"
        # An empty table is stored as [], whatever its width.
        got = got.double().reshape(want.shape) if want.numel() == 0 == got.numel() else got.double()
        atol = 1e-6 if name in FLOAT32_KEYS else ATOL
        torch.testing.assert_close(got, want, rtol=RTOL, atol=atol, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_loss_equals_halos(case: dict[str, Any]) -> None:
    expected = hand_derived(case) if case["id"] in REPLACED else case["expected"]
    expected = {name: value for name, value in expected.items() if name not in NOT_OURS}
    got = produce(case)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_equal(name, got[name], value)


@pytest.mark.parametrize("case_id", REPLACED)
def test_only_cases_that_really_differ_are_replaced(case_id: str) -> None:
    case = next(case for case in CASES if case["id"] == case_id)
    with pytest.raises(AssertionError):
        assert_equal("losses", torch.tensor(hand_derived(case)["losses"]), case["expected"]["losses"])


def test_every_loss_has_golden_cases_with_and_without_humanline() -> None:
    covered = {(case["method"], case["humanline"] is not None) for case in CASES}
    public = set(losses.__all__) - {"kto_kl"}
    assert covered == {(name, humanline) for name in public for humanline in (False, True)}


@pytest.mark.parametrize("case", LOGPS, ids=[case["id"] for case in LOGPS])
def test_token_logps_equal_halos(case: dict[str, Any]) -> None:
    logits = torch.tensor(case["logits"], dtype=getattr(torch, case["logits_dtype"]))
    labels = torch.tensor(case["labels"])
    expected = {name: torch.tensor(value) for name, value in case["expected"].items()}
    got = token_logps(logits, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected["per_token_logps"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sequence_sum(got, labels[:, 1:] != -100), expected["sum"], rtol=1e-6, atol=1e-6)
    assert (got[labels[:, 1:] == -100] == 0).all()
