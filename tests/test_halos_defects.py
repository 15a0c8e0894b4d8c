"""`docs/halos_defects.md` names a test for each defect of HALOs that could be ours; three of them are here."""

import ast
import re
from pathlib import Path

import pytest
from conftest import unpaired_rows

import halos_trl
from halos_trl import KTOConfig, KTOTrainer

TESTS = Path(__file__).parent
ENTRIES = re.findall(
    r"^\| (\d+) \| (.+) \| (.+) \|(.*)\|$", (TESTS.parent / "docs" / "halos_defects.md").read_text(), flags=re.M
)


def test_every_entry_is_there_once_and_names_a_test_or_says_why_not():
    assert [int(number) for number, *_ in ENTRIES] == list(range(1, 44))
    for number, _, here, tests in ENTRIES:
        assert tests.strip() or here.startswith("no counterpart"), number


@pytest.mark.parametrize("named", sorted({name for *_, tests in ENTRIES for name in re.findall(r"`([^`]+)`", tests)}))
def test_named_tests_exist(named):
    file, _, name = named.partition("::")
    functions = {node.name for node in ast.parse((TESTS / f"{file}.py").read_text()).body if hasattr(node, "name")}
    assert name in functions


def test_names_that_the_hub_client_has_dropped_are_not_used():
    sources = Path(halos_trl.__file__).parent.rglob("*.py")
    assert not [path for path in sources if "HfFolder" in path.read_text()]


@pytest.mark.parametrize("first", [False, True])
def test_the_first_evaluation_is_optional(first, model, tokenizer, make_config):
    config = make_config(KTOConfig, max_steps=2, eval_strategy="steps", eval_steps=2, eval_on_start=first)
    rows = unpaired_rows(16)
    trainer = KTOTrainer(model, args=config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trainer.train()
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == ([0, 2] if first else [2])


@pytest.mark.parametrize("order", ["trl", "halos"])
def test_labelled_rows_have_their_steps_and_warm_up(order, model, tokenizer, make_config):
    settings = {
        "max_steps": -1,
        "num_train_epochs": 2,
        "warmup_steps": 0.5,
        "lr_scheduler_type": "constant_with_warmup",
    }
    config = make_config(KTOConfig, batch_order=order, per_device_train_batch_size=4, learning_rate=1.0, **settings)
    trainer = KTOTrainer(model, args=config, train_dataset=unpaired_rows(16), processing_class=tokenizer)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0])
