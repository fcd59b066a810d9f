"""Columns beside those of a row format: read, refused by name, or left aside and named."""

import json
from pathlib import Path
from typing import Any

import pytest

from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.rows.conversation import BadRow, Conversation, Document
from roll_sft.data.rows.shards import ShardRows
from tests.data.rows.reading import find_shards

MESSAGES = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
ALPACA = {"instruction": "p", "output": "r"}
PAIR = {"prompt": MESSAGES["messages"][:1], "completion": MESSAGES["messages"][1:]}
TEXT = {"text": "t"}


def read_one(
    folder: Path, row: dict[str, Any], **named: str
) -> tuple[Conversation | Document | BadRow, set[str]]:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row))
    rows = ShardRows(find_shards(str(path))[0], ColumnKeys(**named))
    (found,) = rows
    return found, rows.left_aside


def reason(folder: Path, row: dict[str, Any], **named: str) -> str:
    found, _ = read_one(folder, row, **named)
    assert isinstance(found, BadRow), found
    return found.reason


@pytest.mark.parametrize(
    ("row", "named", "expected"),
    [
        ({**ALPACA, "context": "a passage"}, {"query": "context"}, "data.query_key=context to put"),
        ({**PAIR, "context": "a passage"}, {}, "name it with data.query_key=context"),
        ({**ALPACA, "chosen": "a", "rejected": "b"}, {"response": "chosen"}, "response_key=chosen"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            {"response": "chosen"},
            "response_key=chosen",
        ),
        ({**MESSAGES, "rejected_response": "b"}, {}, "column 'rejected_response'"),
        ({**PAIR, "label": False}, {}, "column 'label'"),
        ({**MESSAGES, "kto_tag": False}, {}, "column 'kto_tag'"),
        ({**MESSAGES, "loss_mask": [0, 1]}, {}, "column 'loss_mask'"),
        ({**MESSAGES, "weight": -0.5}, {}, "column 'weight' is -0.5"),
        ({**ALPACA, "weight": "2"}, {}, "column 'weight' is '2'"),
        ({**MESSAGES, "sample_weight": 2}, {}, "column 'sample_weight'"),
        ({**ALPACA, "loss_weight": 0}, {}, "column 'loss_weight'"),
        ({**ALPACA, "train": False}, {}, "column 'train'"),
        ({**MESSAGES, "mask": "User"}, {}, "column 'mask'"),
        ({**MESSAGES, "masked": True}, {}, "column 'masked'"),
        ({**MESSAGES, "chat_template": "{{ messages }}"}, {}, "set data.chat_template"),
        ({**MESSAGES, "documents": [{"text": "d"}]}, {}, "column 'documents'"),
        ({**TEXT, "system_prompt": "s"}, {"text": "text"}, "column 'system_prompt'"),
        ({**TEXT, "enable_thinking": True}, {}, "column 'enable_thinking'"),
        ({**ALPACA, "image_path": "a.png"}, {}, "column 'image_path'"),
    ],
)
def test_a_column_that_would_change_training_is_refused_with_a_remedy_that_works(
    tmp_path: Path, row: dict[str, Any], named: dict[str, str], expected: str
) -> None:
    assert expected in reason(tmp_path, row)
    if named:
        found, _ = read_one(tmp_path, row, **named)
        assert not isinstance(found, BadRow), found


@pytest.mark.parametrize(
    "column",
    [
        *({"context": ""}, {"images": []}, {"label": True}, {"label": 0}, {"weight": 1.0}),
        *({"masked": False}, {"train": True}, {"documents": None}, {"chosen": ""}),
    ],
)
def test_a_column_that_changes_nothing_is_no_reason_to_refuse(
    tmp_path: Path, column: dict[str, Any]
) -> None:
    for row in (ALPACA, PAIR, MESSAGES):
        found, _ = read_one(tmp_path, {**row, **column})
        assert isinstance(found, Conversation), found


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("row", [ALPACA, PAIR, MESSAGES])
def test_a_system_prompt_is_read_under_each_name(
    tmp_path: Path, row: dict[str, Any], name: str
) -> None:
    found, aside = read_one(tmp_path, {**row, name: "s"})
    assert isinstance(found, Conversation), found
    assert [(found.messages[0].role, found.messages[0].content), aside] == [("system", "s"), set()]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_the_thought_beside_a_response_belongs_to_the_answer(tmp_path: Path, name: str) -> None:
    found, aside = read_one(tmp_path, {**ALPACA, name: "hm"})
    assert isinstance(found, Conversation), found
    assert (found.messages[-1].reasoning, aside) == ("hm", set())


def test_template_variables_of_a_row_are_read(tmp_path: Path) -> None:
    variables = {"enable_thinking": False, "custom": {"a": [1]}}
    for columns in (
        {"chat_template_kwargs": variables},
        {"chat_template_kwargs": json.dumps(variables)},
        {"chat_template_kwargs": {"custom": {"a": [1]}}, "enable_thinking": False},
    ):
        for row in (ALPACA, PAIR, MESSAGES):
            found, aside = read_one(tmp_path, {**row, **columns})
            assert isinstance(found, Conversation), found
            assert (found.template_kwargs, aside) == (variables, set())
    for columns, expected in (
        ({"enable_thinking": "no"}, "'enable_thinking' is a string; it must be true or false"),
        ({"chat_template_kwargs": [1]}, "'chat_template_kwargs' is a list; it must be an object"),
        ({"chat_template_kwargs": {"tools": []}}, "sets 'tools', which is no variable of a row"),
        (
            {"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False},
            "column 'chat_template_kwargs' and column 'enable_thinking' differ",
        ),
    ):
        assert expected in reason(tmp_path, {**MESSAGES, **columns})


def test_what_is_left_aside_is_named_at_each_level(tmp_path: Path) -> None:
    entries = [
        {"role": "user", "content": [{"type": "text", "text": "q", "cache_control": {"a": 1}}]},
        {
            "role": "assistant",
            "content": "yo",
            "id": "m1",
            "empty": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {}, "strict": True}}],
        },
    ]
    found, aside = read_one(tmp_path, {"messages": entries, "id": 7, "prompt": "q", "none": None})
    assert isinstance(found, Conversation), found
    assert aside == {
        *("id", "prompt", "messages[].id", "messages[].content[].cache_control"),
        "messages[].tool_calls[].strict",
    }


def test_names_of_a_hostile_file_are_cut_short_and_few(tmp_path: Path) -> None:
    rows = [{**TEXT, f"{number}\x1b[2J{'n' * 1000}": 1} for number in range(300)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = ShardRows(find_shards(str(path))[0], ColumnKeys())
    assert all(isinstance(row, Document) for row in found)
    assert len(found.left_aside) == 100
    assert all(len(name) < 70 and name.isprintable() for name in found.left_aside)
    refusal = reason(tmp_path, {"\x1b[2J" + "n" * 100_000: 1, "text": 5})
    assert "column 'text' is a number" in refusal
    refusal = reason(tmp_path, {"\x1b[2J" + "n" * 100_000: 1})
    assert len(refusal) <= 500
    assert refusal.isprintable()
