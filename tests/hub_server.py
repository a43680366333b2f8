"""A Hugging Face Hub in memory: what `huggingface_hub` calls to create, fill and read model repos, over real HTTP.

`with HubServer(TOKEN) as hub:` serves at `hub.url`. Large files go by LFS to the server itself; Xet is not offered.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

USER = "me"
SIGNATURE = "signed"  # uploads carry no token but a signed address, as those to the Hub's storage do


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def said(status: int = 200, **content: Any) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


def refused(status: int, message: str, code: str = "") -> Answer:
    return Answer(status, json.dumps({"error": message}).encode(), {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """As the Hub names contents: git's hash, or SHA-256 for LFS."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=lambda: {"0" * 40: {}})

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, File]:
        return self.commits[self.head]


class HubServer(ThreadingHTTPServer):
    """`repos`, `blobs` (LFS contents by their SHA-256) and `requests` ("METHOD /path", in order) are there to look at."""

    daemon_threads = True

    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.url = token, f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self._failures: dict[str, int] = {}

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def publish(self, repo: str, files: Mapping[str, bytes]) -> str:
        """A public repo with `files`, or the next commit of one, with nothing else in it. Returns the commit."""
        commits = self.repos.setdefault(repo, Repo(False, {})).commits
        commit = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits[commit] = {path: File(content, lfs=False) for path, content in files.items()}
        return commit

    def fail_once(self, request: str, status: int) -> None:
        """The next request whose "METHOD /path" contains `request` is answered by `status`."""
        self._failures[request] = status

    def answer(self, method: str, address: str, token: str | None, body: bytes) -> Answer:
        path = unquote(urlsplit(address).path)
        self.requests.append(f"{method} {path}")
        for request in list(self._failures):
            if request in self.requests[-1]:
                return refused(self._failures.pop(request), "told to fail")
        if token is not None and token != self.token:
            return refused(401, "Invalid credentials in Authorization header")
        for wanted, pattern, reply in ROUTES:
            if method in wanted and (match := re.fullmatch(pattern, path)):
                groups = match.groupdict()
                repo = self.repos.get(groups.get("repo", ""))
                if "repo" in groups and (repo is None or (repo.private and token is None)):
                    return refused(404 if token else 401, "Repository not found", "RepoNotFound")
                if method in ("POST", "PUT") and token is None and urlsplit(address).query != SIGNATURE:
                    return refused(401, "Invalid username or password.")
                if method in ("POST", "PUT") and "repo" in groups and not groups["repo"].startswith(f"{USER}/"):
                    return refused(403, "Forbidden: you must use a write token")
                return reply(self, body, **groups)
        return refused(404, f"no such address: {method} {path}")


def visit(hub: HubServer, patch: pytest.MonkeyPatch, home: Path) -> None:
    """Makes `hub` the Hub of this process, which is not logged in and has its cache in `home`."""
    files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    changes = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": files,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    for name, value in (changes | {"HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}).items():
        patch.setattr(constants, name, value)
    patch.delenv("HF_TOKEN", raising=False)


def create(hub: HubServer, body: bytes) -> Answer:
    wanted = json.loads(body)
    if wanted["organization"] != USER:
        return refused(403, f'You don\'t have the rights to create a model under the namespace "{wanted["organization"]}".')
    name = f"{USER}/{wanted['name']}"
    known = name in hub.repos
    hub.repos.setdefault(name, Repo(wanted["visibility"] == "private"))
    return said(409 if known else 200, url=f"{hub.url}/{name}")


def validate_card(hub: HubServer, body: bytes) -> Answer:
    """Of the Hub's rules those about the licence's identifier and the base model's id."""
    header = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
    wrong = [
        f'"{name}" with value "{header.get(name)}" is not valid.'
        for name, pattern in {"license": r"[a-z0-9.+-]+", "base_model": r"None|[\w.-]+/[\w.-]+"}.items()
        if not re.fullmatch(pattern, str(header.get(name)))
    ]  # fmt: skip
    return said(400 if wrong else 200, errors=[{"message": message} for message in wrong], warnings=[])


def preupload(hub: HubServer, body: bytes, repo: str) -> Answer:
    there = hub.repos[repo].files
    return said(
        files=[
            {
                "path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular", "shouldIgnore": False,
                "oid": there[file["path"]].oid if file["path"] in there else None,
            }
            for file in json.loads(body)["files"]
        ]
    )  # fmt: skip


def lfs_batch(hub: HubServer, body: bytes, repo: str) -> Answer:
    """Where to put each object; no actions for one that is already there."""
    objects = json.loads(body)["objects"]
    for one in objects:
        if one["oid"] not in hub.blobs:
            one["actions"] = {
                "upload": {"href": f"{hub.url}/storage/{one['oid']}?{SIGNATURE}"},
                "verify": {"href": f"{hub.url}/{repo}.git/info/lfs/objects/verify"},
            }
    return said(transfer="basic", objects=objects)


def lfs_store(hub: HubServer, body: bytes, oid: str) -> Answer:
    if hashlib.sha256(body).hexdigest() != oid:
        return refused(400, "the content does not have this hash")
    hub.blobs[oid] = body
    return Answer(200)


def lfs_verify(hub: HubServer, body: bytes, repo: str) -> Answer:
    return Answer(200) if json.loads(body)["oid"] in hub.blobs else refused(404, "no such object")


def commit(hub: HubServer, body: bytes, repo: str) -> Answer:
    files = dict(hub.repos[repo].files)
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
        elif line["key"] == "lfsFile":
            if value["oid"] not in hub.blobs:
                return refused(400, f"the LFS object of {value['path']} was not uploaded")
            files[value["path"]] = File(hub.blobs[value["oid"]], lfs=True)
    commits = hub.repos[repo].commits
    sha = hashlib.sha1(f"{len(commits)} {[(path, file.oid) for path, file in files.items()]}".encode()).hexdigest()
    commits[sha] = files
    return said(success=True, commitOid=sha, commitUrl=f"{hub.url}/{repo}/commit/{sha}")


def change(hub: HubServer, body: bytes, repo: str) -> Answer:
    hub.repos[repo].private = json.loads(body)["visibility"] == "private"
    return said()


def info(hub: HubServer, body: bytes, repo: str, revision: str | None = None) -> Answer:
    found = hub.repos[repo]
    sha = found.head if revision in (None, "main") else str(revision)
    if sha not in found.commits:
        return refused(404, "Invalid rev id", "RevisionNotFound")
    return said(id=repo, sha=sha, private=found.private, siblings=[{"rfilename": path} for path in found.commits[sha]])


def tree(hub: HubServer, body: bytes, repo: str, revision: str) -> Answer:
    if revision not in hub.repos[repo].commits:
        return refused(404, "Invalid rev id", "RevisionNotFound")
    entries = [
        {"type": "file", "path": path, "oid": file.oid, "size": len(file.content)}
        | ({"lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 134}} if file.lfs else {})
        for path, file in hub.repos[repo].commits[revision].items()
    ]
    return Answer(200, json.dumps(entries).encode())


def resolve(hub: HubServer, body: bytes, repo: str, revision: str, path: str) -> Answer:
    file = hub.repos[repo].commits[revision].get(path)
    if file is None:
        return refused(404, "Entry not found", "EntryNotFound")
    return Answer(200, file.content, {"ETag": f'"{file.oid}"', "X-Repo-Commit": revision})


API, REPO = r"/api/models/(?P<repo>[^/]+/[^/]+)", r"/(?P<repo>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate_card),
    ("POST", API + "/preupload/main", preupload),
    ("POST", REPO + r"\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", REPO + r"\.git/info/lfs/objects/verify", lfs_verify),
    ("PUT", "/storage/(?P<oid>[0-9a-f]+)", lfs_store),
    ("POST", API + "/commit/main", commit),
    ("PUT", API + "/settings", change),
    ("GET", API, info),
    ("GET", API + "/revision/(?P<revision>[^/]+)", info),
    ("GET", API + "/tree/(?P<revision>[^/]+)", tree),
    ("HEAD GET", REPO + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization")
        answer = self.server.answer(self.command, self.path, token and token.removeprefix("Bearer "), body)
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *_: object) -> None:
        pass
