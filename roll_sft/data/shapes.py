"""Columns of a row -> a conversation or a document, by the shape of the row.

The shapes, told from the columns that a row has:
- alpaca: `instruction` or `prompt`; optionally `input` or `query`; `output`, `response` or
  `completion`; optionally `system`, `tools` and `history`, a list of earlier [question, answer];
- pairs: a prompt and a response that are lists of messages; only those of the response train;
- messages: a column `messages`, a list of {role, content};
- sharegpt: a column `conversations` or `messages`, a list of {from, value};
- text: a column `text` and none of the above, trained on as a whole.
A column named in `ColumnKeys` is used instead of what would be detected. Null counts as absent.
Columns that have no part in a shape (an id, a source) are left aside; those that would change what
is trained, and that the shape has no place for, are refused by name.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

from roll_sft.data.conversation import Conversation, Document, Message
from roll_sft.data.messages import check_answer, read_messages, read_tools, with_system
from roll_sft.data.values import (
    BadRowError,
    NoAnswerError,
    UnusableFileError,
    kind_of,
    listed,
    text_of,
)
from roll_sft.errors import ConfigError

Shape = Literal["alpaca", "pairs", "messages", "sharegpt", "text"]

# What a column is for -> the names it is detected by.
KNOWN_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("instruction", "prompt"),
    "query": ("input", "query"),
    "response": ("output", "response", "completion"),
    "system": ("system",),
    "messages": ("messages", "conversations"),
    "text": ("text",),
    "tools": ("tools", "functions"),
}

_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# Columns that a shape has no place for, and that would change what is trained.
_REFUSED: Mapping[Shape, tuple[str, ...]] = {
    "alpaca": _MEDIA,
    "pairs": (*_MEDIA, "history"),
    "messages": (*_MEDIA, "history"),
    "sharegpt": (*_MEDIA, "history"),
    "text": (*_MEDIA, "history", "system", "tools", "functions"),
}


@dataclass(frozen=True, slots=True)
class ColumnKeys:
    """Columns the user named; None leaves that column to detection.

    Raises `ConfigError` if they contradict each other.
    """

    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    system: str | None = None
    messages: str | None = None
    text: str | None = None
    tools: str | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        alone = {"text": {"text"}, "messages": {"messages", "system", "tools"}}
        for what, allowed in alone.items():
            if what in given and not allowed.issuperset(given):
                names = ", ".join(f"data.{name}_key" for name in given)
                raise ConfigError(
                    f"{names} name two shapes for one file; set either data.{what}_key or the "
                    f"others"
                )

    def all_named(self) -> frozenset[str]:
        """Every column that the user named."""
        return frozenset(filter(None, (getattr(self, field.name) for field in fields(self))))

    def optional(self) -> frozenset[str]:
        """The named columns that a row may lack; a source without any is worth a word."""
        return frozenset(filter(None, (self.query, self.system, self.tools)))


# What a column is for -> the names that it may have under given keys.
_Names = Mapping[str, tuple[str, ...]]


@functools.cache
def _names(keys: ColumnKeys) -> _Names:
    named: dict[str, str | None] = {what: getattr(keys, what) for what in KNOWN_COLUMNS}
    # A column that the user gave one use is not detected for another.
    taken = frozenset(filter(None, named.values()))
    return {
        what: tuple(name for name in known if name not in taken)
        if (column := named[what]) is None
        else (column,)
        for what, known in KNOWN_COLUMNS.items()
    }


def columns_of(value: object) -> Mapping[str, object]:
    """Return the row without its null columns, which count as absent."""
    if not isinstance(value, dict):
        raise BadRowError(
            f"the row is {kind_of(value)}; each row must be a JSON object with named columns"
        )
    return {name: content for name, content in value.items() if content is not None}


def shape_of(columns: Mapping[str, object], keys: ColumnKeys) -> Shape | None:
    """Return the shape of a row, or None: a list of messages that is empty fits both spellings.

    Raises `BadRowError` if it fits none, `UnusableFileError` if two columns could be meant.
    """
    names = _names(keys)
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
        f"the columns fit no accepted shape (columns found: {listed(columns)}); a row needs "
        f"{' or '.join(KNOWN_COLUMNS['prompt'])} with {' or '.join(KNOWN_COLUMNS['response'])}, or "
        f"{' or '.join(KNOWN_COLUMNS['messages'])}, or text; name other columns with "
        f"data.prompt_key and data.response_key, data.messages_key, or data.text_key"
    )


def sample_of(
    columns: Mapping[str, object], *, shape: Shape, keys: ColumnKeys, row: int, line: int
) -> Conversation | Document:
    """Return what the row says under `shape`; raise `BadRowError` if it cannot be used."""
    names = _names(keys)
    for name in _REFUSED[shape] if keys.text is None else _MEDIA:
        if name in columns and columns[name] not in ("", []) and name not in keys.all_named():
            raise BadRowError(
                f"column '{name}' has no place beside the {shape} columns, and leaving it out "
                f"would change what is trained; remove it or write it into the text"
            )
    if shape == "text":
        return Document(_document(columns, names), row=row, line=line)
    readers = {"alpaca": _alpaca, "pairs": _pair, "messages": _listed, "sharegpt": _listed}
    messages = readers[shape](columns, names)
    tools_name = _find(columns, "tools", names)
    tools = () if tools_name is None else read_tools(columns[tools_name], where=_at(tools_name))
    return Conversation(messages, row=row, line=line, tools=tools)


def _spelling(columns: Mapping[str, object], names: _Names) -> Shape | None:
    name = _find(columns, "messages", names)
    entries = None if name is None else columns[name]
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
        return None
    return "sharegpt" if "from" in entries[0] and "role" not in entries[0] else "messages"


def _is_listed(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _document(columns: Mapping[str, object], names: _Names) -> str:
    name = _required(columns, "text", names)
    text = _column_text(columns, name)
    if not text.strip():
        raise NoAnswerError(f"{_at(name)} holds no text; a row needs some to train on")
    return text


def _alpaca(columns: Mapping[str, object], names: _Names) -> tuple[Message, ...]:
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
        *_history(columns.get("history") or []),
        Message("user", f"{prompt}\n{query}" if query else prompt),
        Message("assistant", response),
    )
    return with_system(messages, system, where=_at(system_name))


def _history(turns: object) -> tuple[Message, ...]:
    """Earlier turns of an alpaca row, [question, answer] each."""
    where = _at("history")
    if not isinstance(turns, list):
        raise BadRowError(f"{where} is {kind_of(turns)}; it must be a list of [question, answer]")
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRowError(f"{where}[{index}] must be a list of two texts: [question, answer]")
        question, answer = (text_of(said, where=f"{where}[{index}]") for said in turn)
        messages += (Message("user", question), Message("assistant", answer))
    return tuple(messages)


def _pair(columns: Mapping[str, object], names: _Names) -> tuple[Message, ...]:
    prompt_name = _required(columns, "prompt", names)
    response_name = _required(columns, "response", names)
    if query_name := _find(columns, "query", names):
        raise BadRowError(
            f"{_at(query_name)} has no place beside a prompt that is a list of messages; write it "
            f"as one of them"
        )
    asked = read_messages(columns[prompt_name], column=prompt_name)
    answered = read_messages(columns[response_name], column=response_name)
    check_answer(answered, where=_at(response_name))
    untrained = tuple(replace(message, train=False) for message in asked)
    return _with_system_column((*untrained, *answered), columns, names)


def _listed(columns: Mapping[str, object], names: _Names) -> tuple[Message, ...]:
    name = _required(columns, "messages", names)
    messages = read_messages(columns[name], column=name)
    check_answer(messages, where=_at(name))
    return _with_system_column(messages, columns, names)


def _with_system_column(
    messages: tuple[Message, ...], columns: Mapping[str, object], names: _Names
) -> tuple[Message, ...]:
    name = _find(columns, "system", names)
    return with_system(messages, _column_text(columns, name), where=_at(name))


def _required(columns: Mapping[str, object], what: str, names: _Names) -> str:
    name = _find(columns, what, names)
    if name is None:
        raise BadRowError(
            f"no {what}: column {' or '.join(map(repr, names[what]))} is absent or null "
            f"(columns found: {listed(columns)}); name it with data.{what}_key"
        )
    return name


def _has(columns: Mapping[str, object], what: str, names: _Names) -> bool:
    return any(name in columns for name in names[what])


def _find(columns: Mapping[str, object], what: str, names: _Names) -> str | None:
    """Return the column of `columns` to read, or None if it has none."""
    present = [name for name in names[what] if name in columns]
    if len(present) > 1:
        raise UnusableFileError(
            f"columns '{present[0]}' and '{present[1]}' could both be the {what}; "
            f"choose with data.{what}_key={present[0]} or data.{what}_key={present[1]}"
        )
    return present[0] if present else None


def _column_text(columns: Mapping[str, object], name: str | None) -> str:
    return "" if name is None else text_of(columns[name], where=_at(name))


def _at(column: str | None) -> str:
    return f"column '{column}'"
