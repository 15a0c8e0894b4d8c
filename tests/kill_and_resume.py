"""Kill a training run with SIGKILL at a random moment, resume it, and compare with an uninterrupted run.

    python tests/kill_and_resume.py --points 12      # 12 kill points for each of DPO and KTO, full and LoRA

Every run moves its reference (humanline), draws its data at random and accumulates over two micro-batches. Equal means
bit for bit: the weights and the reference.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch
from conftest import paired_rows, unpaired_rows, weights
from peft import LoraConfig
from transformers import TrainerCallback

from halos_trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, toy

STEPS, SAVE_STEPS = 8, 2
EVENTS = (
    "on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_save",
    "before_model_file", "within_model_file",
)  # fmt: skip
WHILE_SAVING = ("before_model_file", "within_model_file")
"""Events inside of a checkpoint's writing: its first file is there, or its model file is there by half."""


class KillAt(TrainerCallback):
    """SIGKILL at one event of one step."""

    def __init__(self, event, step):
        self.step = step
        if event not in WHILE_SAVING:
            setattr(self, event, self.kill)

    def kill(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_while_saving(trainer, event, step):
    """Let the trainer die inside of the checkpoint of one step."""
    method = "before_checkpoint" if event == "before_model_file" else "_save"
    write = getattr(trainer, method)

    def write_and_die(folder, *args, **kwargs):
        write(folder, *args, **kwargs)
        if trainer.state.global_step == step:
            if event == "within_model_file":
                for file in Path(folder).glob("*model.safetensors"):  # the model's, or the adapter's
                    os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(trainer, method, write_and_die)


def make_trainer(method, adapter, output_dir, callbacks=None):
    tokenizer = toy.build_tokenizer()
    trainer_class, config_class, rows = {
        "dpo": (DPOTrainer, DPOConfig, paired_rows),
        "kto": (KTOTrainer, KTOConfig, unpaired_rows),
    }[method]
    args = config_class(
        output_dir=str(output_dir),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        humanline=True,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        log_level="error",
    )
    return trainer_class(
        toy.tiny_model(tokenizer),
        args=args,
        train_dataset=rows(24),
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter == "lora" else None,
    )


def train_until_killed(method, adapter, output_dir, event, step):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # the process never comes back
    trainer = make_trainer(method, adapter, output_dir, [KillAt(event, step)])
    if event in WHILE_SAVING:
        kill_while_saving(trainer, event, step)
    trainer.train()


def end_of(trainer):
    reference = trainer.reference.tensors(trainer.model)
    return weights(trainer.model), {name: t.detach().clone() for name, t in reference.items()}


def uninterrupted(method, adapter, folder):
    trainer = make_trainer(method, adapter, folder)
    trainer.train()
    return end_of(trainer)


def kill_point(rng):
    event = rng.choice(EVENTS)
    # At least one checkpoint lies behind, else there is nothing to resume from; a step ends before it is saved.
    if event == "on_save" or event in WHILE_SAVING:
        # Nothing is left to resume once the last checkpoint is complete.
        return event, rng.choice(range(2 * SAVE_STEPS, STEPS + (event in WHILE_SAVING), SAVE_STEPS))
    return event, rng.randrange(SAVE_STEPS + (event == "on_step_end"), STEPS)


def run_until_killed(target, *arguments):
    """Run it in a process of its own. Raises where that does not end by SIGKILL."""
    # Forked, since a new interpreter takes seconds to import everything. With GPUs, autograd's threads forbid it.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    process = context.Process(target=target, args=arguments)
    process.start()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"{arguments} was to be killed, but ended with {process.exitcode}")


def killed_and_resumed(method, adapter, folder, event, step):
    """The end of a run that was killed and resumed."""
    run_until_killed(train_until_killed, method, adapter, str(folder), event, step)
    trainer = make_trainer(method, adapter, folder)
    trainer.train(resume_from_checkpoint=True)
    return end_of(trainer)


def equal(one, other):
    return torch.equal(one[0], other[0]) and all(torch.equal(one[1][k], other[1][k]) for k in one[1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=10, help="kill points for each method and adapter")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rng = random.Random(options.seed)
    torch.set_num_threads(1)
    failures = 0
    for method in ("dpo", "kto"):
        for adapter in ("full", "lora"):
            root = Path(tempfile.mkdtemp())
            expected = uninterrupted(method, adapter, root / "whole")
            for number in range(options.points):
                event, step = kill_point(rng)
                result = killed_and_resumed(method, adapter, root / str(number), event, step)
                same = equal(expected, result)
                failures += not same
                print(f"{method} {adapter:4s} killed {event:21s} step {step}: {'equal' if same else 'DIFFERENT'}")
            shutil.rmtree(root)
    print(f"{failures} of {4 * options.points} differ")
    return failures


if __name__ == "__main__":
    sys.exit(main())
