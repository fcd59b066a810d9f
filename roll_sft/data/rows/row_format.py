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
A column named in `ColumnKeys` is used in place of detection. Null counts as absent. Text is passed
on as it stands. A message with other keys is read by `message_fields`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from roll_sft.data.rows.checks import BadRowError, NoAnswerError, kind_of, listed, shown, text_of
from roll_sft.data.rows.columns import (
    ENABLE_THINKING,
    KNOWN_COLUMNS,
    TEMPLATE_KWARGS,
    ColumnKeys,
    ColumnNames,
    RowFormat,
    at,
    check_columns,
    column_names,
    column_plan,
    column_text,
    find_column,
    has_column,
    required,
)
from roll_sft.data.rows.conversation import ROLES, Conversation, Document, Message

# Name of a speaker -> role. `function_call` is an assistant whose text is calls as JSON.
_ROLES_OF_ROLE: Mapping[str, str] = {**{role: role for role in ROLES}, "function": "tool"}
_ROLES_OF_FROM: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}


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
            from roll_sft.data.rows.json_values import parsed_json

            columns[name] = parsed_json(text, where=at(name))
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
        keys.prompt is None and keys.response is None and has_column(columns, "messages", names)
    ):
        return _spelling(columns, names)
    is_asked = keys.prompt is not None or keys.response is not None
    if is_asked or has_column(columns, "prompt", names) or has_column(columns, "response", names):
        sides = (find_column(columns, "prompt", names), find_column(columns, "response", names))
        is_pair = any(_is_listed(columns[side]) for side in sides if side is not None)
        return "pairs" if is_pair else "alpaca"
    if has_column(columns, "text", names):
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
    if row_format in ("messages", "sharegpt"):
        messages = _listed(columns, names, left_aside)
    else:
        from roll_sft.data.rows import instruction_rows

        if row_format == "text":
            return Document(instruction_rows.document(columns, names), row=row, line=line)
        if row_format == "alpaca":
            messages = instruction_rows.alpaca(columns, plan)
        else:
            messages = instruction_rows.pair(columns, names, left_aside)
    tools: tuple[Mapping[str, Any], ...] = ()
    if (tools_name := find_column(columns, "tools", names)) is not None:
        from roll_sft.data.rows.tool_calls import read_tools

        tools = read_tools(columns[tools_name], where=at(tools_name))
    variables: Mapping[str, Any] = {}
    if TEMPLATE_KWARGS in columns or ENABLE_THINKING in columns:
        from roll_sft.data.rows.template_kwargs import read_template_kwargs

        variables = read_template_kwargs(columns)
    return Conversation(messages, row=row, line=line, tools=tools, template_kwargs=variables)


def read_messages(entries: object, *, column: str, left_aside: set[str]) -> tuple[Message, ...]:
    """Return the messages that `column` lists; raise `BadRowError` for what cannot be used.

    The names of keys that are left aside go into `left_aside`, as `messages[].id`.
    """
    if not isinstance(entries, list):
        raise BadRowError(
            f"column '{column}' is {kind_of(entries)}; it must be a list of {{role, content}}"
        )
    keys: set[str] = set()
    messages = tuple(
        _message(entry, where=f"{column}[{index}]", left_aside=keys)
        for index, entry in enumerate(entries)
    )
    if keys:
        left_aside.update(f"{column}[].{key}" for key in keys)
    return messages


def check_answer(messages: Sequence[Message], *, where: str) -> None:
    """Raise `NoAnswerError` unless an assistant says or calls something."""
    for message in messages:
        if message.role == "assistant" and (message.content.strip() or message.tool_calls):
            return
    raise NoAnswerError(
        f"{where} has no assistant message with text among its {len(messages)}; "
        f"a row needs one to train on"
    )


def with_system(messages: tuple[Message, ...], system: str, *, where: str) -> tuple[Message, ...]:
    """Put a system message before `messages`, unless they have one with the same text."""
    if not system:
        return messages
    first = next((message for message in messages if message.role == "system"), None)
    if first is None:
        return (Message("system", system), *messages)
    if first.content != system:
        raise BadRowError(
            f"{where} and a system message of the row hold different texts; keep one of them"
        )
    return messages


def _spelling(columns: Mapping[str, object], names: ColumnNames) -> RowFormat | None:
    name = find_column(columns, "messages", names)
    entries = None if name is None else columns[name]
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
        return None
    return "sharegpt" if "from" in entries[0] and "role" not in entries[0] else "messages"


def _is_listed(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _listed(
    columns: Mapping[str, object], names: ColumnNames, left_aside: set[str]
) -> tuple[Message, ...]:
    name = required(columns, "messages", names)
    messages = read_messages(columns[name], column=name, left_aside=left_aside)
    check_answer(messages, where=at(name))
    system = find_column(columns, "system", names)
    return with_system(messages, column_text(columns, system), where=at(system))


def _message(entry: object, *, where: str, left_aside: set[str]) -> Message:
    if not isinstance(entry, dict):
        raise BadRowError(f"{where} is {kind_of(entry)}; it must be an object {{role, content}}")
    fields = {name: value for name, value in entry.items() if value is not None}
    speaker, role, text_field = _speaker(fields, where=where)
    if len(fields) == 2 and speaker != "function_call" and isinstance(fields.get(text_field), str):
        return Message(role, text_of(fields[text_field], where=f"{where}.{text_field}"))
    from roll_sft.data.rows.message_fields import read_fields

    return read_fields(
        entry, speaker, role, text_field=text_field, where=where, left_aside=left_aside
    )


def _speaker(fields: Mapping[str, object], *, where: str) -> tuple[str, str, str]:
    """The name of the speaker, its role, and the key that holds the text."""
    speaker, text_field, roles = "role", "content", _ROLES_OF_ROLE
    if "from" in fields and "role" not in fields:
        speaker, text_field, roles = "from", "value", _ROLES_OF_FROM
    said = fields.get(speaker)
    if not isinstance(said, str) or said not in roles:
        given = f"{speaker} '{shown(said)}'" if isinstance(said, str) else f"no {speaker} as text"
        raise BadRowError(f"{where} has {given}; accepted are {', '.join(roles)}")
    return said, roles[said], text_field
