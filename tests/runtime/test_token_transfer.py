"""Tokens reach nodes that do not share the driver's disk: whole, once a node, under their name."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import ray

from roll_sft.base.errors import ResourceError
from roll_sft.data.tokens.cache import (
    ARRAYS,
    REPORT_FILE,
    CacheFacts,
    SourceTokens,
    TokenCache,
    TokenSet,
)
from roll_sft.job.inputs import TokenData
from roll_sft.runtime import group as group_module
from roll_sft.runtime import token_transfer
from roll_sft.runtime.group import WorkerGroup
from roll_sft.runtime.placement import reserved
from tests.runtime.light import NO_INPUTS, LightWorker

LENGTHS = (5, 40, 3)


@pytest.fixture
def write_cache():
    """Makes a small token cache in a folder."""

    def write(folder: Path, lengths: tuple[int, ...] = LENGTHS) -> TokenCache:
        folder.mkdir(parents=True)
        total, offsets = sum(lengths), np.cumsum([0, *lengths])
        values = {
            "tokens": np.arange(total),
            "label_mask": np.ones(total),
            "offsets": offsets,
            "rows": np.arange(len(lengths)),
            "supervised": np.array(lengths),
        }
        for name, dtype in ARRAYS.items():
            values[name].astype(dtype).tofile(folder / f"{name}.bin")
        num_rows = len(lengths)
        facts = CacheFacts(rows=num_rows, kept=num_rows, samples=num_rows, tokens=total)
        (folder / REPORT_FILE).write_text(json.dumps(asdict(facts)))
        return TokenCache.open(folder)

    return write


def moved(part: token_transfer.Part, folder: Path) -> token_transfer.Part:
    return token_transfer.Part(folder, part.file, part.start, part.size, part.is_last)


@pytest.mark.parametrize("size", [7, 64, 1 << 20])
def test_a_folder_arrives_byte_for_byte_whatever_the_size_of_the_parts(write_cache, tmp_path, size):
    cache, there = write_cache(tmp_path / "here" / "address"), tmp_path / "there" / "address"
    parts = list(token_transfer.parts_of(cache.folder, size=size))
    for part in parts:
        assert not there.exists()
        token_transfer.receive(moved(part, there), part.read())
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    for path in cache.folder.iterdir():
        assert (there / path.name).read_bytes() == path.read_bytes()
    assert not token_transfer.missing([there])
    assert [path.name for path in there.parent.iterdir()] == ["address"]


def test_a_shard_of_which_nothing_was_kept_arrives_too(write_cache, tmp_path):
    cache, there = write_cache(tmp_path / "here", ()), tmp_path / "there" / "here"
    for part in token_transfer.parts_of(cache.folder, size=99):
        token_transfer.receive(moved(part, there), part.read())
    assert not token_transfer.missing([there])
    assert len(TokenCache.open(there)) == 0


def test_a_damaged_folder_counts_as_missing_and_is_replaced(write_cache, tmp_path):
    cache, there = write_cache(tmp_path / "here"), tmp_path / "there" / "here"
    write_cache(there)
    with (there / "tokens.bin").open("ab") as file:
        file.truncate(4)
    assert token_transfer.missing([cache.folder, there]) == [there]
    for part in token_transfer.parts_of(cache.folder, size=99):
        token_transfer.receive(moved(part, there), part.read())
    assert not token_transfer.missing([there])


def test_a_node_that_cannot_hold_them_says_so(write_cache, tmp_path):
    part = next(token_transfer.parts_of(write_cache(tmp_path / "here").folder, size=99))
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"data\.cache_dir: .*cannot hold"):
        token_transfer.receive(moved(part, tmp_path / "file" / "address"), part.read())


@pytest.mark.slow
def test_a_node_with_a_disk_of_its_own_gets_the_tokens(
    joined, cluster, write_cache, tmp_path, monkeypatch
):
    if cluster.apart is None:
        pytest.skip("this system does not let a process have a mount of its own")
    train, validation = (write_cache(cluster.apart / name) for name in ("train", "validation"))
    data = TokenData(
        TokenSet([SourceTokens("a", (train,))]), {"b": TokenSet([SourceTokens("b", (validation,))])}
    )
    folders = [train.folder, validation.folder]
    monkeypatch.setattr(group_module, "Worker", LightWorker)
    monkeypatch.setattr(token_transfer, "PART_BYTES", 100)
    with reserved(config := joined(parallel={"num_workers": 4})) as slots:
        group = WorkerGroup(config, slots=slots, logs=tmp_path / "logs")
        try:
            before = dict(ray.get([actor.has.remote(folders) for actor in group._actors]))
            assert sorted(before.values()) == [[False, False], [True, True]]  # one a node
            group.start(NO_INPUTS[0], data)
            after = ray.get([actor.has.remote(folders) for actor in group._actors])
            assert all(sees for _, sees in after)
            read = [actor.read.remote(validation, 1) for actor in group._actors]
            assert ray.get(read) == [list(range(5, 45))] * 4
        finally:
            group.kill()
