"""Tokens of a sample -> pieces of text, to be shown to people.

A piece is the shortest run of tokens that stands for whole characters. A control token is a piece
of its own. The texts, joined, equal the decoded sample.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from roll_sft.data.chat.sample import TokenizedSample

_UNDECIDED = "\ufffd"  # what bytes that are no whole character are decoded to
_LONGEST = 16  # tokens of one piece; bytes that never become a character end somewhere
_CONTEXT = 4  # tokens before a piece that decide whether it begins with a space

# Joiners and selectors within emoji and scripts; other invisible characters are named.
_HARMLESS = frozenset("\u200c\u200d\ufe0e\ufe0f")
_INVISIBLE = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Tokens `start:start + len(ids)` of a sample as text.

    `is_supervised`: the model is trained to write the last of them; nothing predicts the first
    token of a text. `is_control`: a token that steers the model.
    """

    text: str
    ids: tuple[int, ...]
    start: int
    is_supervised: bool
    is_control: bool


def pieces_of(sample: TokenizedSample, tokenizer: PreTrainedTokenizerFast) -> Iterator[TextPiece]:
    """Yield the pieces of `sample`, in order."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    added = tokenizer.added_tokens_decoder
    control = {token_id for token_id, token in added.items() if token.special}
    ids: list[int] = sample.token_ids.tolist()
    # A label belongs to the token before, which predicts; a piece is supervised if it is predicted.
    supervised = [False, *(bool(label) for label in sample.label_mask[:-1])]
    start = 0
    while start < len(ids):
        stop, is_control = start + 1, ids[start] in control
        before = ids[max(0, start - _CONTEXT) : start]
        text = _text(backend, before, ids[start:stop])
        while (
            not is_control
            and text.endswith(_UNDECIDED)
            and stop < min(len(ids), start + _LONGEST)
            and ids[stop] not in control
        ):
            stop += 1
            text = _text(backend, before, ids[start:stop])
        if is_control:
            text = str(added[ids[start]].content)
        yield TextPiece(text, tuple(ids[start:stop]), start, supervised[stop - 1], is_control)
        start = stop


def visible(text: str) -> str:
    """Return `text` with a name in place of each character that is invisible or steers a terminal.

    Line breaks stay, with a sign before them.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character == "\n":
        return "\u21b5\n"
    if character == "\t":
        return "\u21e5"
    if character in _HARMLESS or unicodedata.category(character) not in _INVISIBLE:
        return character
    return f"\u27e8U+{ord(character):04X}\u27e9"


def _text(backend: Tokenizer, before: list[int], ids: list[int]) -> str:
    whole: str = backend.decode(before + ids, skip_special_tokens=False)
    known: str = backend.decode(before, skip_special_tokens=False) if before else ""
    return whole[len(known) :]
