"""Cases of the fuzz suite: a valid run, with one or two changes determined by the case's number."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from halos_trl import toy

TRAINERS = ("DPO", "KTO", "GRPO", "PPO", "BradleyTerry", "SimPO", "CDPO", "IPO", "SLiC")
KINDS = {"KTO": "unpaired", "GRPO": "scored", "PPO": "scored", "BradleyTerry": "reward"}
"""What the rows of a trainer are; those of the others are pairs."""

CHANGE_COUNTS = (1, 1, 1, 2, 2)


@dataclass
class Case:
    """The inputs of one run."""

    number: int
    trainer: str
    rows: list[dict[str, Any]]
    form: str
    settings: dict[str, Any]
    changes: list[Change] = field(default_factory=list)
    dataset: Callable[[list], Any] | None = None
    """Creates a dataset of the rows; None: a `datasets.Dataset` if possible, else a stream."""
    tokenizer: Callable[[], Any] | None = None
    model: Callable[[], Any] | None = None
    arguments: dict[str, Callable[[Case], Any]] = field(default_factory=dict)
    train_arguments: dict[str, Any] = field(default_factory=dict)
    evaluates: bool = False
    leaves_rows_out: bool = False

    @property
    def kind(self) -> str:
        return KINDS.get(self.trainer, "paired")


@dataclass(frozen=True)
class Change:
    """One departure from a run that works."""

    what: str
    """For the reader: what is changed into what."""
    apply: Callable[[Case], None]
    names: tuple[str, ...]
    """Regular expressions, one of which an error about it has to match: the row or the argument."""
    learns: bool = True
    """Whether weights have to move where the run trains."""
    trains: bool = True
    """Whether the run may train; False if training would mean that the input was misinterpreted."""
    hosts_speak: bool = False
    """Whether a message of transformers, TRL or PEFT is good enough: it must name the argument."""


# -- rows that work ------------------------------------------------------------------------------------------------


def user(text: Any) -> list:
    return [{"role": "user", "content": text}]


def assistant(text: Any) -> list:
    return [{"role": "assistant", "content": text}]


FORMS = {
    "paired": ("explicit", "implicit"),
    "reward": ("explicit", "implicit"),
    "unpaired": ("labelled", "labelled", "explicit"),
    "scored": ("scored", "scored", "lists", "labelled", "explicit"),
}


def rows_of(form: str, conversational: bool, seed: int) -> list[dict[str, Any]]:
    """Six rows, or three with lists. Every prompt has a correct and a wrong completion."""
    prompts = toy.make_prompts(6, seed, "feedback")
    as_prompt, as_completion = (user, assistant) if conversational else (str, str)
    answers = [(as_prompt(p), as_completion(toy.answer(p)), as_completion(toy.answer(p)[::-1] + "a")) for p in prompts]
    if form == "explicit":
        return [{"prompt": p, "chosen": right, "rejected": wrong} for p, right, wrong in answers]
    if form == "implicit":
        return [{"chosen": p + right, "rejected": p + wrong} for p, right, wrong in answers]
    if form == "lists":
        return [{"prompt": p, "completions": [right, wrong], "scores": [1.0, 0.0]} for p, right, wrong in answers[:3]]
    name, values = ("score", (1.0, 0.0)) if form == "scored" else ("label", (True, False))
    return [
        {"prompt": p, "completion": side, name: value}
        for p, *sides in answers[:3]
        for side, value in zip(sides, values, strict=True)
    ]


SETTINGS: dict[str, Any] = {
    "max_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}


def make_case(number: int) -> Case:
    """Deterministic for a given number."""
    import fuzz_objects
    import fuzz_rows
    import fuzz_settings

    rng = random.Random(f"case {number}")
    trainer = TRAINERS[number % len(TRAINERS)]
    form = rng.choice(FORMS[KINDS.get(trainer, "paired")])
    conversational = rng.random() < 0.6
    case = Case(number, trainer, rows_of(form, conversational, number), form, dict(SETTINGS))
    case.evaluates = rng.random() < 0.15
    dimensions = (
        (fuzz_rows.values, 30),
        (fuzz_rows.columns, 8),
        (fuzz_rows.containers, 8),
        (fuzz_settings.settings, 22),
        (fuzz_objects.tokenizers, 10),
        (fuzz_objects.models, 10),
        (fuzz_objects.arguments, 12),
    )
    makers, weights = zip(*dimensions, strict=True)
    count = CHANGE_COUNTS[number // len(TRAINERS) % len(CHANGE_COUNTS)]
    for maker in weighted_sample(rng, makers, weights, count):
        change = maker(rng, case)
        change.apply(case)
        case.changes.append(change)
    return case


def weighted_sample(rng: random.Random, items: tuple, weights: tuple, count: int) -> list:
    """`count` different items, in their own order: rows are changed before what is made of them."""
    taken: list = []
    while len(taken) < count:
        item = rng.choices(items, weights)[0]
        if item not in taken:
            taken.append(item)
    return sorted(taken, key=items.index)
