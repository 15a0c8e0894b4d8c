"""Scored rows of the toy task, and training runs of GRPO and PPO on them."""

import copy
import random

import datasets
from conftest import assistant, perturbed, user

from halos_trl import GRPOTrainer, toy


def scored(n_prompts, sizes=(3, 5, 2, 4), seed=0, **columns):
    """Conversational groups of several sizes, with scores between 0 and 1."""
    rng = random.Random(seed)
    rows = []
    for i, prompt in enumerate(toy.make_prompts(n_prompts, seed, "feedback")):
        for j in range(sizes[i % len(sizes)]):
            text = toy.answer(prompt) if rng.random() < 0.5 else toy.answer(prompt)[::-1] + "a" * j
            rows.append(
                {"prompt": user(prompt), "completion": assistant(text), "score": rng.random(), "prompt_id": i}
                | columns
            )
    return datasets.Dataset.from_list(rows)


# Far enough from the reference, and tight enough a clip, that every term of the losses has a say.
GRPO = {"epsilon": 0.05, "beta": 0.1}
PPO = {"cliprange": 0.05, "kl_coef": 0.1, "critic_coef": 0.5}


def build(trainer_class, config, model, tokenizer, data, *, ref="near", **kwargs):
    """A trainer of a copy of `model`, whose reference differs from it unless another is given."""
    return trainer_class(
        model=copy.deepcopy(model),
        ref_model=perturbed(model) if ref == "near" else ref,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        **kwargs,
    )


def settings_of(trainer_class):
    return GRPO if issubclass(trainer_class, GRPOTrainer) else PPO


def logged(trainer, *names):
    return [[entry.get(name) for name in names] for entry in trainer.state.log_history if "loss" in entry]
