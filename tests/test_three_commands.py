"""Sample, label and train as a user would run them; the second command runs in its own process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import user
from safetensors.torch import load_file

from halos_trl import toy
from halos_trl.cli import main as command

ROOT = Path(__file__).parents[1]


def in_a_process(*words):
    """`halos-trl` as a command of the shell; what it printed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "halos_trl.cli.main", *words]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_sample_label_train(tokenizer, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompts = [{"prompt": user(text), "wanted": text[-1]} for text in toy.make_prompts(4, 0, "feedback")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "rewards.py").write_text("def ends_well(completion, wanted): return -abs(len(completion) - 3)\n")

    sample = "--model_name_or_path model --dataset_name prompts.jsonl --max_tokens 6 --num_samples_per_prompt 4"
    assert command.main(["sample", *sample.split(), "--temperature", "1"]) == 0
    printed = in_a_process("label", "--reward_function", "rewards.py:ends_well", "--threshold", "mean")
    samples, labelled = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("samples.jsonl", "feedback.jsonl")
    )
    scores = {sample["output"]: -abs(len(sample["output"]) - 3) for sample in samples if sample["output"]}
    kept = [sample["output"] for sample in samples if sample["output"]]
    assert len(samples) == 16 and f"{len(kept)} samples of 4 prompts: {len(kept)} scored" in printed
    mean = sum(scores[output] for output in kept) / len(kept)
    assert [(row["completion"][0]["content"], row["label"]) for row in labelled] == [
        (output, scores[output] >= mean) for output in kept
    ]

    train = "--model_name_or_path model --dataset_name feedback.jsonl --max_steps 2 --output_dir trained"
    train += " --use_cpu true --bf16 false --gradient_checkpointing false --report_to none"
    train += " --per_device_train_batch_size 4 --learning_rate 0.01"
    assert command.main(["train", "kto", *train.split()]) == 0
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "trained"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
