"""Parquet and Arrow give the rows that the same data gives as JSON; each type, and each cut."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roll_sft.base.errors import DataError
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.rows.conversation import BadRow, Conversation, Document
from roll_sft.data.rows.files import opened
from roll_sft.data.rows.shards import ShardRows
from roll_sft.data.rows.table_rows import table_parts, table_rows
from tests.data.rows.reading import find_shards, read_conversations

AUTO = ColumnKeys()
ANSWER = {"role": "assistant", "content": "yo"}
CHAT = [{"role": "user", "content": "hi"}, ANSWER]


def tool(properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


# Objects that have other keys in other rows, which a table can only hold as JSON.
MIXED = [
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"name": "f", "arguments": {"a": [1, None, {"b": 2.5}]}}],
            },
            {"role": "tool", "content": "é"},
            {**ANSWER, "train": False},
            {"role": "user", "content": "hi"},
            ANSWER,
        ],
        "tools": [tool({"a": {"type": "array"}})],
        "chat_template_kwargs": {"x": {"y": 1}},
    },
    {
        "messages": CHAT,
        "tools": [tool({"b": {"enum": ["p"], "default": None}})],
        "chat_template_kwargs": {"x": "z"},
    },
]


def read(path: Path) -> list[Conversation | Document | BadRow]:
    return list(read_conversations(str(path), AUTO))


def written(folder: Path, table: pa.Table, suffix: str, **options: Any) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path, **options)
    else:
        kind = pa.ipc.new_file if suffix == ".file.arrow" else pa.ipc.new_stream
        with kind(str(path), table.schema) as writer:
            writer.write_table(table, **options)
    return path


KINDS = (".parquet", ".file.arrow", ".stream.arrow")


@pytest.mark.parametrize("kind", [*KINDS, "saved"])
def test_mixed_objects_of_datasets_are_objects_at_any_depth(tmp_path: Path, kind: str) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(map(json.dumps, MIXED)))
    found = datasets.load_dataset("json", data_files=str(lines), cache_dir=str(tmp_path / "cache"))
    data = found["train"]
    assert "Json" in str(data.features)
    if kind == "saved":
        path = tmp_path / "saved"
        data.save_to_disk(str(path))
    else:
        path = written(tmp_path, data.data.table, kind)
    assert read(path) == read(lines)


def test_broken_json_in_a_table_is_the_fault_of_its_row(tmp_path: Path) -> None:
    texts = pa.array([json.dumps(CHAT), "[{", '[{"a": 1, "a": 2}]', None, json.dumps(CHAT)])
    table = pa.table({"messages": pa.ExtensionArray.from_storage(pa.json_(), texts)})
    first, broken, twice, empty, last = read(written(tmp_path, table, ".parquet"))
    assert isinstance(first, Conversation)
    assert isinstance(broken, BadRow)
    assert "column 'messages' is no JSON: " in broken.reason
    assert isinstance(twice, BadRow)
    assert "column 'messages' has the key 'a' twice" in twice.reason
    assert isinstance(empty, BadRow)
    assert isinstance(last, Conversation)
    assert (last.row, last.line) == (4, 5)


TEXTS = ["a", "b", None, "a"]
FAR = pa.array([1 << 62] * 4, pa.int64()).cast(pa.timestamp("us"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "texts",
    [
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS, pa.large_string()).dictionary_encode(),
    ],
    ids=lambda array: str(array.type),
)
def test_text_of_each_type_is_text(tmp_path: Path, texts: pa.Array, kind: str) -> None:
    entries = pa.StructArray.from_arrays([texts, texts], ["role", "content"])
    for column in (texts, entries.field(1)):
        table = pa.table({"text": column, "far": FAR, "none": pa.nulls(4)})
        path = written(tmp_path, table, kind)
        shard = find_shards(str(path))[0]
        rows = ShardRows(shard, AUTO)
        found = [row.text if isinstance(row, Document) else None for row in rows]
        assert found == TEXTS
        assert rows.left_aside == {"far"}


def list_of(entries: pa.Array, kind: str) -> pa.Array:
    """One list for each row: two entries, none, one (two where all have as many)."""
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(entries, 2)
    if kind == "view":
        return pa.ListViewArray.from_arrays([0, 0, 2], [2, 0, 2], entries)
    if kind == "large view":
        return pa.LargeListViewArray.from_arrays([0, 0, 2], [2, 0, 2], entries)
    cls = pa.LargeListArray if kind == "large" else pa.ListArray
    return cls.from_arrays([0, 2, 2, 4], entries)


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        *((kind, ".parquet") for kind in ("small", "large", "fixed")),
        # Parquet has no list views.
        *((kind, ".stream.arrow") for kind in ("small", "large", "fixed", "view", "large view")),
    ],
)
def test_lists_of_each_type_hold_messages(tmp_path: Path, kind: str, suffix: str) -> None:
    entries = pa.StructArray.from_arrays(
        [pa.array(["user", "assistant"] * 2), pa.array(["q", "a", "r", "b"]), FAR],
        ["role", "content", "at"],
    )
    lists = list_of(entries, kind)
    table = pa.table({"messages": lists})
    found = read(written(tmp_path, table, suffix))
    said = [
        [message.content for message in row.messages] if isinstance(row, Conversation) else None
        for row in found
    ]
    assert said == ([["q", "a"], ["r", "b"]] if kind == "fixed" else [["q", "a"], None, ["r", "b"]])


def test_maps_are_objects_and_what_json_cannot_hold_is_named(tmp_path: Path) -> None:
    names = pa.array(["a", "b", "c"])
    calls = [
        pa.MapArray.from_arrays([0, 1, 3], names, pa.array([1, 2, 3])),
        pa.MapArray.from_arrays([0, 1, 3], names, FAR.slice(0, 3)),
        pa.StructArray.from_arrays([pa.array([1, 2]).cast(pa.decimal128(21, 2))], ["d"]),
        pa.StructArray.from_arrays([pa.array([b"1", b"2"])], ["d"]),
        pa.MapArray.from_arrays([0, 1, 3], pa.array([1, 2, 3]), names),
    ]
    reasons = []
    for arguments in calls:
        name = pa.array(["f"] * 2)
        call = pa.StructArray.from_arrays([name, arguments], ["name", "arguments"])
        role, content = pa.array(["assistant"] * 2), pa.array(["x"] * 2)
        listed = pa.ListArray.from_arrays([0, 1, 2], call)
        said = pa.StructArray.from_arrays(
            [role, content, listed], ["role", "content", "tool_calls"]
        )
        table = pa.table({"messages": pa.ListArray.from_arrays([0, 1, 2], said)})
        found = read(written(tmp_path, table, ".stream.arrow"))
        if isinstance(found[1], Conversation):
            assert found[1].messages[0].tool_calls[0].arguments == {"b": 2, "c": 3}
        else:
            assert isinstance(found[1], BadRow)
            reasons.append(found[1].reason.partition("arguments")[2])
    assert reasons == [
        ".b is a value of type timestamp[us], which JSON cannot hold; replace it",
        ".d is a value of type decimal128(21, 2), which JSON cannot hold; replace it",
        ".d is a value of type binary, which JSON cannot hold; replace it",
        " is a value of type map<int64, string>; they must be an object, or its JSON",
    ]


def test_a_number_or_a_date_is_no_text(tmp_path: Path) -> None:
    for column, kind in (
        (FAR, "a value of type timestamp[us]"),
        (pa.array([b"x"] * 4), "a value of type binary"),
        (pa.array([1] * 4), "a number"),
    ):
        found = read(written(tmp_path, pa.table({"text": column}), ".parquet"))
        assert isinstance(found[0], BadRow)
        assert found[0].reason == f"column 'text' is {kind}; it must be a string"


def test_columns_that_no_format_uses_are_named_and_not_read(tmp_path: Path) -> None:
    texts = pa.array(["x"] * 1000)
    huge = pa.array([b"y" * 10_000] * 1000)
    table = pa.table({"text": texts, "picture": huge, "text.more": texts})
    path = written(tmp_path, table, ".parquet", compression="none", use_dictionary=False)
    with opened(str(path)) as file:
        counted = Counting(file)
        rows = list(
            table_rows(
                counted,  # type: ignore[arg-type]
                kind="parquet",
                name=str(path),
                part=range(1),
                first_row=1,
                keys=AUTO,
            )
        )
    assert len(rows) == 1000
    assert counted.num_bytes < 1_000_000 < path.stat().st_size
    rows_read = ShardRows(find_shards(str(path))[0], AUTO)
    assert sum(isinstance(row, Document) for row in rows_read) == 1000
    assert rows_read.left_aside == {"picture", "text.more"}


class Counting:
    """A file that counts what is read of it."""

    def __init__(self, file: Any) -> None:
        self.file, self.num_bytes = file, 0

    def read(self, size: int = -1) -> bytes:
        content: bytes = self.file.read(size)
        self.num_bytes += len(content)
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("suffix", KINDS)
def test_a_shard_of_a_table_is_read_without_the_others(tmp_path: Path, suffix: str) -> None:
    columns = {"text": pa.array([f"{number:06}" + "x" * 1000 for number in range(2000)])}
    columns["kind"] = pa.array(["a", "b"] * 1000).dictionary_encode()
    options: dict[str, Any] = {"max_chunksize": 100}
    if suffix == ".parquet":
        options = {"row_group_size": 100, "compression": "none", "use_dictionary": False}
    path = written(tmp_path, pa.table(columns), suffix, **options)
    shards = find_shards(str(path), shard_bytes=300_000)
    assert len(shards) >= 8
    assert [shard.first_line for shard in shards][:2] in ([1, 201], [1, 301])
    texts, num_bytes = [], 0
    for shard in shards:
        with opened(str(path)) as file:
            counted = Counting(file)
            part = range(shard.start, shard.stop)
            for row in table_rows(
                counted,  # type: ignore[arg-type]
                kind=shard.kind,
                name=str(path),
                part=part,
                first_row=shard.first_line,
                keys=ColumnKeys(system="kind"),
            ):
                assert not isinstance(row, BadRow)
                assert isinstance(row.value, dict)
                texts.append(row.value["text"])
                assert row.value["kind"] == "ab"[len(texts) % 2 - 1]
            num_bytes += counted.num_bytes
    assert texts == columns["text"].to_pylist()
    # Parquet's footer is read for each shard, of at most 64 KiB.
    assert num_bytes < 1.1 * path.stat().st_size + len(shards) * (1 << 16)


def test_the_parts_of_a_stream_are_found_in_its_heads(tmp_path: Path) -> None:
    table = pa.table({"text": ["x" * 10_000] * 100})
    path = written(tmp_path, table, ".stream.arrow", max_chunksize=10)
    with opened(str(path)) as file:
        counted = Counting(file)
        parts = table_parts(counted, kind="arrow", name="x", part_bytes=1)  # type: ignore[arg-type]
    assert [part.num_rows for part in parts] == [10] * 10
    assert counted.num_bytes < 10_000


@pytest.mark.parametrize("make", [pa.ipc.new_file, pa.ipc.new_stream], ids=["file", "stream"])
def test_offsets_beyond_the_table_are_refused(tmp_path: Path, make: Any) -> None:
    """Followed before they are checked, they end the process without a word."""
    table = pa.table({"messages": [CHAT, CHAT + CHAT]})
    path = tmp_path / "rows.arrow"
    with make(path, table.schema) as writer:
        writer.write_table(table)
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 2, 6))
    content = path.read_bytes()
    assert content.count(offsets) == 1
    beyond = offsets[:8] + (0x7FFF_FF00).to_bytes(4, "little")
    path.write_bytes(content.replace(offsets, beyond))
    with pytest.raises(DataError, match=r"rows\.arrow: cannot be read as a table"):
        read(path)
