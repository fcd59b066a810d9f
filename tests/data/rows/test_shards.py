"""Shards: every row is in one, cuts stay where they are, and a file has one row format over all."""

import gzip
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_sft.base.errors import DataError
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.rows.conversation import BadRow, Conversation, Document
from roll_sft.data.rows.shards import Shard, ShardRows, file_format
from tests.data.rows.reading import find_shards, read_conversations

AUTO = ColumnKeys()


def texts_of(shard: Shard) -> list[tuple[int, int, str]]:
    rows = list(ShardRows(shard, AUTO))
    return [(row.row, row.line, row.text) for row in rows if isinstance(row, Document)]


def rows_of_text(num_rows: int) -> list[dict[str, str]]:
    return [{"text": f"text {number} {'x' * (number % 50)}"} for number in range(num_rows)]


@settings(deadline=None, max_examples=100)
@given(
    lines=st.lists(st.sampled_from([b"", b" ", b"{}", b'{"text": "' + b"x" * 40 + b'"}'])),
    ending=st.sampled_from([b"", b"\n", b"\r\n"]),
    shard_bytes=st.integers(1, 100),
)
def test_shards_of_lines_cover_the_file_and_end_at_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ending: bytes, shard_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("shards") / "rows.jsonl"
    content = b'{"text": "first"}\n' + b"\n".join(lines) + ending
    path.write_bytes(content)
    shards = find_shards(str(path), shard_bytes=shard_bytes)
    assert [shard.start for shard in shards] == [0, *(shard.stop for shard in shards)][:-1]
    assert shards[-1].stop == len(content)
    for shard in shards:
        part = content[shard.start : shard.stop]
        assert shard.first_line == content[: shard.start].count(b"\n") + 1
        assert shard.start == 0 or content[shard.start - 1 : shard.start] == b"\n"
        # Begins where a line is the first at or after a border, holds the borders' lines alone.
        last_line = max(0, part.rstrip(b"\n").rfind(b"\n") + 1) if part != b"\n" else 0
        assert (shard.start + last_line) // shard_bytes == shard.start // shard_bytes
    whole = list(read_conversations(str(path), AUTO))
    parts = [row for shard in shards for row in ShardRows(shard, AUTO)]
    assert [row.line for row in parts] == [row.line for row in whole]
    assert [replace(row, row=0) for row in parts] == [replace(row, row=0) for row in whole]


def test_appended_lines_move_no_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps(row) for row in rows_of_text(200)]
    path.write_text("\n".join(rows[:150]))  # even the last line is not ended
    before = find_shards(str(path), shard_bytes=1000)
    path.write_text("\n".join(rows))
    after = find_shards(str(path), shard_bytes=1000)
    assert len(before) > 5
    assert after[: len(before) - 1] == before[:-1]
    assert after[len(before) - 1].start == before[-1].start
    assert len(after) > len(before)


def test_equal_bytes_that_are_read_alike_have_one_hash(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 30}).encode()
    contents = {
        "a.jsonl": b"\n".join([line] * 4),
        "b.jsonl": b"\n".join([line] * 2 + [b" " * (len(line) - 1) + b"5", line]),
        "c.jsonl": b"\n".join([line, b"[" + line + b"]"]),
        "d.json": b"[" + line + b"]",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    hashes = {
        name: [s.content_hash for s in find_shards(str(tmp_path / name), shard_bytes=len(line) + 1)]
        for name in contents
    }
    a, b, c, d = hashes.values()
    assert len(a) == len(b) == 4
    assert a[1] == a[2] != a[0]
    assert [left == right for left, right in zip(a, b, strict=True)] == [True, True, False, True]
    # A line that is a list is a bad row, and the array of the same bytes a good one.
    assert c[1] not in d


def test_a_shard_travels_and_is_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows_of_text(100)))
    shards = find_shards(str(path), shard_bytes=500)
    alone = pickle.loads(pickle.dumps(shards[3]))
    numbers = [row for row, _, _ in texts_of(alone)]
    assert numbers == list(range(len(numbers)))
    assert [line for _, line, _ in texts_of(alone)] == [shards[3].first_line + n for n in numbers]


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file"])
def test_tables_are_cut_between_groups_of_rows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind.split()[0]}"
    rows = rows_of_text(100)
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=10)
    else:
        new = pa.ipc.new_stream if kind == "arrow stream" else pa.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    shards = find_shards(str(path), shard_bytes=1000)
    assert 1 < len(shards) < 10
    assert len({shard.content_hash for shard in shards}) == len(shards)
    found = [entry for shard in shards for entry in texts_of(shard)]
    assert [text for _, _, text in found] == [row["text"] for row in rows]
    assert [line for _, line, _ in found] == list(range(1, 101))
    numbers = [row for row, _, _ in texts_of(shards[1])]
    assert numbers == list(range(len(numbers)))


def test_what_cannot_be_cut_is_one_shard(tmp_path: Path) -> None:
    rows = rows_of_text(100)
    lines = "\n".join(map(json.dumps, rows)).encode()
    contents = {
        "a.json": json.dumps(rows, indent=1).encode(),
        "b.jsonl.gz": gzip.compress(lines),
        "c.jsonl.zst": pa.compress(lines, codec="zstd", asbytes=True),
        "d.json.gz": gzip.compress(json.dumps(rows).encode()),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    shards = find_shards(str(tmp_path), shard_bytes=100)
    assert [Path(shard.file).name for shard in shards] == sorted(contents)
    for shard in shards:
        assert [text for _, _, text in texts_of(shard)] == [row["text"] for row in rows]


def test_a_shard_is_held_to_the_format_of_its_file(tmp_path: Path) -> None:
    texts = [json.dumps(row) for row in rows_of_text(20)]
    pairs = [json.dumps({"prompt": "p", "response": "r"})] * 20
    (tmp_path / "mixed.jsonl").write_text("\n".join(["broken", *texts, *pairs]))
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
    (tmp_path / "none.jsonl").write_text("5\n{}")
    shards = {
        name: find_shards(str(tmp_path / f"{name}.jsonl"), shard_bytes=100)
        for name in ("mixed", "pairs", "none")
    }
    formats = {name: file_format(found, AUTO) for name, found in shards.items()}
    assert formats == {"mixed": "text", "pairs": "alpaca", "none": None}
    last = shards["mixed"][-1]
    assert all(isinstance(row, Conversation) for row in ShardRows(last, AUTO))
    with pytest.raises(DataError, match=r"mixed\.jsonl:\d\d: .*\balpaca\b.*\btext\b.*\bprompt\b"):
        list(ShardRows(last, AUTO, row_format="text"))


def test_columns_that_rows_used_are_gathered(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "p", "response": "r"}] * 10
    rows[7] = {**rows[7], "rules": "s"}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    keys = ColumnKeys(system="rules", tools="api")
    used = []
    for shard in find_shards(str(path), shard_bytes=80):
        reading = ShardRows(shard, keys)
        assert not any(isinstance(row, BadRow) for row in reading)
        used.append(reading.used)
    assert sorted(map(len, used)) == [0] * (len(used) - 1) + [1]
