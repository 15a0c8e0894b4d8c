"""Output of `report_to` in W&B, TensorBoard and trackio, read back from their files.

One process (this file run as a script) trains and logs to those that are installed; the tests compare what arrived
with `trainer.state.log_history`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

LOGGERS = [name for name in ("wandb", "tensorboard", "trackio") if importlib.util.find_spec(name)]
SETTINGS = {"beta": 0.3, "desirable_weight": 0.8, "loss_type": "kto", "humanline": False, "learning_rate": 0.01}
# Under these names, TRL's users have their dashboards.
METRICS = {
    *("loss", "kl", "entropy", "num_tokens"),
    *(f"{metric}/{side}" for metric in ("rewards", "logps", "logits") for side in ("chosen", "rejected")),
    "rewards/margins",
}
TRAIN_METRICS = {f"train/{name}" for name in METRICS | {"grad_norm", "learning_rate", "epoch"}}
PICTURES = {f"report/{name}" for name in ("loss", "rewards", "logps", "kl", "grad_norm", "learning_rate")}
EVAL_METRICS = {f"eval/{name}" for name in METRICS}


@dataclass(frozen=True)
class Logged:
    folder: Path
    train: list[dict[str, float]]
    """`log_history` by step, under the names of the loggers."""
    evaluation: dict[str, float]


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> Logged:
    folder = tmp_path_factory.mktemp("logged")
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "TRACKIO", "TENSORBOARD"))
    }
    env |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(folder / "trackio")}
    child = subprocess.run(
        [sys.executable, __file__], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stdout + child.stderr
    history = json.loads((folder / "history.json").read_text())
    train = [{f"train/{k}": v for k, v in entry.items() if k != "step"} for entry in history if "loss" in entry]
    (evaluation,) = (
        {f"eval/{k[5:]}": v for k, v in e.items() if k[:5] == "eval_"} for e in history if "eval_loss" in e
    )
    return Logged(folder, train, evaluation)


def test_history_has_trls_names_and_real_values(logged: Logged) -> None:
    assert [entry.keys() for entry in logged.train] == [TRAIN_METRICS] * 3
    assert logged.evaluation.keys() >= EVAL_METRICS
    last = logged.train[-1]
    # A logger that shows zeros everywhere would pass the comparisons below.
    assert last["train/kl"] > 0 and last["train/rewards/margins"] != 0 and last["train/entropy"] > 0
    assert last["train/rewards/margins"] == pytest.approx(
        last["train/rewards/chosen"] - last["train/rewards/rejected"], abs=1e-6
    )
    tokens = [entry["train/num_tokens"] for entry in logged.train]
    assert tokens == sorted(set(tokens)) and tokens[0] > 0


def assert_same(received: list[dict[str, Any]], logged: Logged) -> None:
    """The rows of training steps and of the evaluation, which may hold more than was logged (time stamps, ...)."""
    train = [row for row in received if "train/loss" in row]
    assert len(train) == len(logged.train)
    (evaluation,) = (row for row in received if "eval/loss" in row)
    for row, expected in zip([*train, evaluation], [*logged.train, logged.evaluation], strict=True):
        assert expected.keys() <= row.keys()
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


@pytest.mark.skipif("wandb" not in LOGGERS, reason="wandb is not installed")
def test_wandb(logged: Logged) -> None:
    from wandb_reader import read_config, read_history

    history = read_history(logged.folder / "wandb")
    assert_same(history, logged)
    assert [row["train/global_step"] for row in history if "train/loss" in row] == [1, 2, 3]
    config = read_config(logged.folder / "wandb")
    assert {name: config[name] for name in SETTINGS} == SETTINGS
    assert config["model_type"] == "llama"
    assert PICTURES <= {name.split(".")[0] for row in history for name in row}


@pytest.mark.skipif("tensorboard" not in LOGGERS, reason="tensorboard is not installed")
def test_tensorboard(logged: Logged) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = logged.folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent), size_guidance={"tensors": 0}).Reload()
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            # Scalars come one by one; what belongs to one evaluation shares its prefix and step.
            rows.setdefault((tag.split("/")[0], event.step), {})[tag] = event.value
    assert [step for prefix, step in rows if prefix == "train"] == [1, 2, 3]
    assert_same(list(rows.values()), logged)
    (arguments,) = (event.tensor_proto.string_val[0] for event in events.Tensors("args/text_summary"))
    arguments = json.loads(arguments)
    assert {name: arguments[name] for name in SETTINGS} == SETTINGS
    assert set(events.Tags()["images"]) >= PICTURES


@pytest.mark.skipif("trackio" not in LOGGERS, reason="trackio is not installed")
def test_trackio(logged: Logged) -> None:
    with sqlite3.connect(logged.folder / "trackio" / "huggingface.db") as database:
        rows = [json.loads(row) for (row,) in database.execute("SELECT metrics FROM metrics ORDER BY step")]
        ((config,),) = database.execute("SELECT config FROM configs")
    assert_same(rows, logged)
    config = json.loads(config)
    assert {name: config[name] for name in SETTINGS} == SETTINGS
    assert {name for row in rows for name in row} >= PICTURES


# The process that trains


def _train() -> None:
    from conftest import perturbed, unpaired_rows

    from halos_trl import KTOConfig, KTOTrainer, toy
    from halos_trl.pictures_callback import PicturesCallback

    tokenizer = toy.build_tokenizer()
    model = toy.tiny_model(tokenizer)
    config = KTOConfig(
        output_dir="out",
        max_steps=3,
        per_device_train_batch_size=8,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=LOGGERS,
        **SETTINGS,
    )
    trainer = KTOTrainer(
        model=model,
        ref_model=perturbed(model),  # otherwise the KL term starts at 0 and may stay there
        args=config,
        train_dataset=unpaired_rows(24),
        eval_dataset=unpaired_rows(8, seed=1),
        processing_class=tokenizer,
    )
    trainer.add_callback(PicturesCallback(trainer))
    trainer.train()
    Path("history.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    _train()
