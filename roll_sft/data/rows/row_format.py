"""The columns of a row -> a conversation or a document.

The format of a row follows from its columns:
- alpaca: `instruction` or `prompt`; optionally `input` or `query`; `output`, `response` or
  `completion`; optionally `system`, `tools`, `history` (a list of [question, answer] that come
  before) and `reasoning_content` (the thought before the answer);
- pairs: a prompt and a response that are lists of messages; only those of the response are trained
  on;
- messages: a column `messages`, a list of {role, content};
- sharegpt: a column `conversations` or `messages`, a list of {from, value};
- text: a column `text` and none of the above, trained on as a whole.
A column named in `ColumnKeys` is used in place of detection. Null counts as absent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from roll_sft.data.rows.checks import (
    BadRowError,
    NoAnswerError,
    is_empty,
    kind_of,
    listed,
    parsed_json,
    text_of,
)
from roll_sft.data.rows.columns import (
    ENABLE_THINKING,
    HISTORY,
    KNOWN_COLUMNS,
    TEMPLATE_KWARGS,
    ColumnKeys,
    ColumnNames,
    ColumnPlan,
    RowFormat,
    check_columns,
    column_names,
    column_plan,
)
from roll_sft.data.rows.conversation import Conversation, Document, Message
from roll_sft.data.rows.messages import check_answer, read_messages, with_system


def columns_of(value: object, keys: ColumnKeys) -> Mapping[str, object]:
    """Return the row without its null columns; messages given as JSON text are parsed."""
    if not isinstance(value, dict):
        raise BadRowError(
            f"the row is {kind_of(value)}; each row must be a JSON object with named columns"
        )
    columns = {name: content for name, content in value.items() if content is not None}
    for name in column_names(keys)["messages"]:
        text = columns.get(name)
        if isinstance(text, str) and text.lstrip().startswith("["):
            columns[name] = parsed_json(text, where=_at(name))
    return columns


def format_of(columns: Mapping[str, object], keys: ColumnKeys) -> RowFormat | None:
    """Return the format of a row; None for an empty list of messages, which two formats have.

    Raises `BadRowError` if the columns fit no format, or if two that differ have one use.
    """
    names = column_names(keys)
    if keys.text is not None:
        return "text"
    # `messages` first: data sets exist that repeat the first question beside it, as `prompt`.
    if keys.messages is not None or (
        keys.prompt is None and keys.response is None and _has(columns, "messages", names)
    ):
        return _spelling(columns, names)
    is_asked = keys.prompt is not None or keys.response is not None
    if is_asked or _has(columns, "prompt", names) or _has(columns, "response", names):
        sides = (_find(columns, "prompt", names), _find(columns, "response", names))
        is_pair = any(_is_listed(columns[side]) for side in sides if side is not None)
        return "pairs" if is_pair else "alpaca"
    if _has(columns, "text", names):
        return "text"
    raise BadRowError(
        f"the columns fit no accepted format (columns found: {listed(columns)}); a row needs "
        f"{' or '.join(KNOWN_COLUMNS['prompt'])} with {' or '.join(KNOWN_COLUMNS['response'])}, or "
        f"{' or '.join(KNOWN_COLUMNS['messages'])}, or text; name other columns with "
        f"data.prompt_key and data.response_key, data.messages_key, or data.text_key"
    )


def sample_of(
    columns: Mapping[str, object],
    *,
    row_format: RowFormat,
    keys: ColumnKeys,
    place: tuple[int, int],
    left_aside: set[str],
) -> Conversation | Document:
    """Return the row at `place` (row, line) as a conversation or a document.

    Raises `BadRowError` if it cannot be used. The names of columns and keys that are left aside go
    into `left_aside`.
    """
    plan = column_plan(row_format, keys)
    names = plan.names
    check_columns(columns, plan=plan, row_format=row_format)
    left_aside |= columns.keys() - plan.known
    row, line = place
    if row_format == "text":
        return Document(_document(columns, names), row=row, line=line)
    if row_format == "alpaca":
        messages = _alpaca(columns, plan)
    else:
        reader = _pair if row_format == "pairs" else _listed
        messages = reader(columns, names, left_aside)
    tools: tuple[Mapping[str, Any], ...] = ()
    if (tools_name := _find(columns, "tools", names)) is not None:
        from roll_sft.data.rows.tool_calls import read_tools

        tools = read_tools(columns[tools_name], where=_at(tools_name))
    variables: Mapping[str, Any] = {}
    if TEMPLATE_KWARGS in columns or ENABLE_THINKING in columns:
        from roll_sft.data.rows.template_kwargs import read_template_kwargs

        variables = read_template_kwargs(columns)
    return Conversation(messages, row=row, line=line, tools=tools, template_kwargs=variables)


def _spelling(columns: Mapping[str, object], names: ColumnNames) -> RowFormat | None:
    name = _find(columns, "messages", names)
    entries = None if name is None else columns[name]
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
        return None
    return "sharegpt" if "from" in entries[0] and "role" not in entries[0] else "messages"


def _is_listed(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _document(columns: Mapping[str, object], names: ColumnNames) -> str:
    name = _required(columns, "text", names)
    text = _column_text(columns, name)
    if not text.strip():
        raise NoAnswerError(f"{_at(name)} holds no text; a row needs some to train on")
    return text


def _alpaca(columns: Mapping[str, object], plan: ColumnPlan) -> tuple[Message, ...]:
    names = plan.names
    prompt_name = _required(columns, "prompt", names)
    response_name = _required(columns, "response", names)
    prompt = _column_text(columns, prompt_name)
    query = _column_text(columns, _find(columns, "query", names))
    response = _column_text(columns, response_name)
    system_name = _find(columns, "system", names)
    system = _column_text(columns, system_name)
    if not response.strip():
        raise NoAnswerError(
            f"{_at(response_name)} holds no text; a row needs a response to train on"
        )
    if not prompt and not query:
        raise BadRowError(f"{_at(prompt_name)} is empty; a row needs a prompt")
    messages = (
        *_history(columns.get(HISTORY) or []),
        Message("user", f"{prompt}\n{query}" if query else prompt),
        Message("assistant", response, reasoning=_reasoning(columns, plan.reasoning)),
    )
    return with_system(messages, system, where=_at(system_name))


def _reasoning(columns: Mapping[str, object], names: Sequence[str]) -> str:
    """The thought before the answer."""
    texts = {_column_text(columns, name) for name in names if name in columns} - {""}
    if len(texts) > 1:
        raise BadRowError(f"columns {' and '.join(names)} hold different texts; keep one of them")
    return texts.pop() if texts else ""


def _history(turns: object) -> tuple[Message, ...]:
    """Earlier turns of an alpaca row, [question, answer] each."""
    where = _at(HISTORY)
    if not isinstance(turns, list):
        raise BadRowError(f"{where} is {kind_of(turns)}; it must be a list of [question, answer]")
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRowError(f"{where}[{index}] must be a list of two texts: [question, answer]")
        question, answer = (text_of(said, where=f"{where}[{index}]") for said in turn)
        messages += (Message("user", question), Message("assistant", answer))
    return tuple(messages)


def _pair(
    columns: Mapping[str, object], names: ColumnNames, left_aside: set[str]
) -> tuple[Message, ...]:
    prompt_name = _required(columns, "prompt", names)
    response_name = _required(columns, "response", names)
    if query_name := _find(columns, "query", names):
        raise BadRowError(
            f"{_at(query_name)} has no place beside a prompt that is a list of messages; write it "
            f"as one of them"
        )
    asked = read_messages(columns[prompt_name], column=prompt_name, left_aside=left_aside)
    answered = read_messages(columns[response_name], column=response_name, left_aside=left_aside)
    check_answer(answered, where=_at(response_name))
    untrained = tuple(replace(message, train=False) for message in asked)
    return _with_system_column((*untrained, *answered), columns, names)


def _listed(
    columns: Mapping[str, object], names: ColumnNames, left_aside: set[str]
) -> tuple[Message, ...]:
    name = _required(columns, "messages", names)
    messages = read_messages(columns[name], column=name, left_aside=left_aside)
    check_answer(messages, where=_at(name))
    return _with_system_column(messages, columns, names)


def _with_system_column(
    messages: tuple[Message, ...], columns: Mapping[str, object], names: ColumnNames
) -> tuple[Message, ...]:
    name = _find(columns, "system", names)
    return with_system(messages, _column_text(columns, name), where=_at(name))


def _required(columns: Mapping[str, object], what: str, names: ColumnNames) -> str:
    name = _find(columns, what, names)
    if name is None:
        raise BadRowError(
            f"no {what}: column {' or '.join(map(repr, names[what]))} is absent or null "
            f"(columns found: {listed(columns)}); name it with data.{what}_key"
        )
    return name


def _has(columns: Mapping[str, object], what: str, names: ColumnNames) -> bool:
    return any(name in columns for name in names[what])


def _find(columns: Mapping[str, object], what: str, names: ColumnNames) -> str | None:
    """Return the column of `columns` to read, or None if it has none.

    Raises `BadRowError` if it has several that say different things.
    """
    present = [name for name in names[what] if name in columns]
    if len(present) < 2:
        return present[0] if present else None
    filled = [name for name in present if not is_empty(columns[name])] or present
    for name in filled[1:]:
        if columns[name] != columns[filled[0]]:
            raise BadRowError(
                f"columns '{filled[0]}' and '{name}' could both be the {what}, and differ; "
                f"choose with data.{what}_key={filled[0]} or data.{what}_key={name}"
            )
    return filled[0]


def _column_text(columns: Mapping[str, object], name: str | None) -> str:
    return "" if name is None else text_of(columns[name], where=_at(name))


def _at(column: str | None) -> str:
    return f"column '{column}'"
