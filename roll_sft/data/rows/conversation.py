"""A row that was read: a conversation, a document, or a row that cannot be used.

Readers of files make these, and the tokenizer takes them. Text is as it stands in the file, to the
character.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that an assistant makes: `arguments` is a JSON object, parsed; `id` may be empty."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: `role` is one of `ROLES`, `content` the text.

    `reasoning`: the thought before the answer, if the row keeps it apart from `content`.
    `name`, `tool_call_id`: the tool, and the call, that a tool message answers.
    `train`: False if the row excludes this turn from training; only assistant turns are trained on.
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    tool_call_id: str = ""
    train: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of one row, and its `tools` (JSON schemas, as given).

    `template_kwargs`: name -> value of the variables that the row sets in the chat template.
    `row` counts from 0 over the rows that are read (of a file, or a shard), `line` from 1 over the
    lines of the file. `weight`: what its supervised tokens count in the loss.
    """

    messages: tuple[Message, ...]
    row: int
    line: int
    tools: tuple[Mapping[str, Any], ...] = field(default=())
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Document:
    """A row of plain text, trained on as a whole and without a template."""

    text: str
    row: int
    line: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and the reason.

    `is_empty`: the row is well formed and has no answer to train on. It is dropped and counted; a
    malformed row is an error.
    """

    row: int
    line: int
    reason: str
    is_empty: bool = False
