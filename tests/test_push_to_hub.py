"""`examples/train_kto.py --push_to_hub` as a user runs it: what the Hub receives, and what one gets back from it.

Two runs against a Hub on loopback: an adapter (quantized where bitsandbytes is installed) on a base of the Hub, on two
processes, merged at the end; and a whole model from a local base on one process (this file run as a script). The
latter then loads everything from the Hub, with a cache that holds none of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from hub_server import HubServer, Repository, hub_environment, run_python

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_kto.py"
QUANTIZED = importlib.util.find_spec("bitsandbytes") is not None
FLAGS = {
    "dataset_name": "rows.jsonl",
    "max_steps": 2,
    "learning_rate": 0.02,
    "per_device_train_batch_size": 4,
    "desirable_weight": 0.7,
    "max_length": 48,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "push_to_hub": True,
}


@dataclass(frozen=True)
class Pushed:
    hub: HubServer
    folder: Path
    report: dict[str, Any]
    """What the process with the empty cache found, by repository."""

    def local(self, name: str) -> dict[str, bytes]:
        folder = self.folder / name
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def card(self, repo: str) -> tuple[dict[str, Any], str]:
        return split_card(self.hub.files(repo)["README.md"].decode())


def split_card(text: str) -> tuple[dict[str, Any], str]:
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, _tokenizer, _tiny) -> Iterator[Pushed]:
    from conftest import unpaired_rows

    folder = tmp_path_factory.mktemp("pushed")
    _tiny.save_pretrained(folder / "local-base")
    _tokenizer.save_pretrained(folder / "local-base")
    unpaired_rows(16).to_json(folder / "rows.jsonl")
    with HubServer() as hub:
        hub.repositories["tester/base"] = Repository()
        files = {path.name: path.read_bytes() for path in (folder / "local-base").iterdir()}
        hub.repositories["tester/base"].commit(files)
        env = hub_environment(hub, folder)

        adapter = FLAGS | {
            "model_name_or_path": "tester/base",
            "output_dir": "adapter/",
            "hub_model_id": "tester/kto-adapter",
            "hub_private_repo": True,
            "use_peft": True,
            "lora_r": 4,
            "load_in_4bit": QUANTIZED,
            "merge_adapter": True,
        }
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        run_python([*torchrun, EXAMPLE, *as_flags(adapter)], env, folder)

        full = FLAGS | {"model_name_or_path": folder / "local-base", "output_dir": folder / "full"}
        run_python([__file__, folder, *as_flags(full)], {**env, "HF_HOME": str(folder / "empty")}, folder)
        yield Pushed(hub, folder, json.loads((folder / "report.json").read_text()))


def as_flags(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def test_every_request_is_served_and_every_repository_is_expected(pushed: Pushed) -> None:
    assert pushed.hub.unknown == []
    assert pushed.hub.refused == []
    assert set(pushed.hub.repositories) == {
        "tester/base",
        "tester/full",  # named after the output directory
        "tester/kto-adapter",
        "tester/kto-adapter-merged",
    }


@pytest.mark.parametrize(
    ("repo", "local", "weights"),
    [
        ("tester/full", "full", "model.safetensors"),
        ("tester/kto-adapter", "adapter", "adapter_model.safetensors"),
        ("tester/kto-adapter-merged", "adapter-merged", "model.safetensors"),
    ],
)
def test_received_files_equal_the_local_ones(pushed: Pushed, repo: str, local: str, weights: str) -> None:
    received = pushed.hub.files(repo)
    assert received == pushed.local(local)
    wanted = {weights, "README.md", "tokenizer.json", "tokenizer_config.json"}
    assert wanted <= received.keys()
    if local != "adapter-merged":
        assert {"training_args.bin", "trainer_state.json"} <= received.keys()
    # One commit: nothing is sent twice, and the second process sends nothing.
    assert pushed.hub.commits(repo) == 1


def test_private_runs_stay_private(pushed: Pushed) -> None:
    private = {name: repository.private for name, repository in pushed.hub.repositories.items()}
    assert private["tester/kto-adapter"] and private["tester/kto-adapter-merged"]
    assert not private["tester/full"]


def test_reloaded_models_are_the_local_ones(pushed: Pushed) -> None:
    for repo, found in pushed.report["models"].items():
        assert found["difference_to_local"] == 0.0, repo
        assert found["difference_to_base"] > 1e-2, f"{repo}: training changed nothing, so the check says nothing"
        assert found["same_tokens"], repo


def test_adapter_is_merged_into_the_unquantized_base(pushed: Pushed) -> None:
    files = pushed.hub.files("tester/kto-adapter-merged")
    base = safetensors.torch.load(pushed.hub.files("tester/base")["model.safetensors"])
    merged = safetensors.torch.load(files["model.safetensors"])
    adapter = safetensors.torch.load(pushed.hub.files("tester/kto-adapter")["adapter_model.safetensors"])
    scale = 32 / 4  # lora_alpha / lora_r
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        update = torch.zeros_like(weight)
        if f"{prefix}.lora_A.weight" in adapter:
            update = scale * adapter[f"{prefix}.lora_B.weight"].float() @ adapter[f"{prefix}.lora_A.weight"].float()
            assert update.abs().max() > 1e-3
        torch.testing.assert_close(merged[name], weight + update, rtol=0, atol=1e-7)
    assert pushed.report["merged_minus_adapter"] < 1e-5
    assert "quantization_config" not in json.loads(files["config.json"])


def test_training_arguments_are_those_of_the_flags(pushed: Pushed) -> None:
    for repo in ("tester/full", "tester/kto-adapter"):
        arguments = pushed.report["training_args"][repo]
        assert arguments["class"] == "halos_trl.configs.unpaired.KTOConfig"
        assert {name: arguments[name] for name in ("learning_rate", "max_steps", "desirable_weight")} == {
            "learning_rate": 0.02,
            "max_steps": 2,
            "desirable_weight": 0.7,
        }


def test_card_of_the_whole_model(pushed: Pushed) -> None:
    data, text = pushed.card("tester/full")
    assert data == {
        "library_name": "transformers",
        "model_name": "full",
        "tags": ["generated_from_trainer", "halos-trl", "kto", "trl"],
    }
    assert "trained from the local model `local-base` on `rows.jsonl` with **KTO**" in text
    assert "https://huggingface.co/papers/2402.01306" in text and "@inproceedings{ethayarajh2024kto" in text
    assert hyperparameters(text) == {
        "loss_type": "kto",
        "beta": "0.1",
        "desirable_weight": "0.7",
        "undesirable_weight": "1.0",
        "learning_rate": "0.02",
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": "4",
        "gradient_accumulation_steps": "1",
        "max_steps": "2",
        "max_length": "48",
        "seed": "42",
        "processes": "1",
    }


def test_cards_of_adapter_and_merged_model(pushed: Pushed) -> None:
    for repo, library in (("tester/kto-adapter", "peft"), ("tester/kto-adapter-merged", "transformers")):
        data, text = pushed.card(repo)
        assert data["base_model"] == "tester/base"
        assert data["library_name"] == library
        assert data["model_name"] == repo.split("/")[1]
        assert "[tester/base](https://huggingface.co/tester/base)" in text
        assert text.lstrip().startswith(f"# {repo.split('/')[1]}\n")
        table = hyperparameters(text, all_rows=True)
        assert (table["adapter"], table["lora_r"], table["lora_alpha"], table["processes"]) == ("LoRA", "4", "32", "2")
        assert table.get("base_quantization") == ("4 bit (nf4)" if QUANTIZED else None)
    assert "This LoRA adapter was trained" in pushed.card("tester/kto-adapter")[1]
    assert "merged into the unquantized base model" in pushed.card("tester/kto-adapter-merged")[1]


def test_cards_print_no_none_and_no_local_path(pushed: Pushed) -> None:
    for repo in pushed.report["models"]:
        card = pushed.hub.files(repo)["README.md"].decode()
        assert "None" not in card
        assert str(pushed.folder) not in card and str(Path.home()) not in card


def test_quick_start_of_each_card_runs(pushed: Pushed) -> None:
    for repo, printed in pushed.report["quick_start"].items():
        assert isinstance(printed, str) and printed, repo


def hyperparameters(text: str, all_rows: bool = False) -> dict[str, str]:
    """The card's table; the optimizer's rows, whose defaults belong to transformers, only with `all_rows`."""
    table = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, flags=re.MULTILINE))
    hidden = () if all_rows else ("optim", "warmup_steps", "weight_decay", "max_grad_norm")
    return {name: value for name, value in table.items() if name not in hidden}


# The process that trains the whole model and reads the Hub


def _look(folder: Path) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["Sort fadba", "Sort gghh", "a longer text: 0 1 2"]
    tokenizer = AutoTokenizer.from_pretrained("tester/base")
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**batch).logits

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return (a - b).abs().max().item()

    base = logits(AutoModelForCausalLM.from_pretrained("tester/base"))
    repos = {
        "tester/full": ("full", AutoModelForCausalLM),
        "tester/kto-adapter": ("adapter", AutoPeftModelForCausalLM),
        "tester/kto-adapter-merged": ("adapter-merged", AutoModelForCausalLM),
    }
    found, report = {}, {"models": {}, "training_args": {}, "quick_start": {}}
    for repo, (local, model_class) in repos.items():
        model = model_class.from_pretrained(repo)
        found[repo] = logits(model)
        tokenizers = [AutoTokenizer.from_pretrained(name) for name in (repo, folder / local)]
        chat = [{"role": "user", "content": texts[0]}]
        report["models"][repo] = {
            "difference_to_local": difference(found[repo], logits(model_class.from_pretrained(folder / local))),
            "difference_to_base": difference(found[repo], base),
            "same_tokens": all(
                other(texts)["input_ids"] == tokenizer(texts)["input_ids"]
                and other.apply_chat_template(chat, tokenize=False)
                == tokenizer.apply_chat_template(chat, tokenize=False)
                for other in tokenizers
            ),
        }
        card = Path(hf_hub_download(repo, "README.md")).read_text()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1], {})
        report["quick_start"][repo] = printed.getvalue()
        if repo != "tester/kto-adapter-merged":
            arguments = torch.load(hf_hub_download(repo, "training_args.bin"), weights_only=False)
            kind = type(arguments)
            values = {name: getattr(arguments, name) for name in ("learning_rate", "max_steps", "desirable_weight")}
            report["training_args"][repo] = {"class": f"{kind.__module__}.{kind.__name__}", **values}
    report["merged_minus_adapter"] = difference(found["tester/kto-adapter-merged"], found["tester/kto-adapter"])
    return report


if __name__ == "__main__":
    target = Path(sys.argv.pop(1))
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    (target / "report.json").write_text(json.dumps(_look(target)))
