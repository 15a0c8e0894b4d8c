"""The task of sorting letters: prompts, correct answers, and demonstrations with errors."""

import random
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Literal, get_args

Split = Literal["sft", "feedback", "test"]

ALPHABET = "abcdefghijklmnopqrst"
LENGTHS = range(4, 7)
LONG = 5  # minimum number of letters for which demonstrations may omit the last letter
LEAVE_OUT_LAST = 0.6  # probability of omitting the last letter in long answers
SWAP_NEIGHBOURS = 0.25  # probability of swapping two neighbouring letters, in any answer

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"


def make_prompts(n: int, seed: int, split: Split) -> list[str]:
    """`n` different prompts of one split, deterministic for given arguments.

    The split of a prompt is determined by its answer, so a set of letters in one split never occurs in another split,
    in any order. With the same seed, a larger `n` extends the list of a smaller one.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}.")
    return list(islice(_prompt_stream(seed, split), n))


def answer(prompt: str) -> str:
    """The correct completion of a prompt: its letters in alphabetical order."""
    instruction, _, letters = prompt.strip().partition(" ")
    if instruction != "Sort" or not letters.isalpha():
        raise ValueError(f"A prompt of this task reads like 'Sort fatbm', got {prompt!r}.")
    return "".join(sorted(letters))


def verify(prompt: str, completion: str) -> bool:
    """Whether a completion is correct, ignoring surrounding white space, EOS and padding tokens."""
    return completion.replace(END, "").replace(PAD, "").strip() == answer(prompt)


def reward(prompt: str | list[dict[str, str]], completion: str) -> float:
    """1 for a correct completion, else 0; for `halos-trl label --reward_function halos_trl.toy:reward`.

    `prompt` is the text, or messages whose last one contains it.
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
