"""Rows of a file -> conversations.

What is accepted as a row, told from the columns of that row:
- Alpaca: `instruction` or `prompt`; optionally `input` or `query`; `output` or `response`;
  optionally `system`;
- messages: a column `messages`, a list of {role, content}; roles system, user and assistant.
A column named in `ColumnKeys` is used instead of what would be detected. Null counts as absent.

What is promised:
- text is passed on as it stands in the file, to the character;
- every row read is either a `Conversation` or a `BadRow`, in the order of the file;
- what concerns the file and not one row (it cannot be read, it mixes shapes, two columns could
  both be meant) is a `DataError`.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from roll_sft.data.conversation import BadRow, Conversation, Message
from roll_sft.data.rows import JsonRow, read_rows
from roll_sft.errors import ConfigError, DataError

_log = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")

# What a column is for -> the names it is detected by.
KNOWN_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("instruction", "prompt"),
    "query": ("input", "query"),
    "response": ("output", "response"),
    "system": ("system",),
    "messages": ("messages",),
}

# Parts of a message or a row that would change what is trained, and that this version would drop.
_UNSUPPORTED_MESSAGE_FIELDS = (
    "function_call",
    "reasoning",
    "reasoning_content",
    "thinking",
    "tool_calls",
    "train",
    "weight",
)
_UNSUPPORTED_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "alpaca": ("tools", "history"),
    "messages": ("tools", "system"),
}

_SURROGATE = re.compile("[\ud800-\udfff]")
_COLUMNS_SHOWN = 12

_Shape = Literal["alpaca", "messages"]
# What a column is for -> the name the user gave it, or None.
_Named = Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class ColumnKeys:
    """Columns the user named; None leaves that column to detection."""

    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    system: str | None = None
    messages: str | None = None


class _BadRowError(Exception):
    """Carries the reason from where a row is judged to where it is numbered."""


class _NoAnswerError(_BadRowError):
    """The row is well formed and holds nothing to learn."""


class _UnusableFileError(Exception):
    """Carries what is wrong with the whole file from the row that shows it."""


def read_conversations(path: Path, keys: ColumnKeys) -> Iterator[Conversation | BadRow]:
    """Read the rows of `path` in order; see the module's docstring for what is accepted.

    Raises `DataError` at once if the file is missing, unreadable, empty or of another suffix, and
    `ConfigError` if `keys` contradict each other. Raises `DataError` during the iteration for what
    makes the whole file unusable.
    """
    named: _Named = {
        "prompt": keys.prompt,
        "query": keys.query,
        "response": keys.response,
        "system": keys.system,
        "messages": keys.messages,
    }
    given = [f"data.{what}_key" for what, column in named.items() if column is not None]
    if keys.messages is not None and len(given) > 1:
        raise ConfigError(
            f"{', '.join(given)} name two shapes for one file; set either data.messages_key or the "
            f"others"
        )
    return _conversations(path, named=named, rows=read_rows(path))


def _conversations(
    path: Path, *, named: _Named, rows: Iterator[JsonRow | BadRow]
) -> Iterator[Conversation | BadRow]:
    file_shape: _Shape | None = None
    # Optional columns that the user named: a row may lack them, a file without any is worth a word.
    unused = {named["query"], named["system"]}
    num_rows = 0
    for row in rows:
        num_rows += 1
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            columns = _as_columns(row.value)
            shape = _shape_of(columns, named=named)
            file_shape = file_shape or shape
            if shape != file_shape:
                raise _UnusableFileError(
                    f"row {row.row} has the {shape} shape and the rows before it the {file_shape} "
                    f"shape (columns found: {_listed(columns)}); put them into two files"
                )
            read = _alpaca_messages if shape == "alpaca" else _listed_messages
            messages = read(columns, named=named)
        except _BadRowError as error:
            is_empty = isinstance(error, _NoAnswerError)
            yield BadRow(row=row.row, line=row.line, reason=str(error), is_empty=is_empty)
        except _UnusableFileError as error:
            raise DataError(f"{path}:{row.line}: {error}") from None
        else:
            unused.difference_update(columns if shape == "alpaca" else ())
            yield Conversation(messages=messages, row=row.row, line=row.line)
    for column in sorted(filter(None, unused)):
        _log.warning("%s: no row uses the configured column '%s' (%d rows)", path, column, num_rows)


def _as_columns(value: object) -> Mapping[str, object]:
    """Return the row without its null columns, which count as absent."""
    if not isinstance(value, dict):
        raise _BadRowError(
            f"the row is {_json_type(value)}; each row must be a JSON object with named columns"
        )
    return {name: content for name, content in value.items() if content is not None}


def _shape_of(columns: Mapping[str, object], *, named: _Named) -> _Shape:
    if named["messages"] is not None:
        return "messages"
    if named["prompt"] is not None or named["response"] is not None:
        return "alpaca"
    # `messages` first: data sets exist that repeat the first question beside it, as `prompt`.
    if any(name in columns for name in KNOWN_COLUMNS["messages"]):
        return "messages"
    if any(name in columns for name in KNOWN_COLUMNS["prompt"] + KNOWN_COLUMNS["response"]):
        return "alpaca"
    raise _BadRowError(
        f"the columns fit no accepted shape (columns found: {_listed(columns)}); a row needs "
        f"{' or '.join(KNOWN_COLUMNS['prompt'])} with {' or '.join(KNOWN_COLUMNS['response'])}, or "
        f"messages; name other columns with data.prompt_key and data.response_key, or "
        f"data.messages_key"
    )


def _refuse_unsupported(columns: Mapping[str, object], *, named: _Named, shape: _Shape) -> None:
    for name in _UNSUPPORTED_COLUMNS[shape]:
        if columns.get(name) and name not in named.values():
            raise _BadRowError(
                f"column '{name}' beside the {shape} columns is not available in this version, and "
                f"leaving it out would change the conversation; remove it or merge it into the text"
            )


def _alpaca_messages(columns: Mapping[str, object], *, named: _Named) -> tuple[Message, ...]:
    _refuse_unsupported(columns, named=named, shape="alpaca")
    prompt_name = _required(columns, "prompt", named=named)
    response_name = _required(columns, "response", named=named)
    query_name = _find(columns, "query", named=named)
    system_name = _find(columns, "system", named=named)
    prompt = _column_text(columns, prompt_name)
    response = _column_text(columns, response_name)
    query = _column_text(columns, query_name)
    system = _column_text(columns, system_name)
    if not response.strip():
        raise _NoAnswerError(
            f"column '{response_name}' holds no text; a row needs a response to train on"
        )
    if not prompt and not query:
        raise _BadRowError(f"column '{prompt_name}' is empty; a row needs a prompt")
    messages = [Message("user", f"{prompt}\n{query}" if query else prompt)]
    if system:
        messages.insert(0, Message("system", system))
    messages.append(Message("assistant", response))
    return tuple(messages)


def _listed_messages(columns: Mapping[str, object], *, named: _Named) -> tuple[Message, ...]:
    _refuse_unsupported(columns, named=named, shape="messages")
    name = _required(columns, "messages", named=named)
    entries = columns[name]
    if not isinstance(entries, list):
        raise _BadRowError(
            f"column '{name}' is {_json_type(entries)}; it must be a list of {{role, content}}"
        )
    messages = tuple(
        _listed_message(entry, where=f"{name}[{index}]") for index, entry in enumerate(entries)
    )
    if not any(message.role == "assistant" and message.content.strip() for message in messages):
        raise _NoAnswerError(
            f"column '{name}' has no assistant message with text among its {len(messages)}; "
            f"a row needs one to train on"
        )
    return messages


def _listed_message(entry: object, *, where: str) -> Message:
    if not isinstance(entry, dict):
        raise _BadRowError(
            f"{where} is {_json_type(entry)}; it must be an object {{role, content}}"
        )
    role = entry.get("role")
    if role not in ROLES:
        shown = f"role '{role}'" if isinstance(role, str) else "no role that is a string"
        raise _BadRowError(f"{where} has {shown}; accepted roles are {', '.join(ROLES)}")
    for field in _UNSUPPORTED_MESSAGE_FIELDS:
        # These values change nothing: `weight: 1` and `train: true` are what happens anyway.
        if entry.get(field) not in (None, "", [], 1):
            raise _BadRowError(f"{where} has '{field}', which is not available in this version")
    if "content" not in entry:
        raise _BadRowError(f"{where} has no content (fields found: {_listed(entry)})")
    return Message(role, _text(entry["content"], where=f"{where}.content"))


def _required(columns: Mapping[str, object], what: str, *, named: _Named) -> str:
    name = _find(columns, what, named=named)
    if name is None:
        explicit = named[what]
        wanted = KNOWN_COLUMNS[what] if explicit is None else (explicit,)
        raise _BadRowError(
            f"no {what}: column {' or '.join(map(repr, wanted))} is absent or null "
            f"(columns found: {_listed(columns)}); name it with data.{what}_key"
        )
    return name


def _find(columns: Mapping[str, object], what: str, *, named: _Named) -> str | None:
    """Return the column of `columns` to read, or None if it has none."""
    explicit = named[what]
    if explicit is not None:
        return explicit if explicit in columns else None
    # A column that the user gave another use is not detected a second time.
    taken = named.values()
    present = [name for name in KNOWN_COLUMNS[what] if name in columns and name not in taken]
    if len(present) > 1:
        raise _UnusableFileError(
            f"columns '{present[0]}' and '{present[1]}' could both be the {what}; "
            f"choose with data.{what}_key={present[0]} or data.{what}_key={present[1]}"
        )
    return present[0] if present else None


def _column_text(columns: Mapping[str, object], name: str | None) -> str:
    return "" if name is None else _text(columns[name], where=f"column '{name}'")


def _text(value: object, *, where: str) -> str:
    if not isinstance(value, str):
        raise _BadRowError(f"{where} is {_json_type(value)}; it must be a string")
    # JSON can escape one half of a surrogate pair: Python accepts it, no tokenizer can.
    if not value.isascii() and (lone := _SURROGATE.search(value)):
        raise _BadRowError(
            f"{where} holds the lone surrogate \\u{ord(lone.group()):04x} at character "
            f"{lone.start() + 1}, which is no text; remove it"
        )
    return value


def _json_type(value: object) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "a number")


def _listed(columns: Mapping[str, object]) -> str:
    names = sorted(columns)
    more = f" and {len(names) - _COLUMNS_SHOWN} more" if len(names) > _COLUMNS_SHOWN else ""
    return (", ".join(names[:_COLUMNS_SHOWN]) or "none") + more
