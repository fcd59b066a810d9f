"""Rows of prompts: a row without an answer is read as if it had one, which is then left out."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from roll_sft.data.rows.columns import ColumnKeys, RowFormat, column_names, find_column
from roll_sft.data.rows.conversation import BadRow, Conversation, Message
from roll_sft.data.rows.json_rows import RawRow
from roll_sft.data.rows.shards import Shard, ShardRows

NO_ANSWER = "\ufdd4"  # Unicode forbids this character in any text
_ANSWERS = ("assistant", "gpt", "chatgpt", "function_call")


class PromptRows(ShardRows):
    """The rows of a shard, each with an answer."""

    def __init__(
        self, shard: Shard, keys: ColumnKeys, *, row_format: RowFormat | None = None
    ) -> None:
        super().__init__(shard, keys, row_format=row_format)
        self._rows = map(self._answered, self._rows)

    def _answered(self, row: RawRow | BadRow) -> RawRow | BadRow:
        if isinstance(row, BadRow) or not isinstance(row.value, dict):
            return row
        columns = {name: value for name, value in row.value.items() if value is not None}
        return replace(row, value=with_an_answer(columns, self._keys))


def with_an_answer(columns: Mapping[str, object], keys: ColumnKeys) -> Mapping[str, object]:
    """`columns` of a row, with an answer in its format where it has none."""
    names = column_names(keys)
    listed = find_column(columns, "messages", names)
    if listed is not None:
        return {**columns, listed: _answered(columns[listed])}
    prompt = find_column(columns, "prompt", names)
    response = find_column(columns, "response", names)
    if prompt is None or (response is not None and columns[response] not in ("", [])):
        return columns
    answer: Any = NO_ANSWER
    if isinstance(columns[prompt], list):
        answer = [{"role": "assistant", "content": NO_ANSWER}]
    return {**columns, response or names["response"][0]: answer}


def _answered(entries: Any) -> Any:
    if not isinstance(entries, list) or not entries or not isinstance(entries[-1], dict):
        return entries  # which is refused where it is read
    last = entries[-1]
    speaker, text = ("from", "value") if "role" not in last else ("role", "content")
    if last.get(speaker) in _ANSWERS:
        return entries
    answer = {speaker: "gpt" if speaker == "from" else "assistant", text: NO_ANSWER}
    return [*entries, answer]


def question_and_reference(row: Conversation) -> tuple[tuple[Message, ...], str | None]:
    """The messages before the last answer of `row`, and its text; None where it has none."""
    *before, answer = row.messages
    assert answer.role == "assistant", "a row of prompts ends with an answer"
    text = answer.content.strip()
    return tuple(before), None if text in ("", NO_ANSWER) else answer.content
