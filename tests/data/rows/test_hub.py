"""Datasets of the hub, from a hub on this machine that answers as the real one does."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from pathlib import Path

import pytest

from roll_sft.base.errors import DataError
from roll_sft.data.rows.files import find_files

COMMIT = "a" * 40
FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "data/train-00000-of-00002.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
    "data/train-00001-of-00002.jsonl": b'{"text": "three"}\n',
    "data/test-00000-of-00001.jsonl": b'{"text": "four"}\n',
}
READ = """
import json, sys
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.base.errors import DataError
from tests.data.rows.reading import read_conversations
for split in (None, "train", "test", "dev", "train[:1]"):
    try:
        rows = read_conversations("org/name", ColumnKeys(), split=split)
        print(json.dumps([row.text for row in rows]))
    except DataError as error:
        print(json.dumps(str(error)))
try:
    list(read_conversations("org/none", ColumnKeys()))
except DataError as error:
    print(json.dumps(str(error)))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The answers that `datasets` asks of the hub for one dataset, org/name."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path.startswith("/datasets/org/name/resolve/"):
            name = path.split("/", 6)[6]
            known = name in FILES
            code = {"X-Repo-Commit": COMMIT} if known else {"X-Error-Code": "EntryNotFound"}
            self.answer(FILES.get(name), **code)
        elif path.startswith(f"/api/datasets/org/name/tree/{COMMIT}"):
            folder = path.partition(COMMIT)[2].lstrip("/")
            self.answer(json.dumps(list(entries(folder, query))).encode())
        elif path.startswith("/api/datasets/org/name"):
            files = [{"rfilename": name} for name in FILES]
            facts = {"id": "org/name", "sha": COMMIT, "private": False, "tags": []}
            rest = {"downloads": 0, "likes": 0, "siblings": files, "disabled": False}
            self.answer(json.dumps({**facts, **rest, "gated": False}).encode())
        else:
            self.answer(None, **{"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_POST = do_GET  # noqa: N815 - the names of the library

    def answer(self, content: bytes | None, **headers: str) -> None:
        self.send_response(404 if content is None else 200)
        content = content or b""
        etag = f'"{sha1(content).hexdigest()}"'
        for name, value in {**headers, "ETag": etag, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def entries(folder: str, query: str) -> Iterator[dict[str, object]]:
    if not folder and "recursive=true" not in query.lower():
        yield {"type": "directory", "path": "data", "size": 0, "oid": "d"}
    for name, content in FILES.items():
        if name.startswith(folder) and (folder or "/" not in name):
            oid = sha1(content).hexdigest()
            yield {"type": "file", "path": name, "size": len(content), "oid": oid}


@pytest.mark.slow  # another process: libraries read the address of the hub when they are imported
def test_a_dataset_of_the_hub_is_read_split_by_split(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    online = {"HF_DATASETS_OFFLINE": "0", "HF_HUB_OFFLINE": "0", "DO_NOT_TRACK": "1"}
    command = [sys.executable, "-c", READ]
    ended = subprocess.run(
        command, env={**os.environ, **home, **online}, capture_output=True, text=True, check=True
    )
    server.shutdown()
    server.server_close()
    several, train, test, none, part, unknown = map(json.loads, ended.stdout.splitlines())
    assert several == "org/name: has the splits train, test; choose one as the source's split"
    assert train == ["one", "two", "three"]
    assert test == ["four"]
    assert none.startswith("org/name: has no split 'dev' (found: train, test)")
    assert part.startswith("org/name: split 'train[:1]' is no name; give one such as train")
    assert unknown.startswith("org/none: no such file or folder here, and the hub does not give")


def test_a_missing_file_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("data/rows.jsonl", "data/rows.parquet", "data/rows.json.gz"):
        with pytest.raises(DataError, match=f"^{path}: "):
            find_files(path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").mkdir()
    with pytest.raises(DataError, match=r"^org/name: "):
        find_files("org/name")
