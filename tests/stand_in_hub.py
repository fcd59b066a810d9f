"""A stand-in of the hub's HTTP API, on this machine: what huggingface_hub's client calls to upload.

It is no hub: it keeps repositories in memory, in the way in which the client sees them. Small files
come in the commit, large ones by LFS, or by Xet, whose storage is a folder here.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_" + "w" * 20, "hf_" + "r" * 20
USER = "me"


@dataclass
class Repository:
    """Branch -> path -> content, and the titles of its commits, newest last."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    titles: list[tuple[str, str]] = field(default_factory=list)  # (branch, title)


class StandInHub:
    """The repositories, and what was asked of the server."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.requests: list[str] = []
        self.failures = 0  # requests that are answered by 503
        self.expired_urls = 0  # uploads whose signed address is too old, answered by 403
        self.fail_after_uploads = False  # refuse commits, as a hub that goes away
        self.xet: Path | None = None  # the folder of Xet's storage, instead of LFS
        self.url = ""


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: "Server"
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def _answer(self, code: int, value: Any = None, **headers: str) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(code)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = b""
            while size := int(self.rfile.readline(), 16):
                parts += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return parts
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _route(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.server.hub.requests.append(f"{self.command} {path}")
        if self.server.hub.failures > 0:
            self.server.hub.failures -= 1
            self._answer(503, {"error": "busy"})
            return
        if path.startswith("/objects/") and self.server.hub.expired_urls > 0:
            self.server.hub.expired_urls -= 1
            self._answer(403, {"error": "Request has expired"})
            return
        if path.startswith("/objects/"):
            self.server.hub.objects[path.rpartition("/")[2]] = body
            self._answer(200)
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (WRITER, READER):
            self._answer(401, {"error": "Invalid username or password."})
        else:
            self._act(path, body, can_write=token == WRITER)

    do_GET = do_POST = do_PUT = _route  # noqa: N815 -- the names of BaseHTTPRequestHandler

    def _act(self, path: str, body: bytes, *, can_write: bool) -> None:
        if path == "/api/whoami-v2":
            self._answer(200, {"name": USER, "type": "user"})
        elif path == "/api/repos/create":
            self._create(json.loads(body), can_write=can_write)
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(/.*)?", path):
            repository = self.server.hub.repositories.get(match[1])
            if repository is None:
                self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            else:
                self._of(repository, match[1], match[2] or "", body, can_write)
        else:
            self._answer(404, {"error": path})

    def _create(self, asked: dict[str, Any], *, can_write: bool) -> None:
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.server.hub.url}/{name}"
        if not can_write or not name.startswith(f"{USER}/"):
            self._answer(403, {"error": f"You don't have the rights to create {name}"})
        elif name in self.server.hub.repositories:
            self._answer(409, {"error": "You already created this model repo", "url": url})
        else:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.server.hub.repositories[name] = Repository(private)
            self._answer(200, {"url": url, "name": name})

    def _of(
        self, repository: Repository, name: str, rest: str, body: bytes, can_write: bool
    ) -> None:
        _, verb, *more = rest.split("/", 2)[:3] if rest else ("", "")
        branch = (more[0] if more else "main").split("?")[0]
        files = repository.branches.get(branch)
        if verb == "auth-check":
            allowed = can_write or not more
            self._answer(200 if allowed else 403, {} if allowed else {"error": "read only"})
        elif not can_write and self.command != "GET":
            self._answer(403, {"error": "Forbidden: the token may read only"})
        elif verb == "branch":
            taken = branch in repository.branches
            repository.branches.setdefault(branch, dict(repository.branches["main"]))
            self._answer(409 if taken else 201, {"error": "exists"} if taken else None)
        elif verb == "xet-write-token":
            self._xet_token()
        elif files is None:
            self._answer(404, {"error": "no such branch"}, X_Error_Code="RevisionNotFound")
        elif verb == "preupload":
            self._answer(200, {"files": [_mode(files, each) for each in json.loads(body)["files"]]})
        elif verb == "commit":
            self._commit(repository, name, branch, body)
        elif verb == "tree":
            rows = [{"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                    for path, content in files.items()]  # fmt: skip
            self._answer(200, rows)
        else:
            siblings = [{"rfilename": path} for path in files]
            self._answer(
                200,
                {
                    "id": name,
                    "sha": "0" * 40,
                    "private": repository.private,
                    "siblings": siblings,
                },
            )

    def _xet_token(self) -> None:
        if self.server.hub.xet is None:
            self._answer(404, {"error": "no Xet here"})
            return
        known = {
            "casUrl": f"local://{self.server.hub.xet}",
            "accessToken": "x",
            "exp": int(time.time()) + 3600,
        }
        self._answer(
            200,
            known,
            X_Xet_Cas_Url=known["casUrl"],
            X_Xet_Access_Token="x",
            X_Xet_Token_Expiration=str(known["exp"]),
        )

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            found = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.server.hub.objects:
                found["actions"] = {
                    "upload": {"href": f"{self.server.hub.url}/objects/{each['oid']}"}
                }
            objects.append(found)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repository: Repository, name: str, branch: str, body: bytes) -> None:
        if self.server.hub.fail_after_uploads:
            self._answer(500, {"error": "gone"})
            return
        files = repository.branches[branch]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.titles.append((branch, value["summary"]))
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.hub.objects.get(
                    value["oid"], value["oid"].encode()
                )
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        oid = hashlib.sha1(body).hexdigest()
        self._answer(
            200, {"commitUrl": f"{self.server.hub.url}/{name}/commit/{oid}", "commitOid": oid}
        )


class Server(ThreadingHTTPServer):
    """The server of one stand-in."""

    hub: StandInHub


def _mode(files: dict[str, bytes], asked: dict[str, Any]) -> dict[str, Any]:
    path = asked["path"]
    is_large = path.endswith((".safetensors", ".bin"))
    known = files.get(path)
    oid = None
    if known is not None:
        oid = hashlib.sha256(known).hexdigest() if is_large else _oid(known)
    mode = "lfs" if is_large else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def stand_in_hub() -> Iterator[StandInHub]:
    """A running stand-in; its address is `url`."""
    hub = StandInHub()
    with Server(("127.0.0.1", 0), Handler) as server:
        server.hub = hub
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
