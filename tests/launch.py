"""Starts a script of the tests in one process, or in two under one of the engines, and reads what it saved."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]


def launch(script, out, engine=None):
    """What `script OUT [engine]` saved as OUT/results.pt. Skips the test where DeepSpeed cannot run."""
    environment = dict(os.environ)
    if engine is None:
        command = [sys.executable, str(script), str(out)]
    elif engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is installed with the `dev` extra on Linux")
        if shutil.which("c++") is None:
            pytest.skip("DeepSpeed on a CPU builds an extension, and there is no C++ compiler")
        accelerate = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            deepspeed(out, int(engine[-1])),
        ]
        command = [*accelerate, str(script), str(out), "zero"]
        environment["DS_ACCELERATOR"] = "cpu"
    else:
        command = [*TORCHRUN, str(script), str(out), *(["fsdp2"] if engine == "fsdp2" else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return torch.load(out / "results.pt", weights_only=False)


def deepspeed(out, stage):
    """Accelerate's file for two processes under ZeRO."""
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    settings = dict.fromkeys(names, "auto") | {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    (out / "zero.json").write_text(json.dumps(settings))
    lines = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": str(out / "zero.json"), "zero3_init_flag": False},
        "num_machines": 1,
        "num_processes": 2,
        "machine_rank": 0,
    }
    (out / "zero.yaml").write_text(json.dumps(lines))  # JSON is YAML
    return str(out / "zero.yaml")
