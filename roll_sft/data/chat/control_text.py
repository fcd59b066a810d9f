"""Rows that spell control tokens, encoded so that their text stays text.

In a conversation only the template may write control tokens. So a control token that a message
spells is rendered with two marks around it. A second backend encodes the text. In it each control
token has another, unlikely name. The tokens that the template wrote are renamed in the rendered
text; those of the message keep their name, which this backend does not know. All else is equal in
the two backends, so the other text is encoded as usual.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from roll_sft.data.chat.encoder import (
    MARK_CLOSE,
    MARK_OPEN,
    Encoded,
    EncoderFacts,
    placed,
    texts_of,
    unmarked,
)
from roll_sft.data.chat.sample import UnusableRow
from roll_sft.data.chat.turns import RenderedChat, TurnFinder
from roll_sft.data.rows.conversation import Conversation, ToolCall

# Set around the new name of a control token. Unicode forbids these characters in any text too.
_NAME_OPEN, _NAME_CLOSE = "\ufdd2", "\ufdd3"
_MARKS = (MARK_OPEN, MARK_CLOSE, _NAME_OPEN, _NAME_CLOSE)


class ControlText:
    """Marks, and encodes, rows that spell control tokens."""

    def __init__(self, facts: EncoderFacts, backend: Tokenizer, protected: re.Pattern[str]) -> None:
        """`backend` is the tokenizer's own, `protected` finds the control tokens."""
        self._facts, self._backend, self._protected = facts, backend, protected
        self._control_ids = frozenset(facts.control.values())

    def marked(self, row: Conversation) -> Conversation:
        """Return `row` with marks around each control token that it spells.

        Raises `UnusableRow` if the row holds one of the marks.
        """
        for text in texts_of(row):
            _check_no_marks(text)
        messages = tuple(
            replace(
                message,
                content=self._mark(message.content),
                reasoning=self._mark(message.reasoning),
                name=self._mark(message.name),
                tool_call_id=self._mark(message.tool_call_id),
                tool_calls=tuple(
                    ToolCall(*map(self._mark, (call.name, call.arguments, call.id)))
                    for call in message.tool_calls
                ),
            )
            for message in row.messages
        )
        return replace(row, messages=messages, tools=self._mark(row.tools))

    def renamed(self, text: str) -> str:
        """Return a rendered text without marks, with the template's control tokens renamed."""
        return "".join(
            part.strip(MARK_OPEN + MARK_CLOSE) if index % 2 else self._rename(part)
            for index, part in enumerate(
                re.split(f"({MARK_OPEN}[^{MARK_CLOSE}]*{MARK_CLOSE})", text)
            )
        )

    def encode_renamed(self, text: str) -> Encoded:
        """Encode a text that `renamed` returned.

        Raises `UnusableRow` if ordinary text gives a control token: some tokenizers have their
        control tokens among the pieces of ordinary text.
        """
        encoded = placed(self._renaming.encode(text, add_special_tokens=False))
        # Without the ids of this backend's added tokens, which may be equal to these.
        for found in self._control_ids.intersection(encoded.ids) - self._real_ids.keys():
            raise UnusableRow(
                f"the text holds '{self._backend.id_to_token(found)}', which this tokenizer cannot "
                f"tell from the control token of that name; reword or remove it"
            )
        decoded = self._renaming.decode(encoded.ids, skip_special_tokens=False)
        for token in self._protected.findall(text):
            if text.count(token) != decoded.count(token):
                raise UnusableRow(
                    f"the text holds '{token}', which this tokenizer cannot write as ordinary "
                    f"text; reword or remove it"
                )
        ids = [self._real_ids.get(token, token) for token in encoded.ids]
        return Encoded(ids, encoded.starts, encoded.ends)

    def _mark(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._protected.sub(f"{MARK_OPEN}\\g<0>{MARK_CLOSE}", value)
        if isinstance(value, Mapping):
            return {self._mark(key): self._mark(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._mark(each) for each in value)
        return value

    def _rename(self, text: str) -> str:
        return self._protected.sub(lambda found: self._names[found.group()], text)

    @cached_property
    def _names(self) -> dict[str, str]:
        return {
            text: f"{_NAME_OPEN}{number}{_NAME_CLOSE}"
            for number, text in enumerate(sorted(self._facts.protected))
        }

    @cached_property
    def _renaming(self) -> Tokenizer:
        described = json.loads(self._facts.backend)
        for token in described["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        return Tokenizer.from_str(json.dumps(described))

    @cached_property
    def _real_ids(self) -> dict[int, int]:
        """Ids of the renaming backend -> ids of the tokenizer, where the two differ."""
        by_name = {self._names[text]: real for text, real in self._facts.protected.items()}
        by_name |= {
            token["content"]: token["id"]
            for token in json.loads(self._facts.backend)["added_tokens"]
            if token["content"] not in self._names
        }
        return {
            given: real
            for text, real in by_name.items()
            if (given := self._renaming.token_to_id(text)) is not None
        }


def find_marked(row: Conversation, finder: TurnFinder, control: ControlText) -> list[RenderedChat]:
    """The texts of a row that spells control tokens, as `encode_renamed` reads them.

    Raises `UnusableRow` where the marks change what the template writes.
    """
    texts = finder.find(control.marked(row))
    if [unmarked(text.text) for text in texts] != [text.text for text in finder.find(row)]:
        raise UnusableRow(
            "the row spells a control token where the chat template looks at the text, so the "
            "two cannot be told apart; reword or remove it"
        )
    return [_moved(text, control) for text in texts]


def _moved(text: RenderedChat, control: ControlText) -> RenderedChat:
    """Return a marked text as the renaming backend reads it, with the places of its turns moved."""

    def at(place: int) -> int:
        return len(control.renamed(text.text[:place]))

    turns = tuple(
        replace(
            turn,
            start=at(turn.start),
            end=at(turn.end),
            spans=tuple((at(start), at(end)) for start, end in turn.spans),
        )
        for turn in text.turns or ()
    )
    return replace(text, text=control.renamed(text.text), turns=turns)


def _check_no_marks(text: str) -> None:
    if found := next((mark for mark in _MARKS if mark in text), None):
        raise UnusableRow(
            f"the row spells a control token and holds the noncharacter U+{ord(found):04X}, which "
            f"is needed to tell the two apart; remove the noncharacter"
        )
