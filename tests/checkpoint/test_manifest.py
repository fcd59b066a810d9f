"""Manifests and indexes from anywhere: read with their types, or refused in one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from roll_sft.base.errors import CheckpointError
from roll_sft.base.layout import ParallelLayout
from roll_sft.checkpoint.index import read_index
from roll_sft.checkpoint.manifest import MANIFEST, NewerCheckpointError, RunState, check_complete
from roll_sft.checkpoint.publish import publish, staging_folder, write_descriptions
from roll_sft.checkpoint.resume import find_checkpoint
from roll_sft.checkpoint.tensors import INDEX, Piece, Writer, take_parts, write
from roll_sft.config.build import build_config

STATE = RunState(
    step=4,
    epoch=0,
    samples_seen_in_epoch=16,
    seed=1,
    global_batch_size=4,
    global_batch_tokens=None,
    sequence_length=64,
    sources={"rows": "0123"},
    layout=ParallelLayout(4, 2),
    dtype="fp32",
    facts={"shuffle": True},
    optimizer_step=4,
)
SHARD = "__0_0.distcp"


def checkpoint_in(checkpoints: Path, *, step: int = 4) -> Path:
    """A whole checkpoint of one tensor [8, 4] in two parts."""
    import dataclasses

    staging = staging_folder(checkpoints, step)
    numbers = torch.arange(32.0).view(8, 4)
    pieces = [Piece("weight", (8, 4), (row, 0), numbers[row : row + 4]) for row in (0, 4)]
    write(staging, pieces, objects={}, writer=Writer(0, 1, optimizer_step=step))
    write_descriptions(staging, take_parts(staging))
    (staging / "hf_assets").mkdir()
    (staging / "hf_assets" / "config.json").write_text("{}")
    state = dataclasses.replace(STATE, step=step)
    return publish(staging, state=state, versions={"torch": "2"})


def change(path: Path, keys: str, value: Any) -> None:
    """Set `a|b|0` of a JSON file to `value`; `...` removes it."""
    content = json.loads(path.read_text())
    place, (*parents, last) = content, keys.split("|")
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    if value is ...:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    path.write_text(json.dumps(content))


REQUIRED = [
    "schema", "step", "epoch", "samples_seen_in_epoch", "seed", "global_batch_size",
    "sequence_length", "sources", "layout", "dtype", "versions", "files", "facts",
    "layout|world_size", f"files|{SHARD}|size", f"files|{SHARD}|sha256",
]  # fmt: skip
ODD = [None, "x", -1, 1.5, True, [], {"x": []}, 10**30]
FILE = {"size": 0, "sha256": "0" * 64}
VALUES: list[tuple[str, Any]] = [
    *((key, ...) for key in REQUIRED),
    *((key, value) for key in REQUIRED for value in ODD),
    *(("optimizer_step", value) for value in ODD if value is not None),
    *((f"files|{name}", FILE) for name in ("/etc/hosts", "../x", "a/../../x", "", "a\0b", "\n")),
    ("files", {}),
    ("files", {"hf_assets/config.json": FILE}),
    ("step", 7),
    ("dtype", "int64"),
    ("layout|tensor_size", 3),
    ("layout|pipeline_size", 0),
]


def test_every_odd_value_is_one_line_that_names_the_folder(tmp_path: Path) -> None:
    folder = checkpoint_in(tmp_path)
    manifest = check_complete(folder)
    assert manifest.state == STATE
    assert manifest.files.keys() >= {SHARD, INDEX, "hf_assets/config.json"}
    whole = (folder / MANIFEST).read_text()
    texts = ["", "null", "[]", "[" * 100_000, '{"step": ' + "9" * 5000 + "}", "\ud800\udfff"]
    for text in texts:
        (folder / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            check_complete(folder)
    for keys, value in VALUES:
        if keys in ("facts",) and isinstance(value, dict):
            continue  # open to later facts
        (folder / MANIFEST).write_text(whole)
        change(folder / MANIFEST, keys, value)
        refusal = refusal_of(folder)
        assert refusal is not None, f"{keys} = {value!r} is taken"
        assert str(folder) in refusal
        assert "\n" not in refusal
        assert len(refusal) < 400


def refusal_of(folder: Path) -> str | None:
    try:
        check_complete(folder)
    except CheckpointError as error:
        return str(error)
    return None


def link(path: Path) -> None:
    moved = path.parents[1] / "elsewhere"
    path.rename(moved)
    path.symlink_to(moved)


@pytest.mark.parametrize("name", [SHARD, INDEX, MANIFEST, "hf_assets/config.json", "hf_assets"])
def test_what_is_behind_a_link_is_no_part_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    folder = checkpoint_in(tmp_path / "checkpoints")
    link(folder / name)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}.*\blink\b"):
        check_complete(folder)
    good = checkpoint_in(tmp_path / "other")
    (tmp_path / "by another name").symlink_to(good)
    check_complete(tmp_path / "by another name")


CHUNK = "tensors|weight|chunks|0"
INDEX_VALUES: list[tuple[str, Any]] = [
    ("tensors", []),
    ("tensors|weight", 1),
    ("tensors|weight|dtype", "int64"),
    ("tensors|weight|dtype", "__class__"),
    ("tensors|weight|shape", [2**40, 4]),
    ("tensors|weight|shape", [-8, 4]),
    ("tensors|weight|shape", [8.0, 4]),
    (f"{CHUNK}|0", [6, 0]),
    (f"{CHUNK}|0", [0]),
    (f"{CHUNK}|1", [0, 4]),
    (f"{CHUNK}|2", "../weight"),
    (f"{CHUNK}|2", "/etc/hosts"),
    (f"{CHUNK}|2", ["x"]),
    (f"{CHUNK}|2", "absent"),
    (f"{CHUNK}|3", -1),
    (f"{CHUNK}|4", 10**18),
    (f"{CHUNK}|5", 10**9),
    (f"{CHUNK}|5", -4),
    (f"{CHUNK}|5", True),
]


def test_every_odd_index_is_one_line_before_any_memory_is_taken(tmp_path: Path) -> None:
    folder = checkpoint_in(tmp_path)
    read_index(folder)
    whole = (folder / INDEX).read_text()
    for keys, value in INDEX_VALUES:
        (folder / INDEX).write_text(whole)
        change(folder / INDEX, keys, value)
        with pytest.raises(CheckpointError, match=r"index\.json: "):
            read_index(folder)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a step that is not its name's": lambda folder: change(folder / MANIFEST, "step", 9),
    "no files": lambda folder: change(folder / MANIFEST, "files", {}),
    "a link": lambda folder: link(folder / SHARD),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_from_the_one_before(damage: str, tmp_path: Path) -> None:
    whole, other = (checkpoint_in(tmp_path / "checkpoints", step=step) for step in (2, 4))
    DAMAGES[damage](other)
    assert find_checkpoint(build_config({}), tmp_path / "checkpoints") == whole


def test_a_checkpoint_of_a_later_version_is_not_passed_over(tmp_path: Path) -> None:
    checkpoint_in(tmp_path, step=2)
    change(checkpoint_in(tmp_path, step=4) / MANIFEST, "schema", 99)
    with pytest.raises(NewerCheckpointError, match=r"step_00000004: .*schema 99\b"):
        find_checkpoint(build_config({}), tmp_path)
