"""Checkpoints from strangers: no pickle is loaded, and folders of Megatron itself are refused."""

import hashlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from roll_sft.checkpoint.reader import Reader
from roll_sft.checkpoint.resume import find_checkpoint
from roll_sft.config.build import build_config
from roll_sft.convert import command

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint_schema_2.tar.gz"


class Hostile:
    """Makes the folder `path` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole checkpoint of a small model."""
    folder = tmp_path / "checkpoints" / "step_00000002"
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(folder, filter="data")
    return folder


def plant(checkpoint: Path, name: str, content: bytes) -> None:
    """Put a file into `checkpoint` and list it in the manifest, as who made the folder would."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][name] = {"size": len(content), "sha256": digest}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_no_pickle_in_a_checkpoint_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    hostile = Hostile(made)
    assert command.main([str(checkpoint), "--output", str(tmp_path / "before")]) == 0
    shard = (checkpoint / "__0_0.distcp").read_bytes()  # Megatron-Core's objects lie behind tensors
    plant(checkpoint, "__0_0.distcp", shard + saved([hostile]))
    plant(checkpoint, ".metadata", pickle.dumps(hostile))
    plant(checkpoint, "common.pt", saved(hostile))
    plant(checkpoint, "extra.pkl", pickle.dumps(hostile))
    assert find_checkpoint(build_config({}), checkpoint.parent) == checkpoint
    reader = Reader(checkpoint)
    assert reader.read("decoder.final_layernorm.weight").isfinite().all()
    assert command.main([str(checkpoint), "--output", str(tmp_path / "after")]) == 0
    assert not made.exists()
    before, after = (tmp_path / name / "model.safetensors" for name in ("before", "after"))
    assert before.read_bytes() == after.read_bytes()
    assert not list((tmp_path / "after").rglob("*.p[kt]*"))
    for load in (
        lambda: pickle.loads((checkpoint / ".metadata").read_bytes()),
        lambda: torch.load(checkpoint / "common.pt", weights_only=False),
    ):
        load()  # as PyTorch and Megatron-Core do
        made.rmdir()


def test_a_folder_that_megatron_core_wrote_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("manifest.json", "index.json"):
        (checkpoint / name).unlink()
    output = tmp_path / "model"
    assert command.main(["--checkpoint", str(checkpoint), "--output", str(output)]) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{checkpoint}: no readable manifest.json")
    assert not output.exists()
