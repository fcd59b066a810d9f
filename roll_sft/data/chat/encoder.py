"""Text -> token ids, where the text of a control token inside a message stays text.

A tokenizer finds its control tokens wherever their text stands. In a conversation only the template
may write them, so a message that holds such text is rendered with two marks around it, and encoded
by a second backend in which each control token has another, unlikely name: the template's own are
renamed in the rendered text, those of the message keep the name that this backend does not know.
Everything else about the two backends is equal, so what stands around is encoded as ever.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from roll_sft.data.chat.sample import UnusableRow
from roll_sft.data.rows.conversation import Conversation, Message, ToolCall

if TYPE_CHECKING:
    from roll_sft.data.chat.fast.piece_table import PieceTable

# How tokenizers name the end of a text, where `eos_token` may be the end of a turn.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
# Unicode keeps these characters out of every text, for the use of programs.
_OPEN, _CLOSE, _NAME_OPEN, _NAME_CLOSE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARKS = (_OPEN, _CLOSE, _NAME_OPEN, _NAME_CLOSE)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a text, and the characters `starts[t]:ends[t]` that token t stands for.

    The tokens of one character share its place, so a border between two characters lies inside a
    token only if that token covers a part of both.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]


@dataclass(frozen=True, slots=True)
class EncoderFacts:
    """All that an encoder needs of a tokenizer, as plain values that travel between processes.

    `backend` is the tokenizer's JSON. `control` has the tokens that steer a model and never come
    from ordinary text; `protected` has these and the unknown token, which ordinary text may come
    to but may not spell. `absorbing` are the added tokens that take the spaces after them.
    `first_ids` begin every text, `end_of_text` ends one (None: unknown).
    """

    backend: str
    control: Mapping[str, int]
    protected: Mapping[str, int]
    absorbing: tuple[int, ...]
    first_ids: tuple[int, ...]
    end_of_text: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> "EncoderFacts":
        """Read them from a tokenizer."""
        added = tokenizer.added_tokens_decoder
        protected = {token.content: token_id for token_id, token in added.items() if token.special}
        special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        protected.update(special)
        control = dict(protected)
        if tokenizer.unk_token not in (None, tokenizer.eos_token, tokenizer.bos_token):
            control.pop(tokenizer.unk_token, None)
        first = tokenizer("", add_special_tokens=True).input_ids[:1]
        # Not of `control`: transformers' class for Qwen calls its end of a text the unknown token.
        named = (protected[text] for text in _END_OF_TEXT if text in protected)
        return cls(
            backend=_plain_backend(tokenizer),
            control=control,
            protected=protected,
            absorbing=tuple(token_id for token_id, token in added.items() if token.rstrip),
            first_ids=tuple(first) if first == [tokenizer.bos_token_id] else (),
            end_of_text=next(named, tokenizer.eos_token_id),
        )


class Encoder:
    """Encodes texts with one tokenizer; adds nothing, since a template writes what begins a text.

    `backend` is the tokenizer's own, `control_ids` the ids of its control tokens, and `absorbing`
    those of added tokens that take the spaces after them.
    """

    def __init__(self, facts: EncoderFacts, *, use_fast: bool = True) -> None:
        """`use_fast`: with what `fast/` has."""
        self._facts, self._use_fast = facts, use_fast
        self.backend: Tokenizer = Tokenizer.from_str(facts.backend)
        self.control_ids = frozenset(facts.control.values())
        self.absorbing = facts.absorbing
        # The longest first: one control token may begin with another.
        by_length = sorted(facts.protected, key=lambda text: (-len(text), text))
        self._protected = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        # Looked for first, since a search for one short text is much faster than for many.
        self._beginnings = tuple({text[:2] for text in facts.protected})

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The ids of each text, from the tokenizer or, the same, from a table of its pieces."""
        found = [None] * len(texts) if self._table is None else self._table.encode(texts)
        left = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        encodings = iter(self.backend.encode_batch_fast(left, add_special_tokens=False))
        return [np.array(next(encodings).ids, np.int32) if ids is None else ids for ids in found]

    @cached_property
    def _table(self) -> "PieceTable | None":
        if not self._use_fast:
            return None
        from roll_sft.data.chat.fast.piece_table import PieceTable

        return PieceTable.of(self.backend)

    def holds_control_text(self, text: str) -> bool:
        """Whether a text spells a control token."""
        return any(beginning in text for beginning in self._beginnings) and bool(
            self._protected.search(text)
        )

    def marked(self, row: Conversation) -> Conversation | None:
        """Return `row` with marks around each control token that it spells; None if it has none.

        Raises `UnusableRow` if the row itself holds the characters that are used as marks.
        """
        values = [*row.tools, *(part for message in row.messages for part in _parts(message))]
        texts = [text for value in values for text in _texts(value)]
        if not any(self.holds_control_text(text) for text in texts):
            return None
        for text in texts:
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
        """Return a rendered text without marks, in which the template's own tokens are renamed."""
        return "".join(
            part.strip(_OPEN + _CLOSE) if index % 2 else self._rename(part)
            for index, part in enumerate(re.split(f"({_OPEN}[^{_CLOSE}]*{_CLOSE})", text))
        )

    def encode_renamed(self, text: str) -> Encoded:
        """Encode what `renamed` gives. Raises `UnusableRow` if ordinary text gives a control token.

        Some tokenizers have their control tokens among the pieces that text is made of.
        """
        encoded = placed(self._renaming.encode(text, add_special_tokens=False))
        # Less the ids of this backend's own added tokens, which may be the same numbers.
        for found in self.control_ids.intersection(encoded.ids) - self._real_ids.keys():
            raise UnusableRow(
                f"the text holds '{self.backend.id_to_token(found)}', which this tokenizer cannot "
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

    def encode_cut(self, text: str, places: Sequence[int], *, is_renamed: bool) -> Encoded | None:
        """Encode a text cut at `places`, so that no token lies across one of them.

        None where the cut would change the text (spaces that are put before each piece, a letter
        that is one with its accent).
        """
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        for start, stop in pairwise((0, *places, len(text))):
            piece = text[start:stop]
            encoded = (
                self.encode_renamed(piece)
                if is_renamed
                else placed(self.backend.encode(piece, add_special_tokens=False))
            )
            ids += encoded.ids
            starts += [start + place for place in encoded.starts]
            ends += [start + place for place in encoded.ends]
        whole = self.encode_renamed(text).ids if is_renamed else self._ids(text)
        if self._decoded(ids) != self._decoded(whole):
            return None
        return Encoded(ids, starts, ends)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.backend.decode(ids, skip_special_tokens=False))

    def _mark(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._protected.sub(f"{_OPEN}\\g<0>{_CLOSE}", value)
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


def unmarked(text: str) -> str:
    """Return a rendered text without marks."""
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def placed(encoding: Encoding) -> Encoded:
    """Return ids with their places in the text."""
    offsets: list[tuple[int, int]] = encoding.offsets
    return Encoded(encoding.ids, [start for start, _ in offsets], [end for _, end in offsets])


def _check_no_marks(text: str) -> None:
    if found := next((mark for mark in _MARKS if mark in text), None):
        raise UnusableRow(
            f"the row spells a control token and holds the noncharacter U+{ord(found):04X}, which "
            f"is needed to tell the two apart; remove the noncharacter"
        )


def _parts(message: Message) -> Iterable[Any]:
    yield from (message.content, message.reasoning, message.name, message.tool_call_id)
    for call in message.tool_calls:
        yield from (call.name, call.arguments, call.id)


def _texts(value: Any) -> Iterable[str]:
    """Every text inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _texts(key)
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _plain_backend(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the tokenizer's backend, as JSON, that only encodes.

    Without the padding and truncation that calls of the original leave behind, and without a
    post-processor: it could add tokens, and the byte-level one can trim spaces from the offsets, so
    that a token that holds a space would not cover it.
    """
    backend: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.post_processor = None
    return str(backend.to_str())
