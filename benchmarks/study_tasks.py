"""The tasks of `humanline_study.py` and `methods.py`: prompts in disjoint splits, a small model, feedback.

Both put letters in order. `short` is the embedded task (4 to 6 letters). `long` has 7 to 9 letters and a shorter
supervised training, so that fewer samples of the start are right and feedback on them says less.
"""

import itertools
import random
import zlib
from dataclasses import asdict, dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from halos_trl.toy.cache import cached
from halos_trl.toy.model import Recipe, build_tokenizer, chunks, fit, render, user
from halos_trl.toy.task import ALPHABET

TOKENIZER = build_tokenizer()
# The split follows from the set of letters, so none is seen in two splits, not even in another order.
BUCKETS = {"sft": range(0, 12), "train": range(12, 16), "tune": range(16, 18), "test": range(18, 20)}


@dataclass(frozen=True)
class Task:
    """Letters to sort, the careless demonstrator's habits, and the model."""

    name: str
    lengths: tuple[int, ...]
    long: int
    steps: int
    hidden_size: int = 96
    leave_out_last: float = 0.6
    swap_neighbours: float = 0.25

    def prompts(self, n, seed, split):
        """`n` different prompts, always the same for the same arguments."""
        rng, found = random.Random(f"{self.name}-{split}-{seed}"), {}
        while len(found) < n:
            letters = "".join(rng.sample(ALPHABET, k=rng.choice(self.lengths)))
            if zlib.crc32("".join(sorted(letters)).encode()) % 20 in BUCKETS[split]:
                found[f"Sort {letters}"] = True
        return list(found)

    def right(self, prompt, completion):
        return completion.strip() == "".join(sorted(prompt.split()[1]))

    def careless_answer(self, prompt, rng):
        letters = sorted(prompt.split()[1])
        if len(letters) >= self.long and rng.random() < self.leave_out_last:
            letters.pop()
        if rng.random() < self.swap_neighbours:
            i = rng.randrange(len(letters) - 1)
            letters[i], letters[i + 1] = letters[i + 1], letters[i]
        return "".join(letters)

    def model(self, seed):
        """The supervised model, trained once and cached."""

        def build(directory):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = LlamaForCausalLM(_config(self.hidden_size))
            recipe, rng = Recipe(steps=self.steps), random.Random(f"slips-{seed}")
            prompts = self.prompts(recipe.steps * recipe.batch_size, seed, "sft")
            answers = [self.careless_answer(prompt, rng) for prompt in prompts]
            fit(model, TOKENIZER, prompts, answers, recipe, progress=False)
            model.save_pretrained(directory)

        key = {"task": asdict(self), "seed": seed}
        return AutoModelForCausalLM.from_pretrained(cached(f"study-{self.name}", None, build, **key))


def _config(hidden_size):
    return LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.pad_token_id,
    )  # fmt: skip


TASKS = {
    "short": Task("short", lengths=(4, 5, 6), long=5, steps=400),
    "long": Task("long", lengths=(7, 8, 9), long=7, steps=250),
}


@torch.no_grad()
def sample(model, prompts, seed):
    """One completion for each prompt, from the model as it is (temperature 1); the global random state is restored."""
    was_training = model.training
    model.eval()
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for texts in chunks(render(prompts, TOKENIZER), 1024):
            batch = TOKENIZER(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
            ids = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=True, top_k=0,
                top_p=1.0, max_new_tokens=12, pad_token_id=TOKENIZER.pad_token_id,
                eos_token_id=TOKENIZER.eos_token_id,
            )  # fmt: skip
            found += TOKENIZER.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return found


def accuracy(task, model, split, seed, n):
    """Share of right completions at temperature 1, one for each of `n` prompts of the split."""
    prompts = task.prompts(n, seed, split)
    completions = sample(model, prompts, seed)
    return sum(task.right(*pair) for pair in zip(prompts, completions, strict=True)) / n


SAMPLES = {"kto": 2, "dpo": 4, "grpo": 8}


def feedback(task, method, model, prompts, size, seed):
    """Up to `size` rows on samples of `model`, and how many prompts of the stream `prompts` that took.

    The prompts are taken in order. DPO's pairs are the first right and the first wrong of four samples; prompts
    without such a pair give no row, and at most four times `size` prompts are read.
    """
    per_prompt, rows, taken = SAMPLES[method], [], 0
    while len(rows) < size and taken < 4 * size:
        chunk = list(itertools.islice(prompts, 128 if method == "dpo" else -(-size // per_prompt)))
        repeated = [prompt for prompt in chunk for _ in range(per_prompt)]
        completions = sample(model, repeated, seed * 1_000_003 + taken)
        for i, prompt in enumerate(chunk):
            own = completions[i * per_prompt : (i + 1) * per_prompt]
            # trainers refuse a completion without a token; one sample in thousands
            if all(own):
                rows += _rows(task, method, prompt, own, f"{seed}-{taken + i}")
        taken += len(chunk)
    return rows[:size], taken


def _rows(task, method, prompt, completions, prompt_id):
    judged = [({"role": "assistant", "content": text}, task.right(prompt, text)) for text in completions]
    row = {"prompt": user(prompt)}
    if method == "kto":
        return [row | {"completion": [turn], "label": right} for turn, right in judged]
    if method == "grpo":
        return [row | {"completion": [turn], "score": float(right), "prompt_id": prompt_id} for turn, right in judged]
    chosen, rejected = ([turn for turn, right in judged if right is wanted] for wanted in (True, False))
    return [row | {"chosen": [good], "rejected": [bad]} for good, bad in zip(chosen[:1], rejected[:1], strict=False)]
