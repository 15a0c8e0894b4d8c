"""KTO's KL partners: each prompt gets a completion of another prompt if there is one, each completion is used once."""

import copy
import itertools

import datasets
import pytest
import torch
from conftest import assistant, paired_rows, perturbed, unpaired_rows, user, weights

from halos_trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, toy
from halos_trl._trl.unpaired import _OtherPrompts
from halos_trl.data import kl_partners
from halos_trl.data.kl_partners import Sequence


@pytest.fixture
def fit(model, tokenizer, make_config):
    def run(data, *, train=True, **overrides):
        trainer = KTOTrainer(
            model=copy.deepcopy(model),
            ref_model=perturbed(model, scale=0.05),
            args=make_config(KTOConfig, **({"train_sampling_strategy": "sequential", "max_steps": 2} | overrides)),
            train_dataset=data,
            processing_class=tokenizer,
        )
        if train:
            trainer.train()
        return trainer

    return run


def neighbours(prompts=8):
    """Each prompt twice in a row, with two completions."""
    rows = []
    for i, prompt in enumerate(toy.make_prompts(prompts, 3, "feedback")):
        for text in (toy.answer(prompt), toy.answer(prompt)[::-1] + "a" * (i + 1)):
            rows.append({"prompt": user(prompt), "completion": assistant(text), "label": not rows or i % 2 == 0})
    return datasets.Dataset.from_list(rows)


def one_prompt(n):
    return datasets.Dataset.from_list(
        [{"prompt": user("sort: cab"), "completion": assistant("a" * (i + 1)), "label": i % 2 == 0} for i in range(n)]
    )


# -- who is paired with whom ---------------------------------------------------------------------------------------


def test_partners_answer_other_prompts():
    """All ways to put up to six rows on up to four prompts."""
    for n in range(1, 7):
        for prompts in itertools.product("abcd", repeat=n):
            of_row = kl_partners.partners(prompts)
            if len(set(prompts)) == 1:
                assert of_row is None
                continue
            assert all(prompts[row] != prompts[partner] for row, partner in enumerate(of_row))
            if 2 * max(map(prompts.count, prompts)) <= n:
                assert sorted(of_row) == list(range(n)), "each completion once"
            if len(set(prompts)) == n:
                assert of_row == [*range(1, n), 0]


def test_rows_that_fill_the_last_step_of_two_processes():
    """Five rows in steps of eight: accelerate repeats the first three, and no copy may meet its original."""
    rows = [Sequence([i], [10 + i], [1]) for i in range(5)]
    whole = kl_partners.in_batch_order([[rows[:4]], [[rows[4], *rows[:3]]]])
    pairs = kl_partners.mismatch(whole)
    assert len(pairs) == 8
    assert all(pair.completion_ids != [10 + pair.prompt_ids[0]] for pair in pairs)


def test_turns_that_do_not_count_stay_where_they_are():
    """A masked turn inside of the completion is no part of the prompt."""
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
        "completion_mask": torch.tensor([[0, 0, 1, 0, 1, 0]]),
    }
    (sequence,) = kl_partners.split_sequences(batch)
    assert sequence == Sequence([1, 2], [3, 4, 5], [1, 0, 1])
    again = kl_partners.collate([sequence], pad_token_id=0, max_length=None, device="cpu")
    assert all(torch.equal(again[name], batch[name][:, :5]) for name in again)


# -- the estimate --------------------------------------------------------------------------------------------------


def summed_log_ratio(policy, reference, prompt, completion):
    ids = torch.tensor([prompt + completion])
    total = 0.0
    for sign, each in ((1, policy), (-1, reference)):
        with torch.no_grad():
            logps = each(ids).logits.double().log_softmax(-1)[0, :-1]
        total += sign * logps.gather(-1, ids[0, 1:, None]).squeeze(-1)[len(prompt) - 1 :].sum().item()
    return total


@pytest.mark.parametrize("stored", [False, True], ids=["in the step", "precomputed"])
def test_estimate_over_two_completions_of_each_prompt_written_out(fit, model, stored):
    """Prompt k's completions are paired with prompt k + 1, in order."""
    trainer = fit(neighbours(), train=False, per_device_train_batch_size=16, precompute_ref_log_probs=stored)
    pair = (model, perturbed(model, scale=0.05))
    rows = list(zip(trainer.train_dataset["prompt_ids"], trainer.train_dataset["completion_ids"], strict=True))
    other, same = (
        sum(summed_log_ratio(*pair, rows[i][0], rows[partner(i)][1]) for i in range(16)) / 16
        for partner in (lambda i: (i + 2) % 16, lambda i: (i + 1) % 16)
    )
    trainer.model.train()
    estimate = trainer.estimate_kl([next(iter(trainer.get_train_dataloader()))]).item()
    assert estimate == pytest.approx(max(other, 0), abs=5e-6)
    assert other > 0 and abs(other - same) > 1e-4, "the rotation by one would give another number"


def test_precomputed_partners_equal_those_of_a_whole_step(fit):
    settings = {"per_device_train_batch_size": 16}
    online, stored = fit(neighbours(), **settings), fit(neighbours(), precompute_ref_log_probs=True, **settings)
    torch.testing.assert_close(weights(stored.model), weights(online.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("stored", [False, True], ids=["in the step", "precomputed"])
def test_rows_of_one_prompt_do_not_count_and_a_warning_says_so(fit, said, stored):
    trainer = fit(one_prompt(16), precompute_ref_log_probs=stored)
    assert [entry["kl"] for entry in trainer.state.log_history if "kl" in entry] == [0.0, 0.0]
    assert torch.isfinite(weights(trainer.model)).all()
    assert ("no row counts" if stored else "so its KL term is 0") in said()


def test_images_of_one_prompt_do_not_count(said):
    """Rows 0 and 1 ask the same; row 2 asks the same about another image. The partner of row i is row i - 1."""
    rows = [{"prompt": "what?", "image": image, "completion": "c"} for image in ("cat", "cat", "dog")]
    batch = _OtherPrompts(lambda rows: {"KL_completion_mask": torch.ones(3, 2)})(rows)
    assert batch["KL_completion_mask"].sum(-1).tolist() == [2, 0, 2]
    assert "do not count" in said()


# -- columns of the user -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True], ids=["in the step", "precomputed"])
def test_own_columns_are_not_taken_for_ours(fit, said, stored):
    """A column that is called as TRL's partners or as the stored log-probs changes nothing, and is named."""
    data = unpaired_rows(16)
    foreign = data.add_column("KL_completion_ids", [[5, 6]] * 16).add_column("ref_logps", [7.0] * 16)
    plain, given = (fit(rows, precompute_ref_log_probs=stored) for rows in (data, foreign))
    torch.testing.assert_close(weights(given.model), weights(plain.model), rtol=0, atol=0)
    assert "['KL_completion_ids', 'ref_logps'] of the train dataset are ignored" in said()


def test_own_columns_of_pairs(model, tokenizer, make_config, said):
    data = paired_rows(8).add_column("ref_chosen_logps", [7.0] * 8).add_column("ref_rejected_logps", [1.0] * 8)
    trainer = DPOTrainer(
        model, None, make_config(DPOConfig, precompute_ref_log_probs=True, max_steps=1), train_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert "ref_chosen_logps" in said()


def test_partners_of_another_dataset_are_made_anew(fit, said):
    """A part of a prepared dataset: its stored partners belong to rows that are no longer there."""
    whole = fit(unpaired_rows(16), train=False, precompute_ref_log_probs=True)
    part = whole._prepare_dataset(whole.train_dataset.select(range(8)), whole.processing_class, whole.args, "part")
    assert list(part["KL_completion_ids"]) == [*part["completion_ids"][1:8], part["completion_ids"][0]]
    assert "ref_logps" not in part.column_names
    assert "so they are recomputed" in said()
