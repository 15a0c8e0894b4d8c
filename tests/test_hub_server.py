"""The loopback Hub and the W&B reader, used through the real clients: transformers, peft, huggingface_hub, wandb.

All imports of these clients happen in one child process (this file run as a script), which leaves its results in a
folder and in the server.
"""

from __future__ import annotations

import hashlib
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, hub_environment, run_python

TEXTS = ["the cat sat on the mat", "a dog ran in the park", "numbers: 0 1 2 3", "Unicode too: déjà vu"]
# Longer than two 32 KiB blocks of the run file, so that records are split into several fragments.
LONG_TEXT = "".join(f"{number:06d}," for number in range(12_000))
LOGGED = [{"loss": 0.6931471805599453, "rewards": {"margins": 0.0}}, {"loss": 0.5, "rewards": {"margins": -1.25}}]


@dataclass(frozen=True)
class Pushed:
    hub: HubServer
    folder: Path
    report: dict[str, Any]

    def local(self, name: str) -> dict[str, bytes]:
        folder = self.folder / name
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    folder = tmp_path_factory.mktemp("pushed")
    with HubServer() as hub:
        run_python([__file__, folder], env=hub_environment(hub, folder), cwd=folder)
        yield Pushed(hub, folder, json.loads((folder / "report.json").read_text()))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


# What the clients pushed and reloaded


@pytest.mark.slow
def test_every_request_of_the_clients_is_served(pushed: Pushed) -> None:
    assert pushed.hub.unknown == []
    assert pushed.hub.refused == []


@pytest.mark.slow
def test_received_model_files_equal_local_ones(pushed: Pushed) -> None:
    received = pushed.hub.files("tester/base")  # pushed as "base": the server adds the name of the token's owner
    card = received.pop("README.md")
    assert received == pushed.local("base")
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= received.keys()
    assert card.startswith(b"---\nlibrary_name: transformers")


@pytest.mark.slow
def test_received_adapter_files_equal_local_ones(pushed: Pushed) -> None:
    received = pushed.hub.files("tester/adapter")
    local = pushed.local("adapter")
    assert received.keys() == local.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    # push_to_hub puts transformers' card in the place of peft's.
    assert received.pop("README.md") != local.pop("README.md")
    assert received == local
    assert pushed.hub.repositories["tester/adapter"].private


@pytest.mark.slow
def test_reloading_gives_the_same_model(pushed: Pushed) -> None:
    assert pushed.report["token_ids"] == pushed.report["reloaded_token_ids"]
    assert pushed.report["base_difference"] == 0.0
    assert pushed.report["adapter_difference"] == 0.0
    assert pushed.report["auto_adapter_difference"] == 0.0
    # Otherwise an adapter that was never applied would pass.
    assert pushed.report["adapter_effect"] > 1e-3


@pytest.mark.slow
def test_branches_and_pinned_commits_keep_their_files(pushed: Pushed) -> None:
    first, last = pushed.hub.commits("tester/notes")
    assert (first.summary, last.summary) == ("first", "second")
    assert pushed.report["pinned"] == pushed.report["latest"][:1] == ["one"]
    assert first.files == {"kept.txt": b"one", "old/gone.txt": b"gone"}
    assert pushed.hub.files("tester/notes") == {"kept.txt": b"one", "new.txt": b"two"}
    assert pushed.report["latest"] == ["one", "two"]
    assert pushed.hub.files("tester/notes", "draft") == pushed.hub.files("tester/notes")
    # The unchanged file is not sent again.
    assert pushed.report["unchanged_commit"] == last.sha
    assert [commit.summary for commit in pushed.hub.commits("tester/notes", "with/slash")] == ["third", "fourth"]
    assert pushed.report["tree"] == ["folder/inner.bin", "kept.txt", "new.txt"]


@pytest.mark.slow
def test_trainer_pushes_its_checkpoint_and_its_final_model(pushed: Pushed) -> None:
    received = pushed.hub.files("tester/trained")
    local = pushed.local("trained")
    final = {path: data for path, data in local.items() if not path.startswith("checkpoint-")}
    assert "training_args.bin" in final
    assert {path: received[path] for path in final} == final
    checkpoint = {path.partition("/")[2]: data for path, data in local.items() if path.startswith("checkpoint-2/")}
    sent = {path.partition("/")[2]: data for path, data in received.items() if path.startswith("last-checkpoint/")}
    assert "optimizer.pt" in checkpoint
    assert sent == checkpoint
    assert pushed.hub.commits("tester/trained")[-1].summary == "the end"


@pytest.mark.slow
def test_missing_files_and_repositories_raise_the_clients_own_errors(pushed: Pushed) -> None:
    assert pushed.report["missing_file"].endswith("EntryNotFoundError")  # "Remote..." in newer versions
    assert pushed.report["missing_repository"] == "RepositoryNotFoundError"
    assert pushed.report["missing_revision"] == "RevisionNotFoundError"
    assert pushed.report["wrong_token"] == "RepositoryNotFoundError"


@pytest.mark.slow
def test_wandb_history_and_config(pushed: Pushed) -> None:
    pytest.importorskip("wandb")
    from wandb_reader import read_config, read_history

    history = read_history(pushed.folder / "wandb")
    assert [step["loss"] for step in history] == [0.6931471805599453, 0.5]
    assert [step["rewards.margins"] for step in history] == [0.0, -1.25]
    assert [step["_step"] for step in history] == [0, 1]
    config = read_config(pushed.folder)
    assert config["beta"] == 0.1
    assert config["added_later"] == [1, {"two": 2}]
    assert config["long"] == LONG_TEXT


@pytest.mark.slow
def test_wandb_reader_refuses_other_and_damaged_files(pushed: Pushed, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb_reader import read_history

    with pytest.raises(FileNotFoundError, match="expected one"):
        read_history(tmp_path)
    (run,) = (pushed.folder / "wandb").glob("offline-run-*/run-*.wandb")
    damaged = bytearray(run.read_bytes())
    damaged[100] ^= 1
    (tmp_path / "run-damaged.wandb").write_bytes(damaged)
    with pytest.raises(ValueError, match="is damaged"):
        read_history(tmp_path)
    (tmp_path / "run-damaged.wandb").write_bytes(b"something else")
    with pytest.raises(ValueError, match="not a W&B run file"):
        read_history(tmp_path)


# What the server refuses, request by request


def _send(hub: HubServer, method: str, path: str, body: bytes = b"", token: str | None = None) -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {hub.token if token is None else token}"}
    request = urllib.request.Request(hub.url + path, data=body or None, headers=headers, method=method)
    # No proxy of the machine stands between this test and loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def _announce(hub: HubServer, data: bytes, size: int | None = None) -> str:
    oid = hashlib.sha256(data).hexdigest()
    wanted = {"oid": oid, "size": len(data) if size is None else size}
    batch = {"operation": "upload", "transfers": ["basic", "multipart"], "objects": [wanted]}
    status, _ = _send(hub, "POST", "/tester/x.git/info/lfs/objects/batch", json.dumps(batch).encode())
    assert status == 200
    return oid


def _commit(hub: HubServer, key: str, value: dict[str, Any], token: str | None = None) -> int:
    lines = [{"key": "header", "value": {"summary": "test"}}, {"key": key, "value": value}]
    body = "\n".join(json.dumps(line) for line in lines).encode()
    return _send(hub, "POST", "/api/models/tester/x/commit/main", body, token)[0]


def test_unknown_endpoint_is_404_and_recorded(hub: HubServer) -> None:
    assert _send(hub, "GET", "/api/no-such-thing?a=1")[0] == 404
    assert _send(hub, "DELETE", "/api/whoami-v2")[0] == 404
    assert hub.unknown == ["GET /api/no-such-thing?a=1", "DELETE /api/whoami-v2"]


def test_corrupt_upload_is_refused(hub: HubServer) -> None:
    _send(hub, "POST", "/api/repos/create", b'{"name": "x"}')
    data = b"weights" * 100
    oid = _announce(hub, data)
    pointer = {"path": "model.safetensors", "algo": "sha256", "oid": oid, "size": len(data)}

    assert _send(hub, "PUT", f"/lfs/{oid}", b"W" + data[1:])[0] == 400  # right size, wrong content
    assert _send(hub, "PUT", f"/lfs/{oid}", data[:-1])[0] == 400
    assert _send(hub, "PUT", f"/lfs/{'0' * 64}", data)[0] == 403  # never announced
    assert _commit(hub, "lfsFile", pointer) == 400  # the content is not there
    assert [entry[:8] for entry in hub.refused] == ["400 PUT ", "400 PUT ", "403 PUT ", "400 POST"]
    assert hub.files("tester/x") == {}

    assert _send(hub, "PUT", f"/lfs/{oid}", data)[0] == 200
    assert _commit(hub, "lfsFile", {**pointer, "size": 1}) == 400
    assert _commit(hub, "lfsFile", pointer) == 200
    assert hub.files("tester/x") == {"model.safetensors": data}


def test_upload_with_another_size_than_announced_is_refused(hub: HubServer) -> None:
    _send(hub, "POST", "/api/repos/create", b'{"name": "x"}')
    oid = _announce(hub, b"weights", size=8)
    assert _send(hub, "PUT", f"/lfs/{oid}", b"weights")[0] == 400


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file", {"path": "../outside.txt", "content": "", "encoding": "base64"}),
        ("file", {"path": "a.txt", "content": "not base64!", "encoding": "base64"}),
        ("file", {"path": "a.safetensors", "content": "AAAA", "encoding": "base64"}),
        ("file", {"content": "", "encoding": "base64"}),
        ("rename", {"path": "a.txt"}),
    ],
)
def test_malformed_commit_changes_nothing(hub: HubServer, key: str, value: dict[str, Any]) -> None:
    _send(hub, "POST", "/api/repos/create", b'{"name": "x"}')
    assert _commit(hub, key, value) == 400
    assert hub.files("tester/x") == {}
    assert hub.commits("tester/x") == []


def test_writing_needs_the_token(hub: HubServer) -> None:
    assert _send(hub, "POST", "/api/repos/create", b'{"name": "x"}', token="other")[0] == 401
    assert hub.repositories == {}
    _send(hub, "POST", "/api/repos/create", b'{"name": "x", "visibility": "private"}')
    assert _commit(hub, "file", {"path": "a.txt", "content": "YQ==", "encoding": "base64"}, token="other") == 401
    assert _commit(hub, "file", {"path": "a.txt", "content": "YQ==", "encoding": "base64"}) == 200
    assert _send(hub, "GET", "/tester/x/resolve/main/a.txt") == (200, b"a")
    assert _send(hub, "GET", "/tester/x/resolve/main/a.txt", token="other")[0] == 404


def test_server_stops_with_its_context() -> None:
    with HubServer() as server:
        assert _send(server, "GET", "/api/whoami-v2")[0] == 200
    with pytest.raises(urllib.error.URLError):
        _send(server, "GET", "/api/whoami-v2")


@pytest.mark.slow
def test_failing_and_hanging_children_raise_with_their_output(hub: HubServer, tmp_path: Path) -> None:
    env = hub_environment(hub, tmp_path)
    assert run_python("import os; print(os.environ['HF_ENDPOINT'])", env, tmp_path).stdout == f"{hub.url}\n"
    with pytest.raises(AssertionError, match=r"(?s)exit status 3.*some output"):
        run_python("import sys; print('some output'); sys.exit(3)", env, tmp_path)
    with pytest.raises(AssertionError, match=r"(?s)not done after 2 s.*some output"):
        run_python("import time; print('some output', flush=True); time.sleep(60)", env, tmp_path, timeout=2)


# The child process


def _tokenizer() -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _push_and_reload(folder: Path) -> dict[str, Any]:
    import torch
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model.push_to_hub("base")
    tokenizer.push_to_hub("base")

    reloaded_tokenizer = AutoTokenizer.from_pretrained("tester/base")
    reloaded = AutoModelForCausalLM.from_pretrained("tester/base").eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)

    def logits(some_model: Any) -> torch.Tensor:
        with torch.no_grad():
            return some_model(**batch).logits

    report: dict[str, Any] = {
        "token_ids": tokenizer(TEXTS)["input_ids"],
        "reloaded_token_ids": reloaded_tokenizer(TEXTS)["input_ids"],
        "base_difference": (logits(reloaded) - logits(model)).abs().max().item(),
    }

    # init_lora_weights=False: with the usual zero start, an adapter changes nothing.
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(reloaded, lora).eval()
    adapted.save_pretrained(str(folder / "adapter"))
    adapted.push_to_hub("tester/adapter", private=True)
    base = AutoModelForCausalLM.from_pretrained("tester/base")
    adapter = PeftModel.from_pretrained(base, "tester/adapter").eval()
    report["adapter_difference"] = (logits(adapter) - logits(adapted)).abs().max().item()
    # Finds the base model by the name in the adapter's configuration.
    automatic = AutoPeftModelForCausalLM.from_pretrained("tester/adapter").eval()
    report["auto_adapter_difference"] = (logits(automatic) - logits(adapted)).abs().max().item()
    report["adapter_effect"] = (logits(adapter) - logits(model)).abs().max().item()

    _train_and_push(model, tokenizer, folder / "trained")
    return report


def _train_and_push(model: Any, tokenizer: Any, output_dir: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(TEXTS[:1] * 4)["input_ids"]]
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=2,
        max_steps=2,
        # One checkpoint only: a second one would overwrite files of the folder that is still being sent.
        save_steps=2,
        push_to_hub=True,
        hub_strategy="checkpoint",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub("the end")


def _use_repository(folder: Path) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download

    def read(path: str, revision: str | None = None) -> str:
        return Path(hf_hub_download("tester/notes", path, revision=revision)).read_text()

    def error_of(download: Any) -> str:
        try:
            download()
        except Exception as error:
            return type(error).__name__
        return "no error"

    api = HfApi()
    assert api.whoami()["name"] == "tester"
    api.create_repo("tester/notes")
    api.create_repo("tester/notes", exist_ok=True)
    operations = [CommitOperationAdd("kept.txt", b"one"), CommitOperationAdd("old/gone.txt", b"gone")]
    first = api.create_commit("tester/notes", operations, commit_message="first")
    (folder / "notes").mkdir()
    (folder / "notes" / "kept.txt").write_text("one")
    (folder / "notes" / "new.txt").write_text("two")
    api.upload_folder(
        repo_id="tester/notes", folder_path=folder / "notes", commit_message="second", delete_patterns="old/*"
    )
    unchanged = api.upload_folder(repo_id="tester/notes", folder_path=folder / "notes")
    report: dict[str, Any] = {
        "pinned": [read("kept.txt", first.oid)],
        "latest": [read("kept.txt"), read("new.txt")],
        "unchanged_commit": unchanged.oid,
    }

    api.create_branch("tester/notes", branch="draft")
    api.create_branch("tester/notes", branch="draft", exist_ok=True)
    api.create_branch("tester/notes", branch="with/slash")
    binary = CommitOperationAdd("folder/inner.bin", bytes(range(256)))
    api.create_commit("tester/notes", [binary], commit_message="third", revision="with/slash")
    report["tree"] = sorted(api.list_repo_files("tester/notes", revision="with/slash"))
    top = {entry.path for entry in api.list_repo_tree("tester/notes", revision="with/slash")}
    assert top == {"folder", "kept.txt", "new.txt"}
    assert api.file_exists("tester/notes", "folder/inner.bin", revision="with/slash")
    assert {branch.name for branch in api.list_repo_refs("tester/notes").branches} == {"main", "draft", "with/slash"}
    removal = CommitOperationDelete("folder/", is_folder=True)
    api.create_commit("tester/notes", [removal], commit_message="fourth", revision="with/slash")
    assert "folder/inner.bin" not in api.list_repo_files("tester/notes", revision="with/slash")

    return {
        **report,
        "missing_file": error_of(lambda: hf_hub_download("tester/notes", "nothing.txt")),
        "missing_repository": error_of(lambda: hf_hub_download("tester/nothing", "config.json")),
        "missing_revision": error_of(lambda: hf_hub_download("tester/notes", "kept.txt", revision="nothing")),
        "wrong_token": error_of(lambda: HfApi(token="wrong").model_info("tester/adapter")),
    }


def _log_to_wandb(folder: Path) -> None:
    try:
        import wandb
    except ImportError:
        return
    with wandb.init(mode="offline", dir=folder, project="test", config={"beta": 0.1, "long": LONG_TEXT}) as run:
        run.config.update({"added_later": [1, {"two": 2}]})
        for values in LOGGED:
            run.log(values)


def _main(folder: Path) -> None:
    report = {**_push_and_reload(folder), **_use_repository(folder)}
    _log_to_wandb(folder)
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
