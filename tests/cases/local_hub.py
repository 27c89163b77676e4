"""A hub on this machine: the part of the Hugging Face Hub's HTTP interface by which files come and go."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_these_tests"


class LocalHub:
    """Repositories of files by commit, and what was asked for.

    Attributes:
        repositories: by "owner/name" commits in their order, each with its files.
        tags: commits by (repository, name).
        asked: the method and path of every request.
        private: repositories that need the token.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.tags: dict[tuple[str, str], str] = {}
        self.private: set[str] = set()
        self.asked: list[str] = []
        self.stored: dict[str, bytes] = {}
        self.url = ""

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        """Add a commit with these files beside those of the one before; its name."""
        commits = self.repositories.setdefault(repository, {})
        last = next(reversed(commits.values()), {})
        content = last | files
        digest = hashlib.sha1(repr((len(commits), sorted(content.items()))).encode()).hexdigest()
        commits[digest] = content
        return digest

    def find_commit(self, repository: str, revision: str) -> str | None:
        commits = self.repositories[repository]
        if revision == "main":
            return next(reversed(commits), None)
        revision = self.tags.get((repository, revision), revision)
        return revision if revision in commits else None


@contextmanager
def serve_hub() -> Iterator[LocalHub]:
    """A hub at `hub.url`, on a free port of the loopback device, while the block runs."""
    hub = LocalHub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        do_GET = do_POST = do_PUT = do_HEAD

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            chunked = self.headers.get("Transfer-Encoding") == "chunked"
            body = self.read_chunks() if chunked else self.rfile.read(length)
            path = self.path.partition("?")[0].replace("%2F", "/")
            hub.asked.append(f"{self.command} {path}")
            authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            status, headers, content = respond(hub, self.command, path, body, authorised)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def read_chunks(self) -> bytes:
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


Answer = tuple[int, dict[str, str], bytes]


def respond(hub: LocalHub, method: str, path: str, body: bytes, authorised: bool) -> Answer:
    """Status, headers and content."""
    parts = path.strip("/").split("/")
    if parts[:2] == ["api", "repos"] or "preupload" in parts or "commit" in parts or path.endswith("/objects/batch"):
        if not authorised:
            return refuse(401, "Invalid username or password.")
        return write(hub, parts, body)
    if parts[:2] == ["api", "validate-yaml"]:
        return say({"errors": [], "warnings": []})
    if parts[0] == "stored":
        if method == "PUT":
            hub.stored[parts[1]] = body
        return 200, {}, b""
    if len(parts) > 4 and parts[2] == "resolve":
        return read(hub, "/".join(parts[:2]), "/".join(parts[3:-1]), parts[-1], authorised)
    return refuse(404, "Not found")


def read(hub: LocalHub, repository: str, revision: str, name: str, authorised: bool) -> Answer:
    if repository not in hub.repositories or (repository in hub.private and not authorised):
        return refuse(401, "Repository not found", "RepoNotFound")
    commit = hub.find_commit(repository, revision)
    if commit is None:
        return refuse(404, "Invalid rev id", "RevisionNotFound")
    content = hub.repositories[repository][commit].get(name)
    if content is None:
        return refuse(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
    return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content


def write(hub: LocalHub, parts: list[str], body: bytes) -> Answer:
    if parts[:3] == ["api", "repos", "create"]:
        asked = json.loads(body)
        repository = f"{asked['organization']}/{asked['name']}"
        if repository in hub.repositories:
            return 409, {}, json.dumps({"url": f"{hub.url}/{repository}"}).encode()
        hub.repositories[repository] = {}
        hub.private |= {repository} if asked.get("private") or asked.get("visibility") == "private" else set()
        return say({"url": f"{hub.url}/{repository}", "id": repository})
    if "preupload" in parts:  # as the hub decides: text is sent with the commit, the rest before it
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "regular" if path.endswith(".md") else "lfs" for path in files}
        return say({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
    if parts[-1] == "batch":
        objects = [
            o | {"actions": {"upload": {"href": f"{hub.url}/stored/{o['oid']}", "header": {}}}}
            for o in json.loads(body)["objects"]
        ]
        return say({"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")
    repository, files = "/".join(parts[2:4]), {}
    if repository not in hub.repositories:
        return refuse(404, "Repository not found", "RepoNotFound")
    for line in body.splitlines():
        entry = json.loads(line)
        if entry["key"] == "file":
            files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        elif entry["key"] == "lfsFile":
            files[entry["value"]["path"]] = hub.stored[entry["value"]["oid"]]
    digest = hub.commit(repository, files)
    return say({"commitUrl": f"{hub.url}/{repository}/commit/{digest}", "commitOid": digest})


def say(content: object, kind: str = "application/json") -> Answer:
    return 200, {"Content-Type": kind}, json.dumps(content).encode()


def refuse(status: int, text: str, code: str = "", headers: dict[str, str] | None = None) -> Answer:
    told = {"X-Error-Message": text} | ({"X-Error-Code": code} if code else {}) | (headers or {})
    return status, told, json.dumps({"error": text}).encode()
