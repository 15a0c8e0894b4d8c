"""Break the package in one place at a time, and check that tests fail.

    python tests/mutations.py                  # all of them
    python tests/mutations.py KTO humanline    # those whose name holds one of the words

Each mutation is made in a copy of the repository, on which the named tests then run. A mutation that no test notices
is reported, and makes the exit status 1.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

import peft  # noqa: F401  (with the two below most of what a run imports: the processes with the tests are forked)
import pytest
import torch  # noqa: F401
import trl  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
GOLDEN, KTO, PAIRED, HUMANLINE, PPO, TOKENS = (
    f"tests/test_{name}.py"
    for name in ("golden", "kto_trainer", "paired_trainers", "humanline_training", "ppo_trainer", "tokens")
)
LABELLING, ORDER, OUTPUT, PRECOMPUTE, REWARDS, SAMPLING = (
    f"tests/test_{name}.py"
    for name in ("labelling", "batch_order", "output_file", "precompute", "packed_rewards", "sampling")
)
# what is broken, file, text, its replacement, tests that have to notice
MUTATIONS = [
    ("KTO: sign of the desirable side", "losses/unpaired.py", "sigmoid(-gains_B)", "sigmoid(gains_B)", [GOLDEN]),
    ("KTO: no KL term in the loss", "losses/unpaired.py", "sums_B - (kl.detach()", "sums_B - 0 * (kl.detach()",
     [GOLDEN]),
    ("KTO: no KL estimate in the trainer", "trainers/unpaired.py", ".clamp(min=0)", ".clamp(min=0, max=0)", [KTO]),
    ("KTO: each example is its own partner", "data/kl_partners.py", "sequences[i]._replace(prompt_ids=row.prompt_ids)",
     "row", [KTO]),
    ("mask shifted by one token", "forward/score.py", '["completion_mask"][:, 1:].bool()',
     '["completion_mask"][:, :-1].bool()', [KTO]),
    ("every micro-batch weighs the same", "trainers/step.py", "mean_loss * share.weight", "mean_loss", [KTO]),
    ("DPO: sign", "losses/paired.py", "logsigmoid(chosen_B - rejected_B)", "logsigmoid(rejected_B - chosen_B)",
     [GOLDEN]),
    ("reference of an instance is re-loaded", "_trl/construct.py", "return _copy_of(policy)",
     "return load(path, *args, **kwargs)", [KTO]),
    ("humanline: reference follows after the step", "reference/sync.py", "def on_pre_optimizer_step",
     "def on_optimizer_step", [HUMANLINE]),
    ("humanline: checkpoints without the reference", "reference/checkpoint.py",
     'save_reference(tensors, folder, {"written": written})', "pass", [HUMANLINE]),
    ("humanline: bounds swapped", "humanline.py", "clamp(humanline.log_epsilon_p, humanline.log_epsilon_r)",
     "clamp(-humanline.log_epsilon_r, -humanline.log_epsilon_p)", [GOLDEN]),
    ("NaN is let through", "trainers/base.py", "not torch.isfinite(table).all()", "False", [KTO]),
    ("NaN gradients are let through", "_trl/finite.py", "math.isfinite(value)", "True", [KTO]),
    ("KTO: partners are not cut", "trainers/unpaired.py", "max_length=self.args.max_length", "max_length=None", [KTO]),
    ("KTO: the KL of a micro-batch", "trainers/loss.py", "if share is None else share.prepared", "", [KTO]),
    ("precomputed log-probs of another setting", "_trl/precompute.py",
     '"arguments": {name: str(getattr(self.args, name, None)) for name in _ARGUMENTS},', "", [PAIRED]),
    ("precomputed log-probs in another precision", "_trl/host.py", "self.accelerator.autocast(),", "",
     [PRECOMPUTE]),
    ("humanline: PiSSA edits the base twice", "_trl/adapters.py", "config.init_lora_weights = True", "pass",
     [HUMANLINE]),
    ("PPO: gamma and lambda swapped", "trainers/ppo.py", "gamma=self.args.gamma,\n            lam=self.args.lam,",
     "gamma=self.args.lam,\n            lam=self.args.gamma,", [PPO]),
    ("PPO: values one position late", "_trl/value.py", "hidden_BSH[:, :-1]", "hidden_BSH[:, 1:]", [PPO]),
    ("what was done to rows is not said", "_trl/rows.py", "logger.warning(_sentence(note, which, texts))\n    kept",
     "pass\n    kept", [TOKENS]),
    ("a repeated prompt is left in", "data/turns.py", "completion = completion[len(prompt) :]", "pass", [TOKENS]),
    ("other turns are trained on", "data/collators.py", "mask_S[at] = torch", "_ = torch", [TOKENS]),
    ("a turn ends one token early", "data/turns.py", "mask[start:end] =", "mask[start : end - 1] =", [TOKENS]),
    ("a prefill is closed", "data/turns.py", "return Turns(prompt, completion, continues,",
     "return Turns(prompt, completion, False,", [TOKENS]),
    ("BOS stands twice", "data/tokens.py", "ids[self.repeats_bos(text) :", "ids[0:", [TOKENS]),
    ("EOS stands twice", "data/tokens.py", "len(ids) - self.adds_eos", "len(ids)", [TOKENS]),
    ("partners are scored on other turns", "_trl/unpaired.py", "if self._assistant_only:", "if False:", [TOKENS]),
    ("stored log-probs one token late", "reference/stored.py", "stored_BW.gather(1, column_BT)",
     "stored_BW.roll(1, 1).gather(1, column_BT)", [PRECOMPUTE]),
    ("reward models read the token before the last", "forward/layout.py", "wanted = [positions[b][stop] for",
     "wanted = [positions[b][max(stop - 1, 0)] for", [REWARDS]),
    ("HALOs' batches: each epoch has the order of the first", "data/halos/batches.py", "for _ in range(self.epoch):",
     "for _ in range(0):", [ORDER]),
    ("HALOs' batches: the step of PPO is not repeated", "data/halos/batches.py", "for batch in step * self.repeats",
     "for batch in step", [ORDER]),
    ("labels: a score at the threshold is undesirable", "data/labelling.py", "score >= bound", "score > bound",
     [LABELLING]),
    ("labels: equal scores are a preference", "data/labelling.py", "return difference > 0 and", "return", [LABELLING]),
    ("sampling: a resumed run draws other samples", "sampling.py", "range(skip // size * size,", "range(skip,",
     [SAMPLING]),
    ("sampling: the seed is not read", "sampling.py", "_seed(self.settings.seed, number, batch)",
     "_seed(0, number, batch)", [SAMPLING]),
    ("a resumed file keeps half a line", "cli/output.py", "file.truncate(end)", "pass", [OUTPUT]),
]  # fmt: skip


def run_tests(folder: Path, tests: list[str]) -> None:
    """In a process of their own, whose exit status is pytest's."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))


def is_noticed(folder: Path, file: str, old: str, new: str, tests: list[str]) -> bool:
    path = folder / "halos_trl" / file
    source = path.read_text()
    if source.count(old) != 1:
        raise RuntimeError(f"{file} holds {old!r} {source.count(old)} times; a mutation needs it once")
    path.write_text(source.replace(old, new))
    try:
        process = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, tests))
        process.start()
        process.join()
        return process.exitcode == pytest.ExitCode.TESTS_FAILED
    finally:
        path.write_text(source)


def main(words: list[str]) -> int:
    chosen = [mutation for mutation in MUTATIONS if not words or any(word in mutation[0] for word in words)]
    unnoticed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".*_cache", "outputs", "wandb"))
        for name, *mutation in chosen:
            noticed = is_noticed(folder, *mutation)
            unnoticed += not noticed
            print(f"{'noticed ' if noticed else 'UNNOTICED'}  {name}", flush=True)
    print(f"{unnoticed} of {len(chosen)} mutations went unnoticed")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
