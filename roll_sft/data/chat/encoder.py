"""Text -> token ids with one tokenizer, which adds no tokens around the text.

A tokenizer reads the text of a control token as that token, wherever it stands. Rows that spell one
are found here, and `control_text` encodes them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from roll_sft.data.rows.conversation import Conversation, Message

if TYPE_CHECKING:
    from roll_sft.data.chat.control_text import ControlText
    from roll_sft.data.chat.fast.piece_table import PieceTable

# Names of the token that ends a text; `eos_token` may be the end of a turn instead.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
# Set around a control token that a row spells. Unicode forbids these characters in any text.
MARK_OPEN, MARK_CLOSE = "\ufdd0", "\ufdd1"


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a text, and the characters `starts[t]:ends[t]` that token t stands for.

    Tokens of parts of one character share the place of that character. So a border between two
    characters lies inside a token only if the token covers a part of both.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]


@dataclass(frozen=True, slots=True)
class EncoderFacts:
    """The data of a tokenizer that an encoder needs, as plain values that can be pickled.

    `backend` is the tokenizer's JSON. `control` has the tokens that steer a model; ordinary text
    never gives one. `protected` has these and the unknown token, which ordinary text may give but
    must not spell. `absorbing` are the added tokens that take the spaces after them. `first_ids`
    begin every text; `end_of_text` ends one (None: unknown).
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
        # Not from `control`: transformers' class for Qwen uses the end of a text as unknown token.
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
    """Encodes texts with one tokenizer. Adds no tokens: a template writes the first ones itself.

    `backend` is the tokenizer's own. `control_ids` are the ids of its control tokens, `absorbing`
    those of added tokens that take the spaces after them.
    """

    def __init__(self, facts: EncoderFacts, *, use_fast: bool = True) -> None:
        """`use_fast`: use the modules of `fast/`."""
        self._facts, self._use_fast = facts, use_fast
        self.backend: Tokenizer = Tokenizer.from_str(facts.backend)
        self.control_ids = frozenset(facts.control.values())
        self.absorbing = facts.absorbing
        # The longest first: one control token may begin with another.
        by_length = sorted(facts.protected, key=lambda text: (-len(text), text))
        self._protected = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        # Searched first: a search for a short text is much faster than one for many texts.
        self._beginnings = tuple({text[:2] for text in facts.protected})

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The ids of each text: from a table of pieces where it has them, else from the backend."""
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

    def spells_control(self, row: Conversation) -> bool:
        """Whether a row spells a control token anywhere."""
        return any(map(self.holds_control_text, texts_of(row)))

    @cached_property
    def control_text(self) -> "ControlText":
        """The encoder of rows that spell control tokens."""
        from roll_sft.data.chat.control_text import ControlText

        return ControlText(self._facts, self.backend, self._protected)


def unmarked(text: str) -> str:
    """Return a rendered text without marks."""
    return text.replace(MARK_OPEN, "").replace(MARK_CLOSE, "")


def placed(encoding: Encoding) -> Encoded:
    """Return ids with their places in the text."""
    offsets: list[tuple[int, int]] = encoding.offsets
    return Encoded(encoding.ids, [start for start, _ in offsets], [end for _, end in offsets])


def texts_of(row: Conversation) -> Iterable[str]:
    """Every text of a row that a template may write."""
    values = [*row.tools, *(part for message in row.messages for part in _parts(message))]
    return (text for value in values for text in _texts(value))


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
    """Return the JSON of the tokenizer's backend, reduced to plain encoding.

    Padding and truncation, which calls of the original leave set, are removed. So is the
    post-processor: it may add tokens, and the byte-level one trims spaces from the offsets, so that
    a token with a space would not cover that space.
    """
    backend: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.post_processor = None
    return str(backend.to_str())
