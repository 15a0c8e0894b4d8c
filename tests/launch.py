"""Starts a test script in one process, or in two under an engine, and reads its saved results."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"
ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def engine_command(script, arguments, engine=None):
    """The command of `script ARGUMENTS [fsdp2|zero]` in one process, or in two under an engine, and its variables."""
    environment = dict(os.environ)
    command = [sys.executable]
    if engine is not None:
        # The files that users launch with, for two processes on a CPU.
        config = ["--config_file", str(CONFIGS / f"{engine}.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
        command += ["-m", "accelerate.commands.launch", *config, "--main_process_port", str(free_port())]
        environment["DS_ACCELERATOR" if engine.startswith("zero") else "ACCELERATE_USE_CPU"] = (
            "cpu" if engine.startswith("zero") else "true"
        )
    kind = {"fsdp2": ["fsdp2"], "zero2": ["zero"], "zero3": ["zero"]}.get(engine, [])
    return [*command, str(script), *map(str, arguments), *kind], environment


def skip_without(engine):
    """Skips the test where DeepSpeed cannot run."""
    if engine is not None and engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is installed with the `dev` extra on Linux")
        if shutil.which("c++") is None:
            pytest.skip("DeepSpeed on a CPU builds an extension, and there is no C++ compiler")


def launch(script, out, engine=None):
    """What `script OUT [fsdp2|zero]` saved as OUT/results.pt. Skips the test where DeepSpeed cannot run."""
    skip_without(engine)
    command, environment = engine_command(script, [out], engine)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return torch.load(out / "results.pt", weights_only=False)
