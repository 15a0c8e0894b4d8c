"""The task: letters to put in order, their right answer, and a careless demonstrator's."""

import random
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Literal, get_args

Split = Literal["sft", "feedback", "test"]

ALPHABET = "abcdefghijklmnopqrst"
LENGTHS = range(4, 7)
LONG = 5  # letters from which on the demonstrator's habit applies
LEAVE_OUT_LAST = 0.6  # how often he gives in to it
SWAP_NEIGHBOURS = 0.25  # how often he swaps two neighbours, in any answer

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"


def make_prompts(n: int, seed: int, split: Split) -> list[str]:
    """`n` different prompts of one split, always the same for the same arguments.

    The split of a prompt follows from its answer, so a set of letters seen in one split never occurs in another one,
    not even in another order. With the same seed, a larger `n` continues the list of a smaller one.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}.")
    return list(islice(_prompt_stream(seed, split), n))


def answer(prompt: str) -> str:
    """The right completion of a prompt: its letters in order."""
    instruction, _, letters = prompt.strip().partition(" ")
    if instruction != "Sort" or not letters.isalpha():
        raise ValueError(f"A prompt of this task reads like 'Sort fatbm', got {prompt!r}.")
    return "".join(sorted(letters))


def verify(prompt: str, completion: str) -> bool:
    """Whether a completion is right. White space around it, end and padding tokens do not count."""
    return completion.replace(END, "").replace(PAD, "").strip() == answer(prompt)


def reward(prompt: str | list[dict[str, str]], completion: str) -> float:
    """1 for a right completion, 0 for any other; for `halos-trl label --reward_function halos_trl.toy:reward`.

    `prompt` is the text, or the messages whose last one holds it.
    """
    return float(verify(prompt if isinstance(prompt, str) else prompt[-1]["content"], completion))


def _prompt_stream(seed: int, split: Split) -> Iterator[str]:
    rng = random.Random(f"{split}-{seed}")
    seen = set()
    while True:
        prompt = "Sort " + "".join(rng.sample(ALPHABET, k=rng.choice(LENGTHS)))
        if prompt not in seen and split_of(prompt) == split:
            seen.add(prompt)
            yield prompt


def split_of(prompt: str) -> Split:
    bucket = zlib.crc32(answer(prompt).encode()) % 10
    return "sft" if bucket < 6 else "feedback" if bucket < 8 else "test"


def careless_answer(prompt: str, rng: random.Random) -> str:
    letters = list(answer(prompt))
    if len(letters) >= LONG and rng.random() < LEAVE_OUT_LAST:
        letters.pop()
    if rng.random() < SWAP_NEIGHBOURS:
        i = rng.randrange(len(letters) - 1)
        letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)
