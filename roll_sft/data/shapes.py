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

    def named(self, what: str) -> str | None:
        """The column that the user named for `what`, a key of `KNOWN_COLUMNS`."""
        column: str | None = getattr(self, what)
        return column

    def all_named(self) -> frozenset[str]:
        """Every column that the user named."""
        return frozenset(filter(None, map(self.named, KNOWN_COLUMNS)))

    def optional(self) -> frozenset[str]:
        """The named columns that a row may lack; a source without any is worth a word."""
        return frozenset(filter(None, (self.query, self.system, self.tools)))


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
    if keys.text is not None:
        return "text"
    # `messages` first: data sets exist that repeat the first question beside it, as `prompt`.
    if keys.messages is not None or (
        keys.prompt is None and keys.response is None and _has(columns, "messages")
    ):
        return _spelling(columns, keys)
    if keys.prompt or keys.response or _has(columns, "prompt") or _has(columns, "response"):
        sides = (_find(columns, "prompt", keys), _find(columns, "response", keys))
        is_pair = any(_is_listed(columns[side]) for side in sides if side is not None)
        return "pairs" if is_pair else "alpaca"
    if _has(columns, "text"):
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
    for name in _MEDIA if keys.text else _REFUSED[shape]:
        if columns.get(name) not in (None, "", []) and name not in keys.all_named():
            raise BadRowError(
                f"column '{name}' has no place beside the {shape} columns, and leaving it out "
                f"would change what is trained; remove it or write it into the text"
            )
    if shape == "text":
        return Document(_document(columns, keys), row=row, line=line)
    readers = {"alpaca": _alpaca, "pairs": _pair, "messages": _listed, "sharegpt": _listed}
    messages = readers[shape](columns, keys)
    tools_name = _find(columns, "tools", keys)
    tools = () if tools_name is None else read_tools(columns[tools_name], where=_at(tools_name))
    return Conversation(messages, row=row, line=line, tools=tools)


def _spelling(columns: Mapping[str, object], keys: ColumnKeys) -> Shape | None:
    name = _find(columns, "messages", keys)
    entries = None if name is None else columns[name]
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
        return None
    return "sharegpt" if "from" in entries[0] and "role" not in entries[0] else "messages"


def _is_listed(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _document(columns: Mapping[str, object], keys: ColumnKeys) -> str:
    name = _required(columns, "text", keys)
    text = _column_text(columns, name)
    if not text.strip():
        raise NoAnswerError(f"{_at(name)} holds no text; a row needs some to train on")
    return text


def _alpaca(columns: Mapping[str, object], keys: ColumnKeys) -> tuple[Message, ...]:
    prompt_name = _required(columns, "prompt", keys)
    response_name = _required(columns, "response", keys)
    prompt = _column_text(columns, prompt_name)
    query = _column_text(columns, _find(columns, "query", keys))
    response = _column_text(columns, response_name)
    system_name = _find(columns, "system", keys)
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


def _pair(columns: Mapping[str, object], keys: ColumnKeys) -> tuple[Message, ...]:
    prompt_name = _required(columns, "prompt", keys)
    response_name = _required(columns, "response", keys)
    if query_name := _find(columns, "query", keys):
        raise BadRowError(
            f"{_at(query_name)} has no place beside a prompt that is a list of messages; write it "
            f"as one of them"
        )
    asked = read_messages(columns[prompt_name], column=prompt_name)
    answered = read_messages(columns[response_name], column=response_name)
    check_answer(answered, where=_at(response_name))
    untrained = tuple(replace(message, train=False) for message in asked)
    return _with_system_column((*untrained, *answered), columns, keys)


def _listed(columns: Mapping[str, object], keys: ColumnKeys) -> tuple[Message, ...]:
    name = _required(columns, "messages", keys)
    messages = read_messages(columns[name], column=name)
    check_answer(messages, where=_at(name))
    return _with_system_column(messages, columns, keys)


def _with_system_column(
    messages: tuple[Message, ...], columns: Mapping[str, object], keys: ColumnKeys
) -> tuple[Message, ...]:
    name = _find(columns, "system", keys)
    return with_system(messages, _column_text(columns, name), where=_at(name))


def _required(columns: Mapping[str, object], what: str, keys: ColumnKeys) -> str:
    name = _find(columns, what, keys)
    if name is None:
        explicit = keys.named(what)
        wanted = KNOWN_COLUMNS[what] if explicit is None else (explicit,)
        raise BadRowError(
            f"no {what}: column {' or '.join(map(repr, wanted))} is absent or null "
            f"(columns found: {listed(columns)}); name it with data.{what}_key"
        )
    return name


def _has(columns: Mapping[str, object], what: str) -> bool:
    return any(name in columns for name in KNOWN_COLUMNS[what])


def _find(columns: Mapping[str, object], what: str, keys: ColumnKeys) -> str | None:
    """Return the column of `columns` to read, or None if it has none."""
    explicit = keys.named(what)
    if explicit is not None:
        return explicit if explicit in columns else None
    # A column that the user gave another use is not detected a second time.
    taken = keys.all_named()
    present = [name for name in KNOWN_COLUMNS[what] if name in columns and name not in taken]
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
