"""A small Hugging Face Hub on loopback, for tests that push and reload without a network.

    with HubServer() as hub:
        run_python(["train.py"], env=hub_environment(hub, tmp_path), cwd=tmp_path)
        assert "adapter_model.safetensors" in hub.files("tester/adapter")
        assert hub.unknown == hub.refused == []

huggingface_hub reads `HF_ENDPOINT` when it is imported, so the code that pushes belongs in a child process.

Model repositories with one branch, and LFS rather than Xet. Writing, and reading a private repository, needs the
server's token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test_token"
USER = "tester"
# What the real Hub's default .gitattributes sends to LFS, as far as training writes it.
_LFS_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")


@dataclass
class Repository:
    """The files after each commit, by path, oldest commit first."""

    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        self.commits.append(files)
        return self.sha

    @property
    def sha(self) -> str:
        return f"{len(self.commits):040x}"

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]


class HubServer:
    """Serves within its context; what was received can still be read afterwards."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.unknown: list[str] = []
        """Requests that no endpoint answers."""
        self.refused: list[str] = []
        """Requests without the token, and LFS files that are not what was announced."""
        self.lfs: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self._listener = _Listener(("127.0.0.1", 0), _Handler)
        self._listener.hub = self
        self._thread = threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_address[1]}"

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The files of a repository, by path."""
        return self.repositories[repo_id].files

    def commits(self, repo_id: str) -> int:
        """How often files were committed, without the empty commit that creates a repository."""
        return len(self.repositories[repo_id].commits) - 1

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()  # joins the threads of requests in flight
        self._thread.join()

    def answer(self, method: str, path: str, body: bytes, authorized: bool) -> _Reply:
        """One request at a time: uploads come from several threads."""
        request = f"{method} {path}"
        with self.lock:
            for wanted, pattern, respond in _ENDPOINTS:
                match = re.fullmatch(pattern, path)
                if match is None or wanted != ("GET" if method == "HEAD" else method):
                    continue
                if wanted == "POST" and respond is not _validate_yaml and not authorized:
                    self.refused.append(request)
                    return _reply({}, 401)
                repository = self.repositories.get(match.groupdict().get("repo", ""))
                if "repo" in match.groupdict() and (repository is None or (repository.private and not authorized)):
                    return _missing("RepoNotFound")
                return respond(self, match, body, repository)
            self.unknown.append(request)
            return _missing("EntryNotFound")


@dataclass(frozen=True)
class _Reply:
    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


def _reply(value: Any, status: int = 200) -> _Reply:
    return _Reply(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


def _missing(code: str, sha: str = "") -> _Reply:
    """`code`: by which huggingface_hub chooses its exception."""
    return _Reply(b"", 404, {"X-Error-Code": code, "X-Repo-Commit": sha})


class _Listener(ThreadingHTTPServer):
    hub: HubServer
    daemon_threads = False  # so that server_close() joins them


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    timeout = 30

    def _serve(self) -> None:
        # The body is read also where the answer is an error: closing on unread data resets the connection.
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        reply = self.server.hub.answer(self.command, unquote(urlsplit(self.path).path), body, authorized)
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


# -- endpoints: server, match of the path, body, repository of the path --------------------------------------------


def _is_lfs(path: str, size: int) -> bool:
    """Empty files are never LFS: the client commits them as regular ones."""
    return size > 0 and path.endswith(_LFS_SUFFIXES)


def _oid(path: str, data: bytes) -> str:
    """What the client compares to skip unchanged files: the sha256 of an LFS file, the git blob id of any other."""
    if _is_lfs(path, len(data)):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _whoami(hub: HubServer, match: re.Match[str], body: bytes, repository: Any) -> _Reply:
    return _reply({"type": "user", "name": USER, "orgs": []})


def _agent_harnesses(hub: HubServer, match: re.Match[str], body: bytes, repository: Any) -> _Reply:
    """Fetched once by huggingface_hub for its user agent."""
    return _reply({"standardEnvVars": [], "harnesses": {}})


def _create(hub: HubServer, match: re.Match[str], body: bytes, repository: Any) -> _Reply:
    request = json.loads(body)
    repo_id = f"{request.get('organization') or USER}/{request['name']}"
    exists = repo_id in hub.repositories
    if not exists:
        # Older clients send a flag instead of the visibility.
        private = request.get("visibility") == "private" or bool(request.get("private"))
        hub.repositories[repo_id] = Repository(private, [{}])
    return _reply({"name": repo_id, "id": repo_id, "url": f"{hub.url}/{repo_id}"}, 409 if exists else 200)


def _info(hub: HubServer, match: re.Match[str], body: bytes, repository: Repository) -> _Reply:
    names = {"id": match["repo"], "modelId": match["repo"], "author": USER}
    siblings = [{"rfilename": path} for path in repository.files]
    return _reply({**names, "sha": repository.sha, "private": repository.private, "tags": [], "siblings": siblings})


def _tree(hub: HubServer, match: re.Match[str], body: bytes, repository: Repository) -> _Reply:
    """The files of a repository; those below a folder are missing, since no test pushes one."""
    if match["folder"]:
        return _missing("EntryNotFound", repository.sha)
    return _reply(
        [
            {"type": "file", "path": path, "size": len(data), "oid": _oid(path, data)}
            for path, data in repository.files.items()
        ]
    )


def _resolve(hub: HubServer, match: re.Match[str], body: bytes, repository: Repository) -> _Reply:
    path = match["path"]
    if path not in repository.files:
        return _missing("EntryNotFound", repository.sha)
    data = repository.files[path]
    return _Reply(data, headers={"ETag": f'"{_oid(path, data)}"', "X-Repo-Commit": repository.sha})


def _validate_yaml(hub: HubServer, match: re.Match[str], body: bytes, repository: Any) -> _Reply:
    return _reply({"errors": [], "warnings": []})


def _preupload(hub: HubServer, match: re.Match[str], body: bytes, repository: Repository) -> _Reply:
    modes = {True: "lfs", False: "regular"}
    files = [
        {"path": f["path"], "uploadMode": modes[_is_lfs(f["path"], f["size"])], "shouldIgnore": False}
        for f in json.loads(body)["files"]
    ]
    known = [
        {"oid": _oid(f["path"], repository.files[f["path"]])} if f["path"] in repository.files else {} for f in files
    ]
    return _reply({"files": [file | oid for file, oid in zip(files, known, strict=True)]})


def _lfs_batch(hub: HubServer, match: re.Match[str], body: bytes, repository: Repository) -> _Reply:
    # Without actions, the client takes the content as already there.
    objects = [
        {"oid": wanted["oid"], "size": wanted["size"]}
        | ({} if wanted["oid"] in hub.lfs else {"actions": {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}})
        for wanted in json.loads(body)["objects"]
    ]
    return _reply({"transfer": "basic", "objects": objects})


def _lfs_put(hub: HubServer, match: re.Match[str], body: bytes, repository: Any) -> _Reply:
    """Without a token, as the storage behind the real Hub."""
    if hashlib.sha256(body).hexdigest() != match["oid"]:
        hub.refused.append(f"PUT {match['oid']}")
        return _reply({}, 400)
    hub.lfs[match["oid"]] = body
    return _Reply(b"")


def _commit(hub: HubServer, match: re.Match[str], body: bytes, repository: Repository) -> _Reply:
    files = dict(repository.files)
    for operation in map(json.loads, body.splitlines()):
        value = operation["value"]
        if operation["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "lfsFile":
            files[value["path"]] = hub.lfs[value["oid"]]
    sha = repository.commit(files)
    return _reply({"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{match['repo']}/commit/{sha}"})


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ENDPOINTS: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", _whoami),
    ("GET", "/api/agent-harnesses", _agent_harnesses),
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _validate_yaml),
    ("GET", f"/api/models/{_REPO}(/revision/[^/]+)?", _info),
    ("GET", f"/api/models/{_REPO}/tree/[^/]+(/(?P<folder>.+))?", _tree),
    ("POST", f"/api/models/{_REPO}/preupload/main", _preupload),
    ("POST", f"/api/models/{_REPO}/commit/main", _commit),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", _lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _lfs_put),
    ("GET", f"/{_REPO}/resolve/[^/]+/(?P<path>.+)", _resolve),
]


# -- child processes -----------------------------------------------------------------------------------------------


def hub_environment(hub: HubServer, home: str | os.PathLike[str]) -> dict[str, str]:
    """The environment of a child process that uses `hub` for everything and keeps its cache under `home`."""
    # Any setting of the machine could send the child elsewhere: a cache, a mirror, offline mode, a proxy.
    foreign = re.compile(r"HF_|HUGGING_?FACE|TRANSFORMERS_|\w+_PROXY$", re.IGNORECASE)
    env = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    return {
        **env,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(Path(home) / "huggingface"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "127.0.0.1",
    }


def run_python(
    arguments: Sequence[str | os.PathLike[str]], env: Mapping[str, str], cwd: str | os.PathLike[str]
) -> None:
    """Run a child of this interpreter: a script and its arguments, or `-m`. Raises AssertionError if it fails."""
    command = [sys.executable, *map(os.fspath, arguments)]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, errors="replace", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
