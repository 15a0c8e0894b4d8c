"""A small Hugging Face Hub on loopback, for tests that push and reload without a network.

    with HubServer() as hub:
        run_python(["train.py"], env=hub_environment(hub, tmp_path), cwd=tmp_path)
        assert "adapter_model.safetensors" in hub.files("tester/adapter")
        assert hub.unknown == []

huggingface_hub reads `HF_ENDPOINT` when it is imported, so the code that pushes belongs in a child process.

Model repositories with one branch, and LFS rather than Xet. Commits are real: a download that is pinned to a commit
gets the files of that commit. Writing, and reading a private repository, needs the server's token. A malformed or
corrupt upload is refused. Not checked: the metadata of a model card, which the real Hub parses.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test_token"
USER = "tester"

# What the real Hub's default .gitattributes sends to LFS, as far as training writes it.
_LFS_SUFFIXES = (".bin", ".h5", ".model", ".onnx", ".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".tar", ".zip")
_LFS_SIZE = 10 * 1024 * 1024


@dataclass(frozen=True)
class Request:
    """One answered request. `endpoint` is None where this server has none; `error` says what it refused."""

    method: str
    path: str
    status: int
    endpoint: str | None
    error: str = ""


@dataclass(frozen=True)
class Commit:
    """All files of a repository at a commit."""

    sha: str
    summary: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """Commits in the order of their arrival."""

    private: bool = False
    commits: list[Commit] = field(default_factory=list)

    def commit(self, summary: str, files: dict[str, bytes]) -> Commit:
        # The position makes every sha different, also that of two commits with the same files.
        content = json.dumps([len(self.commits), summary, {path: _oid(path, files[path]) for path in files}])
        self.commits.append(Commit(hashlib.sha1(content.encode()).hexdigest(), summary, files))
        return self.commits[-1]

    def at(self, revision: str) -> Commit:
        for commit in reversed(self.commits):
            if revision in ("main", commit.sha):
                return commit
        raise _HubError(404, f"no revision {revision!r}", "RevisionNotFound")


class HubServer:
    """Serves from entering to leaving the context; what was received can still be read afterwards."""

    def __init__(self, token: str = TOKEN, user: str = USER) -> None:
        self.token = token
        self.user = user
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self._announced: dict[str, int] = {}  # LFS sha256 -> size, from the batch request
        self._objects: dict[str, bytes] = {}  # LFS sha256 -> verified content
        self._lock = threading.Lock()
        # Port 0 asks for a free one. The socket is bound here, so `url` is valid at once.
        self._listener = _Listener(("127.0.0.1", 0), _Handler)
        self._listener.hub = self
        self._thread = threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_address[1]}"

    @property
    def unknown(self) -> list[str]:
        """Requests for endpoints that this server does not have; a test asserts that the list is empty."""
        return [f"{request.method} {request.path}" for request in self.requests if request.endpoint is None]

    @property
    def refused(self) -> list[str]:
        """Requests answered with an error, except for missing files or repositories (404) and existing ones (409)."""
        return [
            f"{request.status} {request.method} {request.path}: {request.error}"
            for request in self.requests
            if request.status >= 400 and request.status not in (404, 409)
        ]

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The files of a repository, by path."""
        return dict(self.repositories[repo_id].at("main").files)

    def commits(self, repo_id: str) -> list[Commit]:
        """What was committed, oldest first, without the empty commit that creates a repository."""
        return self.repositories[repo_id].commits[1:]

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown()
        self._listener.server_close()  # joins the threads of requests in flight
        self._thread.join()

    def _answer(self, call: _Call) -> _Reply:
        """One request at a time, since uploads come from several threads."""
        with self._lock:
            name, reply, error = self._dispatch(call)
            self.requests.append(Request(call.method, call.target, reply.status, name, error))
            return reply

    def _dispatch(self, call: _Call) -> tuple[str | None, _Reply, str]:
        path = urlsplit(call.target).path
        method = "GET" if call.method == "HEAD" else call.method
        for route in _ROUTES:
            match = route.pattern.fullmatch(path)
            if match is None or route.method != method:
                continue
            call.parts = {name: unquote(value or "") for name, value in match.groupdict().items()}
            try:
                if route.needs_token and not call.authorized:
                    raise _HubError(401, "Invalid credentials in Authorization header")
                return route.name, route.handle(self, call), ""
            except _HubError as refusal:
                return route.name, refusal.reply(), str(refusal)
            except (KeyError, TypeError, ValueError) as error:
                return route.name, _HubError(400, f"malformed request: {error!r}").reply(), repr(error)
            except Exception:
                # The client would otherwise only see a closed connection.
                return route.name, _HubError(500, "the test server failed").reply(), traceback.format_exc()
        missing = f"the test server has no endpoint {call.method} {path}"
        return None, _HubError(404, missing).reply(), missing


@dataclass
class _Call:
    method: str
    target: str
    body: bytes
    authorized: bool
    parts: dict[str, str] = field(default_factory=dict)  # what the route's pattern matched, unquoted

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    def json(self) -> dict[str, Any]:
        value = json.loads(self.body)
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, got {type(value).__name__}")
        return value


@dataclass(frozen=True)
class _Reply:
    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class _HubError(Exception):
    """An error answer. `code` is the X-Error-Code by which huggingface_hub chooses its exception."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": " ".join(message.split())[:200]}
        if code:
            self.headers["X-Error-Code"] = code
        if commit:
            self.headers["X-Repo-Commit"] = commit

    def reply(self) -> _Reply:
        return _json({"error": str(self)}, self.status, self.headers)


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> _Reply:
    return _Reply(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})


class _Listener(ThreadingHTTPServer):
    hub: HubServer
    # Not daemons, so that server_close() joins them: no thread of this server outlives its context.
    daemon_threads = False


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    # HTTP/1.0 closes after each answer, so that no idle connection keeps its thread alive.
    protocol_version = "HTTP/1.0"
    timeout = 30

    def _serve(self) -> None:
        hub = self.server.hub
        # The body is read also where the answer is an error: closing on unread data resets the connection.
        body = self._read_body()
        authorized = self.headers.get("Authorization") == f"Bearer {hub.token}"
        reply = hub._answer(_Call(self.command, self.path, body, authorized))
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    do_DELETE = do_GET = do_HEAD = do_PATCH = do_POST = do_PUT = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: `HubServer.requests` is the log."""


@dataclass(frozen=True)
class _Route:
    method: str
    pattern: re.Pattern[str]
    needs_token: bool
    name: str
    handle: Callable[[HubServer, _Call], _Reply]


_ROUTES: list[_Route] = []
_Handle = Callable[[HubServer, _Call], _Reply]


def _route(method: str, path: str, needs_token: bool | None = None) -> Callable[[_Handle], _Handle]:
    """Registers the endpoint of a path with the fields {repo}, {rev}, {path} and {oid}. Writing needs the token."""
    pattern = re.escape(path)
    # A slash within a revision arrives quoted, one within a path does not.
    fields = {"repo": r"[\w.-]+/[\w.-]+", "rev": "[^/]+", "path": ".+", "oid": "[0-9a-f]{64}"}
    for name, expression in fields.items():
        pattern = pattern.replace(re.escape("{" + name + "}"), f"(?P<{name}>{expression})")

    def register(handle: _Handle) -> _Handle:
        guarded = method != "GET" if needs_token is None else needs_token
        _ROUTES.append(_Route(method, re.compile(pattern), guarded, handle.__name__.lstrip("_"), handle))
        return handle

    return register


def _repository(hub: HubServer, call: _Call) -> Repository:
    repository = hub.repositories.get(call.parts["repo"])
    # As on the real Hub, a private repository does not exist for others.
    if repository is None or (repository.private and not call.authorized):
        raise _HubError(404, f"no repository {call.parts['repo']!r}", "RepoNotFound")
    return repository


def _is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Empty files are never LFS: the client commits them as regular ones."""
    return size > 0 and (path.endswith(_LFS_SUFFIXES) or size > _LFS_SIZE or b"\0" in sample[:512])


def _oid(path: str, data: bytes) -> str:
    """The hash by which the client skips unchanged files: sha256 of an LFS file, else the git blob id."""
    if _is_lfs(path, len(data), data):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _file_entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _oid(path, data)}
    if _is_lfs(path, len(data), data):
        entry["lfs"] = {"oid": entry["oid"], "size": len(data), "pointerSize": 134}
    return entry


# Accounts and repositories


@_route("GET", "/api/whoami-v2", needs_token=True)
def _whoami(hub: HubServer, call: _Call) -> _Reply:
    token = {"displayName": "test", "role": "write"}
    return _json({"type": "user", "name": hub.user, "orgs": [], "auth": {"accessToken": token}})


@_route("GET", "/api/agent-harnesses")
def _agent_harnesses(hub: HubServer, call: _Call) -> _Reply:
    """Fetched once by huggingface_hub for its user agent."""
    return _json({"standardEnvVars": [], "harnesses": {}})


@_route("POST", "/api/repos/create")
def _create_repo(hub: HubServer, call: _Call) -> _Reply:
    request = call.json()
    if request.get("type", "model") != "model":
        raise _HubError(400, f"only model repositories, got {request['type']!r}")
    repo_id = f"{request.get('organization') or hub.user}/{request['name']}"
    answer = {"name": repo_id, "id": repo_id, "url": f"{hub.url}/{repo_id}"}
    if repo_id in hub.repositories:
        return _json({**answer, "error": "You already created this model repo"}, 409)
    # Older clients send a flag instead of the visibility.
    private = request.get("visibility") == "private" or bool(request.get("private"))
    hub.repositories[repo_id] = Repository(private=private)
    hub.repositories[repo_id].commit("initial commit", {})
    return _json(answer)


# Reading


@_route("GET", "/api/models/{repo}/revision/{rev}")
@_route("GET", "/api/models/{repo}")
def _model_info(hub: HubServer, call: _Call) -> _Reply:
    repository = _repository(hub, call)
    commit = repository.at(call.parts.get("rev", "main"))
    siblings = [
        {"rfilename": path, "size": len(data), "blobId": _oid(path, data)} for path, data in commit.files.items()
    ]
    repo_id = call.parts["repo"]
    names = {"id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0]}
    return _json({**names, "sha": commit.sha, "private": repository.private, "tags": [], "siblings": siblings})


@_route("GET", "/api/models/{repo}/tree/{rev}/{path}")
@_route("GET", "/api/models/{repo}/tree/{rev}")
def _tree(hub: HubServer, call: _Call) -> _Reply:
    commit = _repository(hub, call).at(call.parts["rev"])
    folder = call.parts.get("path", "").strip("/")
    prefix = f"{folder}/" if folder else ""
    recursive = call.query.get("recursive", ["false"])[0].lower() == "true"
    entries: dict[str, dict[str, Any]] = {}
    for path, data in commit.files.items():
        if not path.startswith(prefix):
            continue
        parents = path[len(prefix) :].split("/")[:-1]
        for depth in range(1, len(parents) + 1 if recursive else min(len(parents), 1) + 1):
            name = prefix + "/".join(parents[:depth])
            oid = hashlib.sha1(f"{commit.sha} {name}".encode()).hexdigest()
            entries[name] = {"type": "directory", "path": name, "size": 0, "oid": oid}
        if recursive or not parents:
            entries[path] = _file_entry(path, data)
    if folder and not entries:
        raise _HubError(404, f"no folder {folder!r}", "EntryNotFound", commit.sha)
    return _json([entries[name] for name in sorted(entries)])


@_route("GET", "/{repo}/resolve/{rev}/{path}")
def _resolve(hub: HubServer, call: _Call) -> _Reply:
    commit = _repository(hub, call).at(call.parts["rev"])
    path = call.parts["path"]
    if path not in commit.files:
        raise _HubError(404, f"no file {path!r}", "EntryNotFound", commit.sha)
    data = commit.files[path]
    headers = {"ETag": f'"{_oid(path, data)}"', "X-Repo-Commit": commit.sha}
    return _Reply(data, headers=headers)


# Writing: preupload says which files are LFS, these are sent, then one commit names everything.


@_route("POST", "/api/validate-yaml", needs_token=False)
def _validate_yaml(hub: HubServer, call: _Call) -> _Reply:
    if not isinstance(call.json()["content"], str):
        raise ValueError("content must be text")
    return _json({"errors": [], "warnings": []})


@_route("POST", "/api/models/{repo}/preupload/{rev}")
def _preupload(hub: HubServer, call: _Call) -> _Reply:
    known = _repository(hub, call).at(call.parts["rev"]).files
    answers = []
    for file in call.json()["files"]:
        path = file["path"]
        lfs = _is_lfs(path, file["size"], base64.b64decode(file["sample"]))
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        answers.append({**answer, "oid": _oid(path, known[path])} if path in known else answer)
    return _json({"files": answers})


@_route("POST", "/{repo}.git/info/lfs/objects/batch")
def _lfs_batch(hub: HubServer, call: _Call) -> _Reply:
    _repository(hub, call)
    request = call.json()
    if request["operation"] != "upload" or "basic" not in request["transfers"]:
        raise _HubError(400, f"only basic uploads, got {request['operation']!r} by {request['transfers']}")
    objects = []
    for wanted in request["objects"]:
        oid, size = str(wanted["oid"]), int(wanted["size"])
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in hub._objects:  # without actions, the client takes the content as already there
            hub._announced[oid] = size
            verify = f"{hub.url}/{call.parts['repo']}.git/info/lfs/verify"
            answer["actions"] = {"upload": {"href": f"{hub.url}/lfs/{oid}"}, "verify": {"href": verify}}
        objects.append(answer)
    return _json({"transfer": "basic", "objects": objects})


@_route("PUT", "/lfs/{oid}", needs_token=False)
def _lfs_put(hub: HubServer, call: _Call) -> _Reply:
    """As in the real Hub's storage, no token is needed, but only announced content is accepted."""
    oid = call.parts["oid"]
    if oid not in hub._announced:
        raise _HubError(403, f"LFS object {oid} was not announced")
    if len(call.body) != hub._announced[oid]:
        raise _HubError(400, f"LFS object {oid}: got {len(call.body)} bytes, expected {hub._announced[oid]}")
    digest = hashlib.sha256(call.body).hexdigest()
    if digest != oid:
        raise _HubError(400, f"LFS object: got content of sha256 {digest}, expected {oid}")
    hub._objects[oid] = call.body
    return _Reply(b"")


@_route("POST", "/{repo}.git/info/lfs/verify")
def _lfs_verify(hub: HubServer, call: _Call) -> _Reply:
    request = call.json()
    _lfs_object(hub, request["oid"], request["size"])
    return _json({})


@_route("POST", "/api/models/{repo}/commit/{rev}")
def _commit(hub: HubServer, call: _Call) -> _Reply:
    repository = _repository(hub, call)
    if call.parts["rev"] != "main":
        raise _HubError(400, "the test server has one branch, main")
    if "create_pr" in call.query:
        raise _HubError(400, "the test server has no pull requests")
    parent = repository.at("main")
    header, *operations = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    if header["key"] != "header":
        raise _HubError(400, f"a commit starts with its header, got {header['key']!r}")
    # Changes go to a copy, so that a refused commit leaves the repository as it was.
    files = dict(parent.files)
    for operation in operations:
        _apply(hub, files, operation["key"], operation["value"])
    commit = repository.commit(header["value"]["summary"], files)
    url = f"{hub.url}/{call.parts['repo']}/commit/{commit.sha}"
    return _json({"success": True, "commitOid": commit.sha, "commitUrl": url})


def _apply(hub: HubServer, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if not path or any(part in ("", ".", "..") for part in path.rstrip("/").split("/")):
        raise _HubError(400, f"not a path within a repository: {path!r}")
    if key == "file":
        data = base64.b64decode(value["content"], validate=True)
        if _is_lfs(path, len(data), data):
            raise _HubError(400, f"{path!r} must be an LFS file: it is binary or too large")
        files[path] = data
    elif key == "lfsFile":
        files[path] = _lfs_object(hub, value["oid"], value.get("size"))
    else:
        raise _HubError(400, f"unknown commit operation {key!r}")


def _lfs_object(hub: HubServer, oid: str, size: int | None) -> bytes:
    if oid not in hub._objects:
        raise _HubError(400, f"LFS object {oid} was not uploaded")
    data = hub._objects[oid]
    if size is not None and len(data) != size:
        raise _HubError(400, f"LFS object {oid}: got {len(data)} bytes, expected {size}")
    return data


# Child processes


def hub_environment(hub: HubServer, home: str | os.PathLike[str]) -> dict[str, str]:
    """The environment of a child process that uses `hub` for everything and keeps its cache under `home`."""
    # Any setting of the machine could send the child elsewhere: a cache, a mirror, offline mode, a proxy.
    foreign = re.compile(r"HF_|HUGGING_?FACE|TRANSFORMERS_|\w+_PROXY$", re.IGNORECASE)
    env = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    return {
        **env,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(Path(home) / "huggingface"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "127.0.0.1",
    }


def run_python(
    arguments: Sequence[str | os.PathLike[str]],
    env: Mapping[str, str],
    cwd: str | os.PathLike[str],
    timeout: float = 300,
) -> None:
    """Runs a child of this interpreter, with a script and its arguments, or `-m`.

    Raises AssertionError with the whole output where the exit status is not 0 or `timeout` seconds have passed.
    """
    # A process group of its own, so that a child which hangs is ended together with what it started.
    child = subprocess.Popen(
        [sys.executable, *map(os.fspath, arguments)],
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=timeout)
        ending = f"exit status {child.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        ending = f"not done after {timeout} s"
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    if ending != "exit status 0":
        raise AssertionError(f"child process: {ending}\n{output}")
