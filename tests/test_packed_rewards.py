"""Reward models on packed rows: the same scores, weights and log lines as on padded rows."""

import copy
import itertools

import pytest
import torch
from architectures import ARCHITECTURES, WRITTEN_OUT
from conftest import paired_rows, weights
from peft import LoraConfig
from policy_runs import scored
from test_packed_training import lines
from transformers import AutoConfig, AutoModelForSequenceClassification

from halos_trl import BradleyTerryConfig, BradleyTerryTrainer, toy
from halos_trl.forward.heads import read_wanted_scores
from halos_trl.forward.layout import Span, shared_prefix_layout
from halos_trl.forward.packing import give_packing, packing_of
from halos_trl.forward.rewards import score_sequences
from halos_trl.trainers.reward_scores import RewardModelScores


def batch_of(rows, pad=0):
    """A batch of token ids, padded on the right."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def layout_of(rows):
    batch = batch_of(rows)
    return shared_prefix_layout(batch["input_ids"], batch["attention_mask"], [len(row) - 1 for row in rows])


# -- the layout ----------------------------------------------------------------------------------------------------


def test_layout_of_two_pairs():
    layout = layout_of([[5, 6, 7, 8], [3, 4], [5, 6, 9], [3, 4, 1, 1]])
    # [3, 4] is the beginning of [3, 4, 1, 1]; [5, 6] that of the other two.
    assert layout.input_ids.tolist() == [[3, 4, 1, 1, 5, 6, 7, 8, 9]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 2]]
    assert layout.wanted.tolist() == [7, 1, 8, 3]
    assert layout.spans == [Span(0, 2, 0, 0), Span(2, 4, 0, 2), Span(4, 6, 0, 0), Span(6, 8, 4, 6), Span(8, 9, 4, 6)]


def test_equal_rows_stand_in_it_once():
    layout = layout_of([[5, 6, 7], [5, 6, 7], [4]])
    assert layout.input_ids.tolist() == [[4, 5, 6, 7]]
    assert layout.wanted.tolist() == [3, 3, 0]


def cost(group):
    """Tokens of a group whose rows share what all of them begin with."""
    shared = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*group, strict=False))))
    return shared + sum(len(row) - shared for row in group)


def test_groups_leave_the_fewest_tokens():
    """Of all ways to cut the sorted rows. Every row begins with 1, as with the header of a chat template."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = [[1, *torch.randint(2, 4, (n,), generator=generator).tolist()] for n in (1, 5, 3, 6, 4, 6)]
        ordered, cuts = sorted(rows), itertools.chain(*(itertools.combinations(range(1, 6), n) for n in range(6)))
        ways = [[ordered[a:b] for a, b in itertools.pairwise((0, *cut, 6))] for cut in cuts]
        assert layout_of(rows).input_ids.shape[1] == min(sum(map(cost, way)) for way in ways)


# -- one model -----------------------------------------------------------------------------------------------------


def classifier(name, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **ARCHITECTURES.get(name, ARCHITECTURES["llama"]) | settings, num_labels=1)
    attention = "eager" if name in WRITTEN_OUT else "sdpa"
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).eval()
    return model.float()


def rows_of(lengths, seed=0):
    """For each prompt its length and the lengths of what follows it."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(3, 512, (n,), generator=generator).tolist()

    return [prompt + ids(n) for length, more in lengths for prompt in [ids(length)] for n in more]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mistral", "gemma2", "opt", "phi3", "mixtral"])
def test_scores_and_gradients_are_those_of_padded_rows(name):
    padded = classifier(name)
    packed, batch = copy.deepcopy(padded), batch_of(rows_of([(30, [9, 21]), (12, [5, 9]), (7, [1])]))
    give_packing([packed], "on", read_wanted=read_wanted_scores)
    expected, scores = padded(**batch).logits, score_sequences(packed, batch).logits
    assert packing_of(packed).active and scores.shape == (5, 1)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    for result in (expected, scores):
        (result * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])[:, None]).sum().backward()
    for (parameter, p), q in zip(padded.named_parameters(), packed.parameters(), strict=True):
        if p.grad is not None:
            assert (p.grad - q.grad).norm() <= 1e-5 * max(1.0, p.grad.norm()), parameter


def test_padding_on_the_left():
    model, rows = classifier("llama"), rows_of([(30, [9, 21]), (12, [5, 9])])
    batch = batch_of(rows)
    expected = model(**batch).logits
    for column in batch.values():
        for i, row in enumerate(rows):
            column[i] = column[i].roll(column.shape[1] - len(row))
    give_packing([model], "on", read_wanted=read_wanted_scores)
    torch.testing.assert_close(score_sequences(model, batch).logits, expected, rtol=0, atol=1e-5)


def test_score_is_read_at_the_last_token_that_is_not_padding():
    """Also where the mask says that a padding token belongs to the row, as with an end-of-text token that pads."""
    model = classifier("llama", pad_token_id=2)
    batch = batch_of([[5, 6, 7, 2], [5, 6, 8, 9, 2]], pad=2)
    expected = model(**batch, use_cache=False).logits
    give_packing([model], "on", read_wanted=read_wanted_scores)
    torch.testing.assert_close(score_sequences(model, batch).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(torch.tensor([[5, 6, 7]])).logits[0], expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "reason"), [("bert", "no head `score`"), ("stablelm", "4 of its 4 layers")])
def test_classifier_that_cannot_is_given_padded_rows(name, reason, said):
    model, batch = classifier(name), batch_of(rows_of([(30, [9, 21])]))
    with torch.no_grad():
        expected = model(**batch).logits
        give_packing([model], "auto", read_wanted=read_wanted_scores)
        assert score_sequences(model, batch).logits.equal(expected)
    assert reason in said()


# -- training and scoring ------------------------------------------------------------------------------------------


def reward_model():
    config = toy.tiny_model(toy.build_tokenizer()).config
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoModelForSequenceClassification.from_config(config).float()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_three_steps(lora, make_config, tokenizer):
    def run(packed):
        args = make_config(
            BradleyTerryConfig, packed=packed, gradient_checkpointing=lora, center_rewards_coefficient=0.1,
            train_sampling_strategy="sequential", eval_strategy="steps", eval_steps=2,
        )  # fmt: skip
        trainer = BradleyTerryTrainer(
            reward_model(), args=args, train_dataset=paired_rows(24), eval_dataset=paired_rows(10, seed=1),
            processing_class=tokenizer, peft_config=LoraConfig(r=4, task_type="SEQ_CLS") if lora else None,
        )  # fmt: skip
        before = weights(trainer.model)
        trainer.train()
        assert packing_of(trainer.model).active == (packed != "off")
        assert not torch.equal(before, weights(trainer.model))
        return trainer

    packed, padded = run("on"), run("off")
    torch.testing.assert_close(weights(packed.model), weights(padded.model), rtol=0, atol=1e-6)
    times = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    for ours, theirs in zip(lines(packed), lines(padded), strict=True):
        ours, theirs = ({k: v for k, v in line.items() if k not in times} for line in (ours, theirs))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_scores_for_ppo(tokenizer):
    model, dataset = reward_model(), scored(6).remove_columns("score")
    scores = {}
    for packed in ("off", "on"):
        scores[packed] = RewardModelScores(model, tokenizer, batch_size=5, packed=packed)(dataset)
        assert packing_of(model).active == (packed == "on")
    assert scores["on"] == pytest.approx(scores["off"], abs=1e-6) and len(set(scores["on"])) > 1
