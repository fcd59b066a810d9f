"""Texts -> token ids by a table of pieces, several times as fast as the tokenizer itself.

A byte-level tokenizer cuts a text at its added tokens, cuts the rest into pieces (`splits`), and
merges the bytes of each piece separately. Most pieces occur many times. So the tokenizer's own
model encodes each piece once, and the ids of a text are looked up: they equal the tokenizer's. A
text that might be cut in another way is not encoded here.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from roll_sft.data.chat.fast.splits import Split, byte_letters, split_of

# Pieces kept, some 50 MB. Then the table begins anew: the next texts fill it quickly.
_MOST_PIECES = 1 << 18
_LONGEST_PIECE = 256  # a longer one hardly occurs again

# Properties of an added token that make it match more, or less, than its text.
_TAKES_MORE = ("lstrip", "rstrip", "single_word")


class PieceTable(dict[str, int]):
    """Piece -> its number; the ids of piece `i` are `ids[starts[i] : starts[i + 1]]`.

    Not thread-safe.
    """

    def __init__(self, backend: Tokenizer, split: Split, added: Mapping[str, int]) -> None:
        self._tokenize, self._split, self._added = backend.model.tokenize, split, added
        self._is_normalized = backend.normalizer is None
        # The longest first, as in tokenizers.
        by_length = sorted(added, key=lambda text: (-len(text), text))
        self._cut = re.compile(f"({'|'.join(map(re.escape, by_length)) or '(?!)'})").split
        self._agreed, self._refused = set[str](), set[str]()
        self._ids, self._starts = np.zeros(1 << 12, np.int32), np.zeros(1 << 12, np.int64)
        self._size = self._stop = 0  # pieces and ids, with those that are not looked up again

    @classmethod
    def of(cls, backend: Tokenizer) -> "PieceTable | None":
        """The table of a tokenizer; None for one that is not known to cut texts like this."""
        described = json.loads(backend.to_str())
        split, model = split_of(described), described["model"]
        if (
            split is None
            or model["type"] != "BPE"
            or model.get("dropout")
            or (described["normalizer"] or {"type": "NFC"}) != {"type": "NFC"}
        ):
            return None
        added = described["added_tokens"]
        # tokenizers searches normalized ones after the others, in the rest of the text.
        if any(token[key] for token in added for key in ("normalized", *_TAKES_MORE)):
            return None
        table = cls(backend, split, {token["content"]: token["id"] for token in added})
        return table if table._can_cut("".join(map(chr, range(128)))) else None

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32] | None]:
        """The ids of each text, without any that begin or end one; None: the tokenizer must say."""
        if self._size > _MOST_PIECES:
            self.clear()
            self._size = self._stop = 0
        pieces: list[str] = []
        bounds, is_cut = [0], []
        for text in texts:
            found = self._pieces(text)
            is_cut.append(found is not None)
            pieces += found or ()
            bounds.append(len(pieces))
        numbers = np.fromiter(map(self.__getitem__, pieces), np.int64, len(pieces))
        ids, places = self._gathered(numbers, np.array(bounds))
        return [
            ids[start:stop] if has_pieces else None
            for start, stop, has_pieces in zip(places, places[1:], is_cut, strict=False)
        ]

    def __missing__(self, piece: str) -> int:
        """Ask the model for a piece's ids and give it a number."""
        if (added := self._added.get(piece)) is not None:
            ids = [added]
        else:
            letters = piece.encode("utf-8").decode("latin-1").translate(byte_letters())
            ids = [token.id for token in self._tokenize(letters)]
        number, stop = self._size, self._stop + len(ids)
        self._ids = _with_room(self._ids, stop)
        self._starts = _with_room(self._starts, number + 2)
        self._ids[self._stop : stop] = ids
        self._starts[number + 1] = self._stop = stop
        self._size += 1
        if len(piece) <= _LONGEST_PIECE:
            self[piece] = number
        return number

    def _pieces(self, text: str) -> list[str] | None:
        if not text.isascii() and not (
            self._can_cut(text) and (self._is_normalized or unicodedata.is_normalized("NFC", text))
        ):
            return None
        pieces: list[str] = []
        for index, part in enumerate(self._cut(text)):
            if index % 2:
                pieces.append(part)
            elif part:
                pieces += self._split.pieces(part)
        return pieces if len("".join(pieces)) == len(text) else None

    def _can_cut(self, text: str) -> bool:
        """Whether each character is of the same class here and there; asked once for each."""
        new = set(text) - self._agreed
        for character in new - self._refused:
            # An unassigned one may be a letter, or combine, in the other's version of Unicode.
            is_known = self._is_normalized or unicodedata.category(character) != "Cn"
            agrees = is_known and self._split.agrees_on(character)
            (self._agreed if agrees else self._refused).add(character)
        return new.isdisjoint(self._refused)

    def _gathered(
        self, numbers: NDArray[np.int64], bounds: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], list[int]]:
        """The ids of all pieces one after the other, and where those of each text begin."""
        starts = self._starts[numbers]
        counts = self._starts[numbers + 1] - starts
        stops = np.zeros(numbers.size + 1, np.int64)
        np.cumsum(counts, out=stops[1:])
        places = np.repeat(starts - stops[:-1], counts) + np.arange(stops[-1])
        return self._ids[places], stops[bounds].tolist()


def _with_room(values: NDArray[Any], size: int) -> NDArray[Any]:
    """`values`, in twice the room if they have fewer than `size` places."""
    if size <= values.size:
        return values
    larger = np.zeros(max(size, 2 * values.size), values.dtype)
    larger[: values.size] = values
    return larger
