"""A model named by a hub id: fetched once, at one commit, and then an ordinary folder.

The hub is a stand-in on this machine that speaks the few requests of a snapshot; the client is the
real `huggingface_hub`.
"""

import hashlib
import json
import multiprocessing
import pickle
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from roll_sft.base.errors import ConfigError, ResourceError
from roll_sft.models.families.qwen import QWEN2
from roll_sft.models.files.hub import HubModel
from roll_sft.models.files.model_folder import local_model
from roll_sft.models.source import ModelSource
from tests.parity import model_config, write_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "README.md": b"---\nlicense: mit\n---",
    "LICENSE": b"as you like",
    "tokenizer.json": b"[]",  # not equal: the client stores equal content once
    "pytorch_model.bin": b"a pickle",
    "consolidated.safetensors": b"the weights again",
    "original/model.safetensors": b"and again",
}


class Hub(ThreadingHTTPServer):
    """Serves one public model, `org/model`, and counts what is asked of it."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests = files, Counter[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        name = path.rpartition(f"/resolve/{COMMIT}/")[2]
        if path.startswith("/api/models/org/model/tree/"):
            files = self.server.files.items()
            entries = [
                {"type": "file", "path": file, "size": len(content), "oid": "0" * 40}
                for file, content in files
            ]
            body = json.dumps(entries).encode()
        elif path.startswith("/api/models/org/model"):
            siblings = [{"rfilename": name} for name in self.server.files]
            body = json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith("/org/model/") and name in self.server.files:
            body = self.server.files[name]
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if with_body:
            self.server.requests[name] += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    save_file({"weight": torch.arange(4.0)}, tmp_path / "model.safetensors")
    server = Hub({**FILES, "model.safetensors": (tmp_path / "model.safetensors").read_bytes()})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_is_fetched_once_without_what_is_not_needed(hub: Hub) -> None:
    folder, model = local_model("org/model", with_weights=True)
    assert model == HubModel("org/model", COMMIT)
    names = sorted(path.name for path in Path(folder).rglob("*") if path.is_file())
    assert names == ["LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.json"]
    asked = hub.requests["model.safetensors"]
    assert local_model("org/model", with_weights=True) == (folder, model)
    assert hub.requests["model.safetensors"] == asked == 1


def test_a_dry_run_needs_no_weights(hub: Hub) -> None:
    local_model("org/model", with_weights=False)
    assert hub.requests["config.json"] == 1
    assert hub.requests["model.safetensors"] == 0


def test_tensors_travel_by_name_and_are_found_in_the_cache_of_the_node(hub: Hub) -> None:
    _, model = local_model("org/model", with_weights=True)
    assert model is not None
    shape = QWEN2.shape(model_config("qwen2", num_layers=1))
    sent = pickle.dumps(ModelSource(shape, hub=model))
    hub.shutdown()  # a worker finds it without the network
    assert pickle.loads(sent).tensors.read("weight").tolist() == [0.0, 1.0, 2.0, 3.0]


def test_processes_of_one_node_fetch_it_once(hub: Hub) -> None:
    context = multiprocessing.get_context("fork")
    model = HubModel("org/model", COMMIT)
    processes = [context.Process(target=model.fetch) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert hub.requests["model.safetensors"] == 1


def test_a_copy_of_a_killed_download_is_completed(hub: Hub) -> None:
    folder, _ = local_model("org/model", with_weights=True)
    (Path(folder) / "model.safetensors").unlink()
    shutil.rmtree(Path(folder).parents[1] / "blobs")
    local_model("org/model", with_weights=True)
    assert (Path(folder) / "model.safetensors").stat().st_size > 0


def test_an_unknown_name_is_refused_with_the_remedy(hub: Hub) -> None:
    with pytest.raises(ConfigError, match=r"model\.path: 'org/other'.*HF_TOKEN"):
        local_model("org/other", with_weights=True)


def test_a_hub_that_does_not_answer_is_a_missing_resource(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ResourceError, match=r"model\.path: 'org/model'.*HF_ENDPOINT"):
        local_model("org/model", with_weights=True)


def test_a_folder_comes_before_a_hub_id(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_model("org/model", with_weights=True) == (str(tmp_path / "org" / "model"), None)
    assert not hub.requests


def test_an_adapter_is_merged_into_a_base_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from roll_sft.convert import merge_lora
    from tests import lora

    base = write_model(tmp_path / "base", num_layers=1)
    adapter = lora.write_adapter(base, tmp_path / "adapter", r=2, target_modules="all-linear")
    hub.files = {path.name: path.read_bytes() for path in base.iterdir()}
    for name, model in (("hub", "org/model"), ("folder", str(base))):
        words = ["--adapter", str(adapter), "--base", model, "--output", str(tmp_path / name)]
        assert merge_lora.main(words) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("hub", "folder")]
    assert weights[0] == weights[1]
