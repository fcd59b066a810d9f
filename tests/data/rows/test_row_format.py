"""Each format that a row can have, on a small cut of it with counts checked by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from roll_sft.base.errors import DataError
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.rows.conversation import BadRow, Conversation, Document, Message, ToolCall
from tests.data.rows.reading import read_conversations

AUTO = ColumnKeys()
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}
CALL = ToolCall("add", {"a": 1}, id="c1")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def read_one(
    folder: Path, row: dict[str, Any], keys: ColumnKeys = AUTO
) -> Conversation | Document | BadRow:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row))
    (found,) = read_conversations(str(path), keys)
    return found


def conversation(folder: Path, row: dict[str, Any], keys: ColumnKeys = AUTO) -> Conversation:
    found = read_one(folder, row, keys)
    assert isinstance(found, Conversation), found
    return found


def messages(folder: Path, row: dict[str, Any], keys: ColumnKeys = AUTO) -> tuple[Message, ...]:
    return conversation(folder, row, keys).messages


def reason(folder: Path, row: dict[str, Any], keys: ColumnKeys = AUTO) -> str:
    found = read_one(folder, row, keys)
    assert isinstance(found, BadRow), found
    return found.reason


# Alpaca


def test_completion_is_a_response_and_history_comes_first(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "r", "system": "s", "history": [["q", "a"], ["r", "b"]]}
    roles = ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
    assert [(m.role, m.content) for m in messages(tmp_path, row)] == list(
        zip(roles, ["s", "q", "a", "r", "b", "p", "r"], strict=True)
    )
    assert "history[0] must be" in reason(tmp_path, {**row, "history": [["q"]]}).replace("'", "")
    assert "'history'[0] is null" in reason(tmp_path, {**row, "history": [["q", None]]})
    assert "'history' is a string" in reason(tmp_path, {**row, "history": "q"})


def test_tools_beside_any_conversation_are_kept_parsed(tmp_path: Path) -> None:
    for row in ({"prompt": "p", "response": "r"}, {"messages": [USER, ANSWER]}):
        for tools in ([TOOL], json.dumps([TOOL]), f" {json.dumps([TOOL])}\n"):
            assert conversation(tmp_path, {**row, "tools": tools}).tools == (TOOL,)
        assert conversation(tmp_path, {**row, "tools": [json.dumps(TOOL)]}).tools == (TOOL,)
        for nothing in ("", [], None, "[]", " ", "null"):
            assert conversation(tmp_path, {**row, "tools": nothing}).tools == ()
        for wrong, expected in (
            ("[{", "column 'tools' is no JSON: "),
            ([1], "column 'tools'[0] is a number"),
            ({"name": "add"}, "column 'tools' is an object; it must be a list"),
            ('[{"a": 1, "a": 2}]', "column 'tools' has the key 'a' twice"),
            ([{"a": float("nan")}], "column 'tools'[0].a is NaN, which JSON cannot hold"),
        ):
            assert expected in reason(tmp_path, {**row, "tools": wrong})
    row = {"messages": [USER, ANSWER], "api": [TOOL]}
    assert conversation(tmp_path, row, ColumnKeys(tools="api")).tools == (TOOL,)


# Messages


@pytest.mark.parametrize(
    "said",
    [
        {"tool_calls": [{"id": "c1", "type": "function", "function": CALLED}]}
        for CALLED in (
            {"name": "add", "arguments": {"a": 1}},
            {"name": "add", "arguments": '{"a":1}'},
        )
    ]
    + [
        {"tool_calls": [{"id": "c1", "name": "add", "arguments": {"a": 1}}]},
        {"content": None, "tool_calls": [{"id": "c1", "name": "add", "arguments": {"a": 1}}]},
        {"content": "", "tool_calls": [{"id": "c1", "name": "add", "arguments": {"a": 1}}]},
        {"function_call": {"id": "c1", "name": "add", "arguments": '{"a": 1}'}},
    ],
)
def test_tool_calls_are_read_in_each_form(tmp_path: Path, said: dict[str, Any]) -> None:
    answer = {"role": "tool", "content": "1", "name": "add", "tool_call_id": "c1"}
    found = messages(tmp_path, {"messages": [USER, {"role": "assistant", **said}, answer, ANSWER]})
    assert found[1] == Message("assistant", "", tool_calls=(CALL,))
    assert found[2] == Message("tool", "1", name="add", tool_call_id="c1")


def test_parts_of_each_vocabulary_say_what_the_keys_of_a_message_say(tmp_path: Path) -> None:
    called = {"name": "add", "arguments": {"a": 1}, "id": "c1"}
    expected = Message("assistant", "a b", reasoning="hm", tool_calls=(CALL,))
    for parts in (
        [
            {"type": "reasoning", "value": "hm"},
            {"type": "text", "value": "a "},
            {"type": "text", "value": "b"},
            {"type": "tool_call", "value": json.dumps(called)},
        ],
        [
            {"type": "thinking", "thinking": "hm", "signature": "x"},
            {"type": "output_text", "text": "a b", "value": None},
            {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
        ],
    ):
        entries = [USER, {"role": "assistant", "content": parts}]
        assert messages(tmp_path, {"messages": entries})[1] == expected
    for parts, refusal in (
        ([{"type": "text", "text": "a", "value": "b"}], "content[0] has different text and value"),
        ([{"type": "text", "text": "a", "weight": 0}], "content[0] has 'weight', which would be"),
        ([{"type": "tool_call"}], "content[0] has no name; a call must be"),
        (
            [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "hm"}],
            "content[1] is reasoning after content; write reasoning, then content, then tool calls",
        ),
    ):
        entries = [USER, {"role": "assistant", "content": parts}, ANSWER]
        assert refusal in reason(tmp_path, {"messages": entries})


def test_parts_of_text_are_joined_and_reasoning_is_kept_apart(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    for name in ("reasoning_content", "reasoning", "thinking"):
        entries = [{"role": "user", "content": parts}, {**ANSWER, name: "hm"}]
        assert messages(tmp_path, {"messages": entries}) == (
            Message("user", "a b"),
            Message("assistant", "yo", reasoning="hm"),
        )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"train": False}, False),
        ({"weight": 0}, False),
        ({"train": True}, True),
        ({"weight": 1.0}, True),
        ({"train": None, "weight": None}, True),
        ({"train": False, "weight": 0}, False),
        ({"training": False}, False),
        ({"loss": False}, False),
        ({"masked": True}, False),
        ({"masked": False}, True),
        ({"loss_weight": 0.0}, False),
        ({"loss_weight": 1.0, "loss_scale": 1}, True),
        ({"loss_scale": 0.0}, False),
        ({"loss_mask": 0}, False),
    ],
)
def test_a_turn_can_ask_not_to_be_supervised(
    tmp_path: Path, flags: dict[str, Any], expected: bool
) -> None:
    found = messages(tmp_path, {"messages": [USER, {**ANSWER, **flags}, USER, ANSWER]})
    assert [message.train for message in found] == [True, expected, True, True]


def test_a_system_column_is_the_first_message(tmp_path: Path) -> None:
    system = {"role": "system", "content": "s"}
    for entries in ([USER, ANSWER], [system, USER, ANSWER]):
        found = messages(tmp_path, {"messages": entries, "system": "s"})
        assert found == (Message("system", "s"), Message("user", "hi"), Message("assistant", "yo"))
    row = {"messages": [system, USER, ANSWER], "system": "t"}
    assert "column 'system' and a system message of the row hold different" in reason(tmp_path, row)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"role": "developer", "content": "x"}, "messages[1] has role 'developer'; accepted are"),
        ({**ANSWER, "weight": 0.5}, "messages[1] has weight 0.5; a message is trained on or not"),
        ({**ANSWER, "weight": True}, "messages[1] has weight True"),
        ({**ANSWER, "train": 1}, "messages[1].train is a number; it must be true or false"),
        ({**ANSWER, "train": True, "weight": 0}, "train True and weight 0"),
        ({**ANSWER, "loss": 1.7}, "messages[1].loss is a number; it must be true or false"),
        (
            {**ANSWER, "mask": 0},
            "messages[1] has 'mask', which would be lost; data formats",
        ),
        ({**ANSWER, "loss_weight": 0.3}, "messages[1] has loss_weight 0.3; a message is trained"),
        ({**ANSWER, "training": True, "masked": True}, "training True and masked True; keep one"),
        ({**USER, "train": True}, "messages[1] (user) asks to be trained on with 'train'; only as"),
        ({**ANSWER, "thought": "hm"}, "'thought', which would be lost; write it as reasoning_con"),
        ({**ANSWER, "channel": "final"}, "has 'channel', which would be lost; write thoughts as"),
        ({**ANSWER, "tool_call": "f()"}, "has 'tool_call', which would be lost; write calls as"),
        ({**USER, "tools": [{}]}, "messages[1] has 'tools', which would be lost; write the tools"),
        ({**ANSWER, "images": ["a.png"]}, "messages[1] has 'images', which would be lost; only t"),
        (
            {"role": "assistant", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[1].content[0] has type 'image_url'; only text",
        ),
        ({"role": "assistant", "content": {"a": 1}}, "messages[1].content is an object; it must"),
        ({**ANSWER, "thinking": "a", "reasoning": "b"}, "'reasoning' and 'thinking' with differ"),
        ({"role": "user", "content": "x", "thinking": "a"}, "messages[1] (user) has reasoning"),
        ({"role": "user", "tool_calls": [{"name": "f"}]}, "messages[1] (user) calls tools"),
        ({**ANSWER, "tool_calls": [{"arguments": {}}]}, "messages[1].tool_calls[0] has no name"),
        ({**ANSWER, "tool_calls": {"name": "f"}}, "messages[1].tool_calls is an object"),
        ({**ANSWER, "tool_calls": [{"name": "f", "type": "code"}]}, "has type 'code'; only calls"),
        ({**ANSWER, "tool_calls": [{"name": "f", "args": {"a": 1}}]}, "has args and no arguments"),
        (
            {**ANSWER, "tool_calls": [{"function": {"name": "f"}, "arguments": {"a": 1}}]},
            "tool_calls[0] has arguments beside its function; write it inside",
        ),
        (
            {**ANSWER, "tool_calls": [{"name": "f", "arguments": {}, "result": "3"}]},
            "tool_calls[0] has 'result', which would be lost; write it as a message of role tool",
        ),
        (
            {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{a}"}]},
            "messages[1].tool_calls[0].arguments is no JSON: ",
        ),
        ({**ANSWER, "tool_calls": [{"name": "f", "arguments": [1]}]}, "arguments is a list; they"),
        (
            {**ANSWER, "tool_calls": [{"name": "f", "arguments": {"x": ["\ud800"]}}]},
            "arguments.x[0] holds the lone surrogate \\ud800",
        ),
    ],
)
def test_what_a_message_cannot_say_is_refused_by_name(
    tmp_path: Path, entry: dict[str, Any], expected: str
) -> None:
    assert expected in reason(tmp_path, {"messages": [USER, entry, ANSWER]})


@pytest.mark.parametrize("column", ["images", "audio", "videos"])
def test_columns_of_what_is_no_text_are_refused(tmp_path: Path, column: str) -> None:
    for row in ({"messages": [USER, ANSWER]}, {"prompt": "p", "response": "r"}, {"text": "t"}):
        assert f"column '{column}' " in reason(tmp_path, {**row, column: ["a.png"]})
        kept = {**row, column: [], "id": 7, "source": "web", "meta": {"audio": 1}}
        assert not isinstance(read_one(tmp_path, kept), BadRow)


# ShareGPT


def test_sharegpt_conversation_with_calls(tmp_path: Path) -> None:
    calls = [{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": '{"a": 2}'}]
    said = [
        ("human", "1+0, 2+0?"),
        ("function_call", json.dumps(calls)),
        ("observation", '{"sum": [1, 2]}'),
        ("gpt", "1 and 2"),
        ("user", "add 1"),
        ("function_call", json.dumps(calls[0])),
        ("function_response", "1"),
        ("chatgpt", "1"),
    ]
    entries = [{"from": speaker, "value": value} for speaker, value in said]
    row = {"conversations": entries, "system": "s", "tools": json.dumps([TOOL]), "id": "x"}
    found = conversation(tmp_path, row)
    assert [message.role for message in found.messages] == [
        "system",
        *["user", "assistant", "tool", "assistant"] * 2,
    ]
    first, second = ToolCall("add", {"a": 1}), ToolCall("add", {"a": 2})
    assert found.messages[2] == Message("assistant", "", tool_calls=(first, second))
    assert found.messages[6] == Message("assistant", "", tool_calls=(first,))
    assert found.messages[3].content == '{"sum": [1, 2]}'
    assert found.tools == (TOOL,)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"from": "bing", "value": "x"}, "conversations[1] has from 'bing'; accepted are human,"),
        ({"from": "gpt"}, "conversations[1] has no value (fields found: from)"),
        ({"from": "function_call", "value": "add(1)"}, "conversations[1].value is no JSON: "),
        ({"from": "function_call", "value": "[]"}, "conversations[1].value calls nothing"),
        ({"from": "function_call", "value": '{"a": 1}'}, "conversations[1].value has no name"),
        ({"from": "gpt", "value": "x", "weight": 2}, "conversations[1] has weight 2"),
    ],
)
def test_sharegpt_entries_that_cannot_be_used(
    tmp_path: Path, entry: dict[str, Any], expected: str
) -> None:
    row = {"conversations": [{"from": "human", "value": "a"}, entry, {"from": "gpt", "value": "b"}]}
    assert expected in reason(tmp_path, row)


def test_the_spelling_follows_the_entries_not_the_column(tmp_path: Path) -> None:
    expected = (Message("user", "hi"), Message("assistant", "yo"))
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    for column in ("messages", "conversations", "chat"):
        keys = ColumnKeys(messages="chat") if column == "chat" else AUTO
        assert messages(tmp_path, {column: [USER, ANSWER]}, keys) == expected
        assert messages(tmp_path, {column: shared}, keys) == expected


def test_messages_and_calls_can_be_json_text(tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "", "tool_calls": json.dumps([{"name": "add"}])}
    row = {"messages": json.dumps([USER, said])}
    expected = (Message("user", "hi"), Message("assistant", "", tool_calls=(ToolCall("add", {}),)))
    assert messages(tmp_path, row) == expected
    assert "column 'messages' is no JSON: " in reason(tmp_path, {"messages": "[{"})
    assert "column 'messages' is a string; it must be" in reason(tmp_path, {"messages": "hi"})


# Pairs and text


def test_only_the_completion_of_a_pair_of_lists_trains(tmp_path: Path) -> None:
    for prompt, completion in (("prompt", "completion"), ("prompt", "response")):
        row = {prompt: [USER, ANSWER, USER], completion: [ANSWER], "system": "s"}
        found = messages(tmp_path, row)
        assert [message.role for message in found] == ["system", *["user", "assistant"] * 2]
        assert [message.train for message in found if message.role == "assistant"] == [False, True]
    assert "'completion' is a string" in reason(tmp_path, {"prompt": [USER], "completion": "yo"})
    found_row = read_one(tmp_path, {"prompt": [USER, ANSWER], "completion": [USER]})
    assert isinstance(found_row, BadRow)
    assert found_row.is_empty


def test_text_is_a_document(tmp_path: Path) -> None:
    assert read_one(tmp_path, {"text": " once \n", "id": 1}) == Document(" once \n", row=0, line=1)
    found = read_one(tmp_path, {"body": "x", "text": 5}, ColumnKeys(text="body"))
    assert found == Document("x", row=0, line=1)
    empty = read_one(tmp_path, {"text": " \n"})
    assert isinstance(empty, BadRow)
    assert empty.is_empty
    assert "column 'system' " in reason(tmp_path, {"text": "t", "system": "s"})
    # A rendering beside the messages it was made from is metadata, unless it is asked for.
    row = {"messages": [USER, ANSWER], "text": "rendered", "tools": [TOOL]}
    assert len(messages(tmp_path, row)) == 2
    assert isinstance(read_one(tmp_path, row, ColumnKeys(text="text")), Document)


# Files


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"text": "t"}, {"messages": [USER, ANSWER]}, "messages .* text"),
        ({"messages": [USER, ANSWER]}, {"prompt": "p", "response": "r"}, "alpaca .* messages"),
        (
            {"prompt": "p", "response": "r"},
            {"prompt": [USER], "response": [ANSWER]},
            "pairs .* alpaca",
        ),
        (
            {"messages": [USER, ANSWER]},
            {"conversations": [{"from": "human", "value": "x"}]},
            "sharegpt .* messages",
        ),
    ],
)
def test_a_file_of_two_formats_is_refused(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], expected: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(first)}\n{json.dumps(second)}")
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{expected}"):
        list(read_conversations(str(path), AUTO))


def test_an_empty_list_of_messages_is_of_either_spelling(tmp_path: Path) -> None:
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    path = tmp_path / "rows.jsonl"
    rows = [{"conversations": entries} for entries in ([], shared, [])]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = list(read_conversations(str(path), AUTO))
    empty = [isinstance(row, BadRow) and row.is_empty for row in found]
    assert empty == [True, False, True]
