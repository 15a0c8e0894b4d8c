"""GRPO with the sampling model as the old policy: stored tokens and log-probs, from `halos-trl sample` to the loss."""

import json
import math
import re

import datasets
import pytest
import torch
from conftest import assistant, perturbed, user
from policy_runs import build

from halos_trl import GRPOConfig, GRPOTrainer, load_feedback, toy
from halos_trl.cli import convert, label, sample
from halos_trl.losses import grpo
from halos_trl.records import GroupLogps

COLUMNS = ("token_ids", "logprobs")


@pytest.fixture
def build_on(model, tokenizer, make_config):
    def run(data, *, ref="near", **overrides):
        config = make_config(GRPOConfig, **({"old_policy": "sampler"} | overrides))
        return build(GRPOTrainer, config, model, tokenizer, data, ref=ref)

    return run


@pytest.fixture
def rows(tokenizer):
    """Two groups. Tokens that the chat template would not give: cut off, and without what it writes at the end."""
    texts = [["ab", "ba", "b"], ["cd", "dc"]]
    found = []
    for number, group in enumerate(texts):
        for place, text in enumerate(group):
            ids = tokenizer(text)["input_ids"] + ([tokenizer.eos_token_id] if place else [])
            found.append(
                {"prompt": user(f"sort: {'ab' if number == 0 else 'cd'}"), "completion": assistant(text)}
                | {"score": float(place), "token_ids": ids, "logprobs": [-0.5 - 0.25 * i for i in range(len(ids))]}
            )
    return found


# -- the loss ------------------------------------------------------------------------------------------------------


def test_the_ratio_is_to_the_sampler_and_the_penalty_to_the_reference():
    """One token, A = 1: ratio e^0.1 is clipped to 1.05; the penalty is k3 of -0.2, e^0.2 - 1 - 0.2."""
    table = lambda value: torch.tensor([[value]], dtype=torch.float64)  # noqa: E731
    policy = table(-1.0).requires_grad_()
    record = GroupLogps(policy, table(-0.8), table(1.0), torch.ones(1, dtype=torch.float64), table(-1.1))
    out = grpo(record, epsilon=0.05, beta=2.0)
    assert out.losses.item() == pytest.approx(-1.05 + 2 * (math.exp(0.2) - 1.2), abs=1e-12)
    assert out.metrics["kl"].item() == pytest.approx(math.exp(0.2) - 1.2, abs=1e-12)
    assert out.metrics["weighted_advantage"].item() == pytest.approx(math.exp(0.1), abs=1e-12)
    out.losses.sum().backward()  # the clip holds; of the penalty, 2 (1 - e^0.2)
    assert policy.grad.item() == pytest.approx(2 * (1 - math.exp(0.2)), abs=1e-12)
    wide = grpo(record, epsilon=0.5, beta=0.0).losses.item()
    assert wide == pytest.approx(-math.exp(0.1), abs=1e-12)


# -- the trainer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["rows", "lists"])
@pytest.mark.parametrize("packed", ["auto", "off"])
def test_stored_tokens_and_log_probs_reach_the_loss(build_on, rows, tokenizer, form, packed):
    data = rows if form == "rows" else as_lists(rows)
    trainer = build_on(
        datasets.Dataset.from_list(data), packed=packed, train_sampling_strategy="sequential", max_length=16
    )
    batch = next(iter(trainer.get_train_dataloader()))
    seen = {}

    def loss(record):
        seen["record"] = record
        return GRPOTrainer.loss(trainer, record)

    trainer.loss = loss
    trainer.compute_loss(trainer.model, batch)
    record = seen["record"]
    for row, ids, mask, old, policy in zip(
        rows, batch["input_ids"], record.mask.bool(), record.old_policy, record.policy, strict=True
    ):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        kept = row["token_ids"][: 16 - len(prompt)]
        assert ids[: len(prompt)].tolist() == prompt and ids[1:][mask].tolist() == kept
        assert old[mask].tolist() == row["logprobs"][: len(kept)] and not old[~mask].any()
        logits = trainer.model(input_ids=torch.tensor([prompt + kept])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(kept)[:, None])[:, 0]
        torch.testing.assert_close(policy[mask], expected, rtol=0, atol=1e-5)


def as_lists(rows):
    groups = {}
    for row in rows:
        group = groups.setdefault(row["prompt"][0]["content"], {"prompt": row["prompt"]})
        for column, name in [("completion", "completions"), ("score", "scores"), *zip(COLUMNS, COLUMNS, strict=True)]:
            group.setdefault(name, []).append(row[column])
    return list(groups.values())


def test_without_the_switch_the_columns_change_nothing(build_on, rows):
    bare = [{name: value for name, value in row.items() if name not in COLUMNS} for row in rows]
    losses = []
    for data in (rows, bare, as_lists(rows)):
        trainer = build_on(
            datasets.Dataset.from_list(data), old_policy="reference", train_sampling_strategy="sequential"
        )
        assert not set(COLUMNS) & set(trainer.train_dataset.column_names)
        losses.append(trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).item())
    assert losses[0] == losses[1] == losses[2]


def test_precomputed_reference_and_evaluation(build_on, rows):
    data = datasets.Dataset.from_list(rows)
    live, stored = (build_on(data, precompute_ref_log_probs=where, max_steps=1) for where in (False, True))
    for trainer in (live, stored):
        trainer.train()
    first = [trainer.state.log_history[0] for trainer in (live, stored)]
    for name in ("loss", "kl", "sampling_logp_difference"):
        assert first[0][name] == pytest.approx(first[1][name], abs=1e-6)
    assert live.evaluate(data)["eval_sampling_logp_difference"] > 0


# -- from the command to the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, form", [("scalar", "halos"), ("groups", "trl"), ("binary", "trl")])
def test_sampled_and_labelled_rows_begin_with_a_ratio_of_one(model, tokenizer, build_on, tmp_path, kind, form):
    """Sampled by the model that is trained, from a reference that differs: the first ratios are 1."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompts = [{"prompt": user(text)} for text in toy.make_prompts(3, 0, "feedback")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "reward.py").write_text("def score(completion): return len(completion)\n")
    samples, feedback = str(tmp_path / "samples.jsonl"), str(tmp_path / "feedback.jsonl")
    sample.main(
        [
            *("--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "prompts.jsonl")),
            *("--output", samples, "--num_samples_per_prompt", "4", "--max_tokens", "5", "--logprobs", "true"),
            *("--temperature", "0.9", "--engine", "transformers"),
        ]
    )
    reward = f"{tmp_path / 'reward.py'}:score"
    label.main(
        [
            *("--samples", samples, "--output", feedback, "--reward_function", reward),
            *("--feedback", kind, "--format", form),
        ]
    )
    data = load_feedback(feedback, "group")
    if form == "trl":
        data = datasets.load_dataset("json", data_files=feedback, split="train")
    trainer = build_on(data, ref=perturbed(model), per_device_train_batch_size=12, max_steps=1)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["sampling_logp_difference"] < 1e-5 and first["clip_fraction"] == 0 and first["kl"] > 1e-4
    assert first["weighted_advantage"] == pytest.approx(mean_advantage(trainer), abs=1e-5)
    convert.main(["--input", feedback, "--output", str(tmp_path / "items.json"), "--format", "halos"])
    items = json.loads((tmp_path / "items.json").read_text())
    ids = [json.loads(line)["token_ids"] for line in open(samples)]
    assert all(item["token_ids"] in ids and len(item["token_ids"]) == len(item["logprobs"]) for item in items)


def mean_advantage(trainer):
    """The mean of |A| over tokens: what `weighted_advantage` is where every ratio is 1."""
    weights = [(len(row["completion_ids"]), abs(row["advantage"])) for row in trainer.train_dataset]
    return sum(n * a for n, a in weights) / sum(n for n, _ in weights)


# -- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, said",
    [
        ({"token_ids": None}, "Row 1 of the train dataset has `token_ids` None"),
        ({"logprobs": None}, "Row 1 of the train dataset has `logprobs` None"),
        ({"logprobs": [-1.0]}, "Row 1 of the train dataset has 3 `token_ids` and 1 `logprobs`"),
        ({"logprobs": [-1.0, math.nan, -1.0]}, "Row 1 of the train dataset has nan at position 1 of its `logprobs`"),
        ({"logprobs": [-1.0, -math.inf, -1.0]}, "has -inf at position 1"),
        ({"logprobs": [-1.0, 0.5, -1.0]}, "has 0.5 at position 1"),
        ({"completion": assistant("xyz")}, "Row 1 of the train dataset has the completion 'xyz', but its `token_ids`"),
        ({"completion": assistant("ba") + user("more")}, "a completion of 2 turns"),
    ],
)
def test_rows_that_do_not_fit_are_named(build_on, rows, change, said):
    rows[1] |= change
    with pytest.raises(ValueError, match=re.escape(said)):
        build_on(datasets.Dataset.from_list(rows))
    dropped = build_on(datasets.Dataset.from_list(rows), drop_invalid_rows=True)
    assert len(dropped.train_dataset) == len(rows) - 1
    if "token_ids" not in change:
        nested = as_lists(rows)
        with pytest.raises(ValueError, match=r"Row [01] of the train dataset has"):
            build_on(datasets.Dataset.from_list(nested))


def test_settings_and_data_that_cannot_work(build_on, rows, make_config):
    bare = [{name: value for name, value in row.items() if name not in COLUMNS} for row in rows]
    with pytest.raises(ValueError, match=r"`old_policy='sampler'` requires .* the train dataset has columns"):
        build_on(datasets.Dataset.from_list(bare))
    for other in ({"humanline": True}, {"batch_order": "halos"}):
        with pytest.raises(ValueError, match="`old_policy='sampler'` cannot work"):
            make_config(GRPOConfig, old_policy="sampler", **other)
    with pytest.raises(ValueError, match="old_policy"):
        make_config(GRPOConfig, old_policy="samplers")


def test_feedback_files_name_the_item(tmp_path, rows):
    items = [
        {"prompt": r["prompt"], "completion": r["completion"], "score": 1.0} | {c: r[c] for c in COLUMNS} for r in rows
    ]
    items[2]["logprobs"] = items[2]["logprobs"][:-1]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    with pytest.raises(ValueError, match=r"item 2 \(line 3\) has 2 `token_ids` and 1 `logprobs`"):
        load_feedback(path, "group")
