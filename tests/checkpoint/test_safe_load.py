"""Checkpoints from strangers: what a pickle in one could run, and that it does not."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
)

from roll_sft.base.errors import CheckpointError
from roll_sft.checkpoint.reader import Reader
from roll_sft.checkpoint.safe_load import check_pickles, load_metadata


class Hostile:
    """Makes `path` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def write_checkpoint(
    folder: Path,
    *,
    extra_state: bytes | None = None,
    file: str = "__0_0.distcp",
    value: object = None,
) -> None:
    """The pickles of a checkpoint folder: `value` in its metadata, an object among its shards."""
    content = saved([None]) if extra_state is None else extra_state
    (folder / "__0_0.distcp").write_bytes(b"before" + content)
    name = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4"
    metadata = Metadata(
        state_dict_metadata={name: BytesStorageMetadata()},
        planner_data=value,
        storage_data={MetadataIndex(name): _StorageInfo(file, len(b"before"), len(content))},
    )
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "common.pt").write_bytes(saved({"step": 1, "state": torch.ones(2)}))


def test_a_folder_of_plain_values_passes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    check_pickles(tmp_path)
    assert load_metadata(tmp_path).state_dict_metadata.keys()


def test_metadata_that_would_run_a_command_is_refused_by_name(tmp_path: Path) -> None:
    made = tmp_path / "made"
    write_checkpoint(tmp_path, value=Hostile(made))
    for refuses in (check_pickles, load_metadata, Reader):
        with pytest.raises(CheckpointError, match=r"\.metadata: names posix\.mkdir"):
            refuses(tmp_path)
        assert not made.exists()
    FileSystemReader(tmp_path).read_metadata()  # what torch and Megatron-Core do
    assert made.exists()


@pytest.mark.parametrize("name", ["common.pt", "optimizer/shard_0_1.pt"])
def test_a_hostile_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    write_checkpoint(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(saved({"args": Hostile(made)}))
    with pytest.raises(CheckpointError, match=r"shard_0_1|common.*names posix\.mkdir"):
        check_pickles(tmp_path)
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists()


def test_a_hostile_object_among_the_shards_is_refused_by_name(tmp_path: Path) -> None:
    made = tmp_path / "made"
    content = saved([Hostile(made)])
    write_checkpoint(tmp_path, extra_state=content)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: .*names posix\.mkdir"):
        check_pickles(tmp_path)
    assert not made.exists()
    torch.load(io.BytesIO(content), weights_only=False)  # what torch's default planner does
    assert made.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps([None]), "not in the form that torch.save gives"),
        (saved([os.getcwd], pickle_protocol=4), "names classes in a way that torch.save never"),
        (saved([io.BytesIO(pickle.dumps(1))]), "is not empty"),
        (saved(torch.frombuffer(bytearray(pickle.dumps(1)), dtype=torch.uint8)), "is not empty"),
        (saved([None])[:200], "not in the form|cannot be read"),
    ],
    ids=["a bare pickle", "hidden names", "bytes inside", "bytes in a tensor", "cut off"],
)
def test_an_object_that_hides_a_pickle_is_refused(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, extra_state=content)
    with pytest.raises(CheckpointError, match=reason):
        check_pickles(tmp_path)


@pytest.mark.parametrize("file", ["../elsewhere.distcp", "/etc/passwd", "..", "sub/__0_0.distcp"])
def test_a_shard_outside_the_folder_is_refused(file: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, file=file)
    with pytest.raises(CheckpointError, match="outside its folder"):
        check_pickles(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"a": 1})])
def test_metadata_that_is_none_gives_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"metadata") as caught:
        check_pickles(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
