"""Which files a path names, and what becomes of broken ones."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roll_sft.base.errors import DataError
from roll_sft.data.rows import json_array, json_rows
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.rows.conversation import BadRow, Document
from roll_sft.data.rows.files import find_files
from tests.data.rows.reading import find_shards, read_conversations

AUTO = ColumnKeys()
GOOD = b'{"text": "good"}'


def read(path: str | Path) -> list[Any]:
    return list(read_conversations(str(path), AUTO))


def texts(path: str | Path) -> list[str]:
    rows = read(path)
    assert all(isinstance(row, Document) for row in rows), rows
    return [row.text for row in rows]


def tree(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}))


# Folders, patterns, splits


def test_a_folder_is_all_its_files_in_order(tmp_path: Path) -> None:
    hidden = (".a.jsonl", ".git/b.jsonl", "_tmp/c.jsonl", "_SUCCESS")
    beside = ("README.md", "LICENSE", "dataset_info.json", "state.json")
    tree(tmp_path, "b.jsonl", "a/z.json", "a/b.JSONL", *hidden, *beside)
    rows = [{"text": "table"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(GOOD))
    expected = ["table", "a/b.JSONL", "a/z.json", "b.jsonl", "good"]
    assert sorted(texts(tmp_path)) == sorted(expected)
    assert find_files(str(tmp_path)) == sorted(find_files(str(tmp_path)))
    assert [row.row for row in read(tmp_path)] == list(range(5))
    assert texts(f"{tmp_path}/*.jsonl") == ["b.jsonl"]
    assert texts(f"{tmp_path}/**/*.json*[lLn]") == texts(f"{tmp_path}/**/*.json*[!z]")
    (tmp_path / "a" / "notes.csv").write_text("x")
    with pytest.raises(DataError, match=r"a/notes\.csv: .*'\.csv'.*\.jsonl"):
        find_files(str(tmp_path))


def test_a_file_with_the_characters_of_a_pattern_is_itself(tmp_path: Path) -> None:
    tree(tmp_path, "rows[1].jsonl", "rows1.jsonl")
    assert texts(tmp_path / "rows[1].jsonl") == ["rows[1].jsonl"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ["data/train-0.jsonl", "data/train-1.jsonl", "train/a.jsonl"]),
        ("test", ["data/test.jsonl"]),
        ("train_gen", ["data/train_gen-0.jsonl"]),
        ("gen", ["data/train_gen-0.jsonl"]),
    ],
)
def test_a_split_is_in_the_names_of_its_files(
    tmp_path: Path, split: str, expected: list[str]
) -> None:
    names = ("data/train-0.jsonl", "data/train-1.jsonl", "data/train_gen-0.jsonl")
    tree(tmp_path, *names, "data/test.jsonl", "train/a.jsonl")
    found = find_files(str(tmp_path), split=split)
    assert [str(Path(name).relative_to(tmp_path)) for name in found] == expected
    assert find_files(str(tmp_path / "data" / "test.jsonl"), split="test")
    with pytest.raises(DataError, match=r"'dev'.*\bdata/t"):
        find_files(str(tmp_path), split="dev")
    with pytest.raises(DataError, match=r"test\.jsonl: .*'train'"):
        find_files(str(tmp_path / "data" / "test.jsonl"), split="train")


def saved(folder: Path, **splits: list[str]) -> Path:
    """A saved `Dataset`, or `DatasetDict`, of texts, with the cache files that `map` leaves."""
    sets = {name: datasets.Dataset.from_dict({"text": each}) for name, each in splits.items()}
    if set(sets) == {"all"}:
        sets["all"].save_to_disk(str(folder))
        loaded = [datasets.load_from_disk(str(folder))]
    else:
        datasets.DatasetDict(sets).save_to_disk(str(folder))
        loaded = list(datasets.load_from_disk(str(folder)).values())
    for each in loaded:
        each.map(lambda row: {"text": row["text"] * 2})
    assert list(folder.glob("**/cache-*.arrow"))
    return folder


def test_of_a_saved_data_set_the_files_it_lists_are_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a" / "set", all=["x", "y"])
    for path in (folder, folder.parent, f"{folder}/*.arrow", f"file://{folder}"):
        assert texts(path) == ["x", "y"]
    (cached,) = folder.glob("cache-*.arrow")
    assert texts(cached) == ["xx", "yy"]
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-7.arrow"}]}')
    with pytest.raises(DataError, match=r"set/data-7\.arrow: .*state\.json"):
        find_files(str(folder))
    for broken in ("[", "{}", "[" * 100_000):
        (folder / "state.json").write_text(broken)
        with pytest.raises(DataError, match=r"state\.json: "):
            find_files(str(folder))
    (folder / "state.json").unlink()
    assert texts(folder) == ["x", "y"]


def test_a_folder_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", sft=["x"], dpo=["y"])
    with pytest.raises(DataError, match=r"set: .*\bsft\b.*\bdpo\b"):
        find_files(str(folder))
    for split, text in (("sft", "x"), ("dpo", "y")):
        (name,) = find_files(str(folder), split=split)
        assert texts(name) == [text]
    assert texts(saved(tmp_path / "one", sft=["x"])) == ["x"]
    tree(tmp_path / "b", "data/train-0.jsonl", "data/train-1.jsonl", "other.jsonl")
    assert len(find_files(str(tmp_path / "b"))) == 3
    tree(tmp_path / "b", "data/test-0.jsonl")
    with pytest.raises(DataError, match=r"\btest\b.*\btrain\b.*data/test-0\.jsonl"):
        find_files(str(tmp_path / "b"))
    assert len(find_files(f"{tmp_path}/b/**/*.jsonl")) == 4
    tree(tmp_path / "c", "train/latest.jsonl", "train/test_cases.jsonl", "developers.jsonl")
    assert len(find_files(str(tmp_path / "c"))) == 3


def test_a_split_is_found_in_relative_and_remote_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree(tmp_path, "train.jsonl", "test.jsonl", "sub/train-0.jsonl")
    store = fsspec.filesystem("memory")
    for name in ("train.jsonl", "test.jsonl", "sub/train-0.jsonl"):
        store.pipe(f"/splits/{name}", b'{"text": "%s"}' % name.encode())
    for before in ("", "./", "sub/../", "memory://splits/"):
        for path, expected in (
            ("train.jsonl", ["train.jsonl"]),
            ("*.jsonl", ["train.jsonl"]),
            ("tr*.jsonl", ["train.jsonl"]),
            ("sub", ["sub/train-0.jsonl"]),
            ("sub/", ["sub/train-0.jsonl"]),
        ):
            found = find_files(before + path, split="train")
            assert [texts(name) for name in found] == [[each] for each in expected]
        with pytest.raises(DataError, match=r"'test'.*\btrain\.jsonl"):
            find_files(f"{before}train.jsonl", split="test")
    assert [texts(name) for name in find_files(".", split="test")] == [["test.jsonl"]]


@pytest.mark.parametrize("path", ["n" * 300, "a\0b.jsonl", "n" * 5000])
def test_a_name_that_no_file_can_have_is_a_data_error(path: str) -> None:
    with pytest.raises(DataError, match=re.escape(repr(path[:8])[1:4])) as caught:
        find_files(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("none.json", r"^none\.json: "),
        ("none/", "^none/: "),
        ("*.jsonl", r"^\*\.jsonl: .*\.parquet"),
        ("rows.csv", r"^rows\.csv: .*'\.csv'.*\.jsonl.*\.arrow$"),
        ("rows.csv.gz", r"^rows\.csv\.gz: .*'\.gz'"),
        ("rows.gz", r"^rows\.gz: .*'\.gz'"),
        ("rows", "^rows: .*''"),
        ("empty", "^empty: "),
    ],
)
def test_paths_that_name_nothing_are_refused(
    tmp_path: Path, path: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree(tmp_path, "rows.csv", "rows.csv.gz", "rows.gz", "rows")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=expected):
        find_files(path)


# Object stores


def test_urls_are_read_through_fsspec(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/a/rows.jsonl", b"\n".join([GOOD] * 50))
    store.pipe("/bucket/a/more.json.gz", gzip.compress(b"[" + GOOD + b"]"))
    store.pipe("/bucket/_tmp/rows.jsonl", b"not read")
    pq.write_table(pa.Table.from_pylist([{"text": "t"}]), tmp_path / "t.parquet")
    store.pipe("/bucket/train.parquet", (tmp_path / "t.parquet").read_bytes())
    assert texts("memory://bucket/a/rows.jsonl") == ["good"] * 50
    assert texts("memory://bucket") == ["good"] * 51 + ["t"]
    assert texts("memory://bucket/a/*.jsonl") == ["good"] * 50
    assert [row.line for row in read("memory://bucket/a/rows.jsonl")] == list(range(1, 51))
    shards = find_shards("memory://bucket/a/rows.jsonl", shard_bytes=200)
    assert len(shards) > 3
    assert find_files("memory://bucket", split="train") == ["memory:///bucket/train.parquet"]
    assert texts(f"file://{tmp_path}/t.parquet") == ["t"]
    for path, expected in (
        ("memory://bucket/none.jsonl", "^memory://bucket/none.jsonl: "),
        ("s3://bucket/rows.jsonl", "s3://.* s3fs"),
        ("nostore://bucket/rows.jsonl", "nostore"),
    ):
        with pytest.raises(DataError, match=expected):
            read(path)


# Broken files

BIG = json.dumps({"text": "x" * 10_000_000}).encode()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "cut', r":2: .*column 10\b.*Unterminated string"),
        (b'{"text": "a"} {"text": "b"}', r":2: .*column 15\b.*Extra data"),
        (b'{"text": "\xe9"}', r":2: .*0xe9.*column 11\b.*UTF-8"),
        (b'\xef\xbb\xbf{"text": "a"}', r":2: .*column 1\b"),
        (b'{"text": "a\x00b"}', r":2: .*column 12\b.*control character"),
        (b"\x00" * 20, r":2: .*column 1\b.*Expecting value"),
        (b'{"text": NaN}', ":2: .*'text'.* NaN.* string"),
        (b'{"text": -Infinity}', ":2: .*'text'.* Infinity.* string"),
        (b'{"text": {"a": "b"}}', ":2: .*'text'.* object.* string"),
        (b'{"text": "a", "text": "b"}', ":2: .*'text' twice"),
        (b'{"text": "b", "m": {"k": 1, "k": 2}}', ":2: .*'k' twice"),
        (b'{"text": "\\ud83d"}', r":2: .*'text'.*\\ud83d"),
        (b'["a list"]', ":2: .* list.* object"),
        (b'"text"', ":2: .* string.* object"),
        (b'{"txt": "a"}', r":2: .*\btxt\b"),
        (BIG[:-2], r":2: .*column 10\b.*Unterminated string"),
    ],
    ids=lambda value: value[:30] if isinstance(value, bytes) else "",
)
def test_a_broken_line_has_a_place_and_the_next_is_read(
    tmp_path: Path, line: bytes, expected: str
) -> None:
    path = tmp_path / "rows.jsonl"
    for ending in (b"\n", b"\r\n"):
        path.write_bytes(b"\xef\xbb\xbf" + ending.join([GOOD, line, b"", GOOD, b""]))
        first, broken, last = read(path)
        assert isinstance(broken, BadRow)
        assert re.match(expected, f":{broken.line}: {broken.reason}")
        assert (first.text, last.text, last.line) == ("good", "good", 4)


def test_a_line_of_ten_megabytes_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, BIG, GOOD]))
    shards = find_shards(str(path), shard_bytes=1 << 20)
    assert [shard.first_line for shard in shards] == [1, 3]
    assert [len(text) for text in texts(path)] == [4, 10_000_000, 4]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz"])
def test_a_row_that_is_too_long_is_refused(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (json_rows, json_array):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1 << 16)
    long = b'{"text": "' + b"x" * (1 << 20)
    path = tmp_path / f"rows{suffix}"
    is_array = suffix.startswith(".json.") or suffix == ".json"
    content = b"[" + GOOD + b"," + long + b'"}]' if is_array else b"\n".join([GOOD, long, GOOD])
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    if is_array:
        with pytest.raises(DataError, match=rf"rows{suffix}:1: .* MiB"):
            read(path)
        return
    first, broken, last = read(path)
    assert (first.text, last.text, last.line) == ("good", "good", 3)
    assert broken.line == 2
    assert " MiB" in broken.reason


NUMBERED = b"\n".join(b'{"text": "%d"}' % (number**3) for number in range(40_000))
GZIP = gzip.compress(NUMBERED)
ZSTD = pa.compress(NUMBERED, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", r"a\.jsonl: .*empty"),
        ("a.jsonl", b"\xef\xbb\xbf\n \n", r"a\.jsonl: .*empty"),
        ("a.json", b"[" + GOOD + b', {"text": "b"', r"a\.json:1: .*column \d+"),
        ("a.json", b'[{"text":"a","text":"b"}', r"a\.json:1: .*column 25"),
        ("a.jsonl.gz", GZIP[: len(GZIP) // 2], r"gz:\d+: .*Truncated compressed stream"),
        ("a.jsonl.gz", GZIP[:-8] + b"\0" * 8, r"gz:\d+: .*incorrect data check"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: .*incorrect header"),
        ("a.jsonl.gz", gzip.compress(b""), r"a\.jsonl\.gz: .*empty"),
        ("a.jsonl.zst", ZSTD[: len(ZSTD) // 2], r"zst:\d+: .*Truncated"),
        ("a.jsonl.zst", GOOD, r"a\.jsonl\.zst: .*ZSTD decompress failed"),
        ("a.parquet", b"", r"a\.parquet: .*size is 0 bytes"),
        ("a.parquet", GOOD * 9, r"a\.parquet: .*magic bytes not found"),
        ("a.arrow", b"", r"a\.arrow: "),
        ("a.arrow", GOOD * 9, r"a\.arrow: "),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_read_on_says_where(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        read(tmp_path / name)


def test_tables_that_are_cut_off_or_empty_or_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist([{"text": f"row {number}"} for number in range(1000)])
    pq.write_table(table, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.parquet: "):
        read(path)
    path.write_bytes(content[:100] + b"\xff" * 200 + content[300:])
    with pytest.raises(DataError, match=r"a\.parquet: "):
        read(path)
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(DataError, match=r"a\.parquet: .*empty"):
        read(path)
    latin = pa.array([b"good", b"caf\xe9", b"good"]).view(pa.utf8())
    pq.write_table(pa.table({"text": latin}), path)
    first, broken, last = read(path)
    assert (first.text, last.text, last.line) == ("good", "good", 3)
    assert broken.line == 2
    assert "0xe9" in broken.reason
    stream = tmp_path / "a.arrow"
    with pa.ipc.new_stream(str(stream), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    content = stream.read_bytes()
    stream.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.arrow: "):
        read(stream)


HARMLESS = [
    "中文 · 汉字",
    "👩‍👩‍👧 é",
    "a\u0000b",
    "{{name}} {% if %}",
    "<|im_end|></s>",
    "\u2028\x85\ufeff",
]


@pytest.mark.parametrize(
    "suffix", [".json", ".jsonl", ".jsonl.gz", ".json.zst", ".parquet", ".arrow"]
)
def test_text_survives_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": text} for text in HARMLESS]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        content = (lines if "jsonl" in suffix else json.dumps(rows, ensure_ascii=False)).encode()
        if suffix.endswith(".gz"):
            content = gzip.compress(content)
        if suffix.endswith(".zst"):
            content = pa.compress(content, codec="zstd", asbytes=True)
        path.write_bytes(content)
    assert texts(path) == HARMLESS


def test_null_fields_of_a_table_are_absent_ones(tmp_path: Path) -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {
            "role": "assistant",
            "content": "x",
            "tool_calls": [{"function": {"name": "sub", "arguments": {"b": 2}}}],
        },
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "a.parquet")
    (row,) = read(tmp_path / "a.parquet")
    calls = [call for message in row.messages for call in message.tool_calls]
    assert [(call.name, call.arguments) for call in calls] == [("add", {"a": 1}), ("sub", {"b": 2})]
