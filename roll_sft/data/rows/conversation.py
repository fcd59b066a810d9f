"""What a row of any shape becomes: a conversation, a document, or a row that cannot be used.

The one vocabulary between those who read rows and those who tokenise them. Text is as it stands in
the file, to the character; nothing here knows a template, a tokenizer or a file format.
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
    """One turn: `role` is one of `ROLES`, `content` the text as it stands in the file.

    `reasoning` is what a model thought before its answer, where the row keeps it apart from
    `content`. `name` and `tool_call_id` say which tool, and which call, a tool message answers.
    `train` is False where the row asks not to learn this turn; only assistant turns are learnt.
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
    """The messages of one row, and the tools it offers (JSON schemas, as given).

    `template_kwargs` are the variables that this row gives the chat template, by name.
    `row` counts from 0 over all rows of what is read (a file, or a shard of one), `line` from 1
    over the lines of the file.
    """

    messages: tuple[Message, ...]
    row: int
    line: int
    tools: tuple[Mapping[str, Any], ...] = field(default=())
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Document:
    """A row of plain text, trained on as a whole and without a template. Numbered likewise."""

    text: str
    row: int
    line: int


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why. Numbered likewise.

    `is_empty`: the row is well formed and has no answer to learn, so it is dropped and counted
    where a malformed one is an error.
    """

    row: int
    line: int
    reason: str
    is_empty: bool = False
