"""Encodes a text in pieces, where one token would span the header of an answer and the answer."""

from collections.abc import Sequence
from itertools import pairwise

from roll_sft.data.chat.encoder import Encoded, Encoder, placed


def encode_cut(
    text: str, places: Sequence[int], encoder: Encoder, *, is_renamed: bool
) -> Encoded | None:
    """Encode a text cut at `places`, so that no token lies across one of them.

    None where the cut would change the text: some tokenizers put a space before each piece,
    and others join a letter with its accent.
    """

    def encoded(piece: str) -> Encoded:
        if is_renamed:
            return encoder.control_text.encode_renamed(piece)
        return placed(encoder.backend.encode(piece, add_special_tokens=False))

    def decoded(ids: Sequence[int]) -> str:
        return str(encoder.backend.decode(ids, skip_special_tokens=False))

    cut = Encoded([], [], [])
    for start, stop in pairwise((0, *places, len(text))):
        part = encoded(text[start:stop])
        cut.ids.extend(part.ids)
        cut.starts.extend(start + place for place in part.starts)
        cut.ends.extend(start + place for place in part.ends)
    return cut if decoded(cut.ids) == decoded(encoded(text).ids) else None
