"""Rows of JSON and JSONL as conversations, and what is refused with which place and reason."""

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_sft.base.errors import ConfigError, DataError
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.rows.conversation import BadRow, Conversation, Document, Message
from roll_sft.data.rows.json_array import array_rows
from roll_sft.data.rows.json_rows import RawRow, line_rows
from tests.data.rows.reading import read_conversations

AUTO = ColumnKeys()
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


def write(folder: Path, content: str | bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, keys: ColumnKeys = AUTO) -> list[Conversation | BadRow]:
    return [row for row in read_conversations(str(path), keys) if not isinstance(row, Document)]


def read_one(folder: Path, row: Any, keys: ColumnKeys = AUTO) -> Conversation | BadRow:
    (result,) = read(write(folder, json.dumps(row)), keys)
    return result


def turns(conversation: Conversation | BadRow) -> list[tuple[str, str]]:
    assert isinstance(conversation, Conversation), conversation
    return [(message.role, message.content) for message in conversation.messages]


def reason(row: Conversation | BadRow) -> str:
    assert isinstance(row, BadRow), row
    return row.reason


# Formats


@pytest.mark.parametrize("prompt", ["instruction", "prompt"])
@pytest.mark.parametrize("query", ["input", "query"])
@pytest.mark.parametrize("response", ["output", "response"])
def test_alpaca_columns_are_detected_under_each_of_their_names(
    tmp_path: Path, prompt: str, query: str, response: str
) -> None:
    row = {prompt: "p", query: "q", response: "r", "system": "s", "id": 7, "score": float("nan")}
    assert turns(read_one(tmp_path, row)) == [
        ("system", "s"),
        ("user", "p\nq"),
        ("assistant", "r"),
    ]


@pytest.mark.parametrize(
    "absent", [{}, {"input": "", "system": ""}, {"input": None, "system": None}]
)
def test_absent_null_and_empty_optional_columns_add_nothing(
    tmp_path: Path, absent: dict[str, Any]
) -> None:
    row = {"instruction": "p", "output": "r", **absent}
    assert turns(read_one(tmp_path, row)) == [("user", "p"), ("assistant", "r")]


def test_messages_are_taken_as_they_are_listed(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "a", "name": "x", "tool_calls": None},
        {"role": "assistant", "content": "b", "weight": 1, "tool_calls": []},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    expected = [(message["role"], message["content"]) for message in messages]
    assert turns(read_one(tmp_path, {"messages": messages, "prompt": "a"})) == expected


def test_named_columns_replace_detection(tmp_path: Path) -> None:
    row = {"instruction": "no", "q": "p", "a": "r", "rules": "s", "input": "x", "output": "no"}
    keys = ColumnKeys(prompt="q", response="a", system="rules")
    assert turns(read_one(tmp_path, row, keys)) == [
        ("system", "s"),
        ("user", "p\nx"),
        ("assistant", "r"),
    ]
    row = {"chat": CHAT["messages"], "instruction": "no", "output": "no"}
    assert turns(read_one(tmp_path, row, ColumnKeys(messages="chat")))[0] == ("user", "hi")


def test_a_column_named_for_one_use_is_not_detected_for_another(tmp_path: Path) -> None:
    row = {"input": "p", "output": "r"}
    assert turns(read_one(tmp_path, row, ColumnKeys(prompt="input")))[0] == ("user", "p")


def test_two_columns_that_could_be_meant_are_refused_where_they_differ(tmp_path: Path) -> None:
    rows = [{**ALPACA, "response": each} for each in ("3", "", "4")]
    found = read(write(tmp_path, "\n".join(map(json.dumps, rows))))
    assert turns(found[0]) == turns(found[1]) == [("user", "Add.\n1 2"), ("assistant", "3")]
    assert "columns 'output' and 'response' could both be the response, and dif" in reason(found[2])
    path = write(tmp_path, json.dumps({**ALPACA, "prompt": "### all of it"}))
    assert "choose with data.prompt_key=instruction or" in reason(read(path)[0])
    assert turns(read(path, ColumnKeys(prompt="instruction"))[0])[0] == ("user", "Add.\n1 2")


def test_keys_of_two_formats_at_once_are_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"data.prompt_key, data.messages_key"):
        ColumnKeys(prompt="a", messages="b")
    with pytest.raises(ConfigError, match=r"data.system_key, data.text_key"):
        ColumnKeys(system="a", text="b")
    ColumnKeys(messages="a", system="b", tools="c")


def test_a_file_that_mixes_formats_is_refused_with_row_and_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "\n".join(map(json.dumps, (ALPACA, ALPACA, CHAT))))
    with pytest.raises(DataError, match=r"rows\.jsonl:3: .*\bmessages\b.*\balpaca\b.*\bmessages\b"):
        read(path)


def test_an_optional_column_that_no_row_has_is_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, json.dumps(ALPACA))
    with caplog.at_level(logging.WARNING):
        assert len(read(path, ColumnKeys(query="input", system="sytem"))) == 1
    assert "'sytem'" in caplog.text
    assert "'input'" not in caplog.text


# Rows that are refused


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1, 2], "the array"),
        ("text", "the row is a string"),
        (3.5, "the row is a number"),
        (True, "the row is a boolean"),
        (None, "the row is null"),
        ({"a": 1, "b": 2}, "columns found: a, b"),
        ({"instruction": "p", "text": "t"}, "no response: column 'output' or 'response' or 'comp"),
        ({"instruction": "p", "text": "t"}, "columns found: instruction, text"),
        ({"instruction": None, "output": "r"}, "no prompt"),
        ({"instruction": "p", "output": 5}, "column 'output' is a number; it must be a string"),
        ({"instruction": ["p"], "output": "r"}, "column 'instruction' is a list"),
        ({"instruction": "p", "input": {}, "output": "r"}, "column 'input' is an object"),
        ({"instruction": "p", "output": ""}, "column 'output' holds no text"),
        ({"instruction": "p", "output": " \n"}, "column 'output' holds no text"),
        ({"instruction": "", "output": "r"}, "column 'instruction' is empty"),
        ({"instruction": "p", "output": "r \ud83d"}, "lone surrogate \\ud83d at character 3"),
        ({"messages": "hi"}, "column 'messages' is a string"),
        ({"messages": []}, "no assistant message with text among its 0"),
        ({"messages": CHAT["messages"][:1]}, "no assistant message with text among its 1"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "no assistant message with text"),
        ({"messages": ["hi"]}, "messages[0] is a string"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0] has role 'critic'"),
        ({"messages": [{"content": "x"}]}, "messages[0] has no role"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no content (fields found: role)"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0] has null content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "content[0].text is null",
        ),
    ],
)
def test_an_unusable_row_says_why(tmp_path: Path, row: Any, expected: str) -> None:
    if isinstance(row, list):
        row, expected = [row], "the row is a list"  # a file that begins with [ is an array
    found = read_one(tmp_path, row)
    assert expected in reason(found)
    has_no_answer = expected.endswith("holds no text") or "no assistant message" in expected
    assert isinstance(found, BadRow)
    assert found.is_empty == has_no_answer


def test_a_bad_row_does_not_stop_the_reading_and_keeps_its_place(tmp_path: Path) -> None:
    good = json.dumps(ALPACA)
    path = write(tmp_path, f'{good}\n{{"instruction": \n\n{good}\n[1]\n{good}')
    rows = read(path)
    assert [(row.row, row.line) for row in rows] == [(0, 1), (1, 2), (2, 4), (3, 5), (4, 6)]
    assert [isinstance(row, BadRow) for row in rows] == [False, True, False, True, False]
    assert reason(rows[1]).startswith("broken JSON at column 16: ")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"a": "\xff"}', "byte 0xff at column 8 is not UTF-8"),
        (b'{"a": 1} {"b": 2}', "broken JSON at column 10: Extra data"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON that cannot be read"),
        (b'{"a": ' + b"[" * 200_000, "the row is nested too deep to be read as JSON; flatten it"),
    ],
)
def test_a_line_that_is_no_json_is_a_bad_row(tmp_path: Path, line: bytes, expected: str) -> None:
    rows = read(write(tmp_path, line + b"\n" + json.dumps(ALPACA).encode()))
    assert reason(rows[0]).startswith(expected)
    assert isinstance(rows[1], Conversation)


@pytest.mark.parametrize("depth", [101, 500, 980, 100_000])
@pytest.mark.parametrize(
    "row",
    [
        {**CHAT, "tools": [{"name": "f", "x": "DEEP"}]},
        {**CHAT, "chat_template_kwargs": {"x": "DEEP"}},
        {"messages": [*CHAT["messages"], {"role": "assistant", "tool_calls": "CALL"}]},
        {**ALPACA, "response": "DEEP", "output": "DEEP"},
    ],
)
def test_a_value_of_any_depth_is_refused_in_one_line(
    tmp_path: Path, row: dict[str, Any], depth: int
) -> None:
    deep = "[" * depth + "]" * depth
    call = f'[{{"name": "f", "arguments": {{"x": {deep}}}}}]'
    line = json.dumps(row).replace('"CALL"', call).replace('"DEEP"', deep)
    path = write(tmp_path, f"{line}\n{line.replace(deep, json.dumps(deep))}")
    found = read(path)
    assert re.search("nested|must be a string", reason(found[0]))


# Files


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.JSON"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_array_and_lines_are_told_from_the_content(
    tmp_path: Path, name: str, ending: str, mark: bytes
) -> None:
    rows = [{**ALPACA, "input": f"{number}\u2028\x85"} for number in range(3)]
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    as_lines = ending.join(["", *texts, ""])
    as_array = ending.join(["", " [", "  " + f",{ending}  ".join(texts), "]", ""])
    expected = [[("user", f"Add.\n{row['input']}"), ("assistant", "3")] for row in rows]
    for text, lines in ((as_lines, [2, 3, 4]), (as_array, [3, 4, 5])):
        found = read(write(tmp_path, mark + text.encode(), name))
        assert [turns(row) for row in found] == expected
        assert [(row.row, row.line) for row in found] == list(zip(range(3), lines, strict=True))


def test_the_line_of_an_array_row_is_where_it_begins(tmp_path: Path) -> None:
    text = json.dumps([ALPACA, {"instruction": "p"}, ALPACA], indent=2)
    rows = read(write(tmp_path, text, "rows.json"))
    assert [row.line for row in rows] == [2, 7, 10]
    assert "no response" in reason(rows[1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', r"rows.json:3: broken JSON at column 7: Expecting value"),
        ('[\n{"a": 1}\n{"a": 2}\n]', r"rows.json:3: broken JSON at column 1: Expecting ',' or ']'"),
        ('[{"a": 1},\n', r"rows.json:2: broken JSON at column 1"),
        ('[{"a": 1}', r"rows.json:1: broken JSON at column 10: Expecting ',' or ']'"),
        ('[{"a": 1},]', r"broken JSON at column 11"),
        ("[", r"broken JSON at column 2"),
        ('[{"a": 1}]\n{"a": 2}', r"rows.json:2: broken JSON at column 1: Text after the end"),
        ("[[" + "9" * 5000 + "]]", r"rows.json:1: broken JSON at column 2"),
    ],
)
def test_a_broken_array_ends_the_reading_with_its_place(
    tmp_path: Path, text: str, expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        read(write(tmp_path, text, "rows.json"))


def test_an_array_that_is_not_utf8_names_the_byte(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.json:2: .*0xe9.*column 3\b"):
        read(write(tmp_path, b'[\n{"\xe9": 1}]', "rows.json"))


@pytest.mark.parametrize("content", ["", " \n\r\n\t", "\ufeff", "[]", " [ \n]"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r": .*empty"):
        read(write(tmp_path, content, "rows.json"))


def test_lines_are_streamed(tmp_path: Path) -> None:
    path = write(tmp_path, (json.dumps(ALPACA) + "\n") * 20_000)
    rows = read_conversations(str(path), AUTO)
    next(rows)
    path.write_bytes(b"")  # what was not read yet is gone, except for one buffer
    assert sum(1 for _ in rows) < 10_000


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_text_arrives_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], indent: int | None, ascii_only: bool
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"instruction": f"p{text}", "output": f"{text}."} for text in texts]
    array = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    expected = [
        (Message("user", row["instruction"]), Message("assistant", row["output"])) for row in rows
    ]
    for content in (array, lines):
        found = read(write(folder, content))
        assert [row.messages for row in found if isinstance(row, Conversation)] == expected


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.recursive(st.none() | st.integers() | st.text(), st.lists), min_size=1))
def test_arrays_and_lines_give_the_same_values(values: list[Any]) -> None:
    file = io.BytesIO(json.dumps(values, indent=2).encode())
    array = list(array_rows(file, name="rows.json"))
    assert [row.value for row in array if isinstance(row, RawRow)] == values
    lines = [json.dumps({"v": value}).encode() for value in values]
    found = line_rows(iter(lines), first_line=1)
    assert [row.value for row in found if isinstance(row, RawRow)] == [{"v": v} for v in values]
