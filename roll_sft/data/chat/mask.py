"""What is learnt, as a mask over token ids: from places in the text, or from the ids themselves.

From places: always exact, or refused, and needs the tokenizer to report character offsets. From
ids: where each answer begins after the same tokens, the first of which only a template can write,
and ends with one of a few control tokens, both are found in the ids of many texts at once. An
`Anchor` says which tokens these are; `data.anchor` proves it on probes, and each text must show as
many of them as it has answers, or it goes by places after all.

What is promised, or refused: learnt are the tokens of each answer after its header, up to and with
its end-of-turn token, once; no token is partly inside. A token made across the border between
header and answer would be one that no model is ever asked for, since at inference the header comes
as tokens of its own. The shift happens here: the mask lies on the token that predicts.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from roll_sft.base.errors import DataError
from roll_sft.data.chat.encoder import Encoded, Encoder
from roll_sft.data.chat.render import Span
from roll_sft.data.chat.sample import TokenizedSample, UnusableRow, quoted
from roll_sft.data.chat.turns import Text, Turn


@dataclass(frozen=True, slots=True)
class Anchor:
    """The token ids that come before every answer, and those of which one ends it; as text too."""

    header: tuple[int, ...]
    ends: tuple[int, ...]
    header_text: str
    end_texts: tuple[str, ...]

    def holds(self, text: str, span: Span) -> bool:
        """Whether a span of a text begins after the header and ends before or after an end."""
        start, end = span
        return text.endswith(self.header_text, 0, start) and (
            text.startswith(self.end_texts, end)
            or text[start:end].rstrip().endswith(self.end_texts)
        )

    def fits(self, text: Text) -> bool:
        """Whether ids can tell what is learnt of a text: whole turns, not parts of them."""
        return all(
            len(turn.spans) == 1
            and turn.spans[0][0] == turn.start
            and self.holds(text.text, turn.spans[0])
            for turn in text.turns or ()
        )


def mask_by_places(
    text: Text,
    encoded: Encoded,
    *,
    control_ids: frozenset[int],
    end_ids: frozenset[int] = frozenset(),
    learn_all: bool,
) -> TokenizedSample:
    """Return the sample of a text whose `turns` are known. Raises `UnusableRow` and `DataError`.

    `end_ids` are those of `control_ids` that are known to end an answer.
    """
    assert text.turns is not None, "places are found before they are used"
    if any(left > right for left, right in pairwise(encoded.starts)):
        raise UnusableRow(
            "the tokenizer reports character offsets that go backwards, so the answer cannot "
            "be told from its context; normalise the text of the row (NFC) beforehand"
        )
    label_mask = np.full(len(encoded.ids), learn_all, np.uint8)
    label_mask[-1:] = 0
    atomic: list[tuple[int, int]] = []
    calls = [call for call, answer in zip(text.calls, text.answers, strict=True) if answer]
    for turn, is_call in zip(text.turns, calls, strict=True):
        # First, since a template without an end is at fault whatever the row holds.
        trailing = _trailing_control(text.text, turn, encoded, control_ids=control_ids)
        final = _end_of_turn(trailing, turn, encoded, end_ids=end_ids, is_call=is_call)
        for start, end in turn.spans:
            first = _first_token(text.text, start, turn.message, encoded)
            stop = final + 1
            if end < encoded.starts[final]:
                stop = _first_token(text.text, end, turn.message, encoded)
            # The token before is the one that predicts. Nothing predicts the first.
            label_mask[max(first, 1) - 1 : stop - 1] = not learn_all
        label_mask[final - 1] = not learn_all
        if is_call and not learn_all:
            atomic.append((_first_token(text.text, turn.start, turn.message, encoded), final + 1))
    return TokenizedSample(np.array(encoded.ids, np.int32), label_mask, tuple(atomic))


def cut_at_headers(
    text: Text, encoded: Encoded, encoder: Encoder, *, is_renamed: bool = False
) -> Encoded:
    """Return `encoded` with no token across the end of a header, where it can be cut there.

    A prompt comes as tokens of its own at inference, so an answer's first token holds none of it.
    """
    places = []
    for turn in text.turns or ():
        before = bisect_left(encoded.starts, turn.start) - 1
        if before >= 0 and encoded.ends[before] > turn.start:
            places.append(turn.start)
    if not places:
        return encoded
    return encoder.encode_cut(text.text, places, is_renamed=is_renamed) or encoded


def _first_token(text: str, start: int, message: int, encoded: Encoded) -> int:
    first = bisect_left(encoded.starts, start)
    if first > 0 and encoded.ends[first - 1] > start:
        raise UnusableRow(
            f"one token spans the end of the header {quoted(text[:start], end=True)} and the "
            f"beginning of the answer {quoted(text[start:])} in message {message}; change "
            f"the beginning of the answer, or the end of the header in its template"
        )
    return first


def _trailing_control(
    text: str, turn: Turn, encoded: Encoded, *, control_ids: frozenset[int]
) -> list[int]:
    """Return the indices of the control tokens after the turn's last visible text, last first."""
    found: list[int] = []
    first, stop = (bisect_left(encoded.starts, place) for place in (turn.start, turn.end))
    for token in reversed(range(first, stop)):
        if encoded.ids[token] in control_ids:
            found.append(token)
        elif text[encoded.starts[token] : min(encoded.ends[token], turn.end)].strip():
            break
    if not found:
        raise DataError(
            f"the chat template ends an answer without an end-of-turn token (it writes "
            f"{quoted(text[turn.start : turn.end], end=True)}), so a model would never learn "
            f"to stop; end the assistant turn with {{{{ eos_token }}}} in its template"
        )
    return found


def _end_of_turn(
    trailing: Sequence[int],
    turn: Turn,
    encoded: Encoded,
    *,
    end_ids: frozenset[int],
    is_call: bool,
) -> int:
    """Return which of the `trailing` control tokens, last first, ends the turn.

    Before it may stand markup that is a control token (the end of a tool call), after it another
    one: a template may close the whole text. So it is the first that is known to end an answer,
    else the last after a call, and the first after plain text, which has no markup.
    """
    known = [token for token in trailing if encoded.ids[token] in end_ids]
    if known:
        return known[-1]
    if len(trailing) > 1 and turn.is_blank:
        raise UnusableRow(
            f"message {turn.message} (assistant) holds no text, so its end-of-turn token "
            f"cannot be told from its header; remove the message"
        )
    return trailing[0] if is_call else trailing[-1]


def learnt_runs(sample: TokenizedSample) -> tuple[list[int], list[int]]:
    """Return the first and the last token of each run of tokens that is learnt."""
    edges = np.diff(sample.label_mask.astype(np.int8), prepend=0)
    firsts: list[int] = ((edges == 1).nonzero()[0] + 1).tolist()
    finals: list[int] = (edges == -1).nonzero()[0].tolist()
    return firsts, finals


@dataclass(frozen=True, slots=True)
class Flat:
    """The ids of many texts one after the other, text i at `bounds[i]:bounds[i + 1]`."""

    ids: NDArray[np.int32]
    bounds: NDArray[np.int64]

    @classmethod
    def of(cls, ids: Sequence[NDArray[np.int32]]) -> "Flat":
        """Join the ids of several texts."""
        bounds = np.zeros(len(ids) + 1, np.int64)
        np.cumsum([each.size for each in ids], out=bounds[1:])
        return cls(np.concatenate([np.empty(0, np.int32), *ids]), bounds)


def masks_by_ids(
    texts: Sequence[Text], flat: Flat, *, anchor: Anchor, learn_all: bool
) -> list[TokenizedSample | None]:
    """Return the sample of each text, None where it does not show one anchor for each answer."""
    ids, bounds = flat.ids, flat.bounds
    begins, owner = _answers(flat, anchor)
    ends = np.isin(ids, anchor.ends).nonzero()[0]
    # Where each answer ends; past everything if it does not.
    final = np.append(ends, ids.size)[np.searchsorted(ends, begins)]
    # The next header may begin with what ends this answer.
    limit = np.append(begins[1:] - len(anchor.header), ids.size)
    sound = (final <= limit) & (final < bounds[owner + 1])
    expected = np.array([len(text.answers) for text in texts])
    shown = np.bincount(owner, minlength=len(texts)) == expected
    shown[owner[~sound]] = False
    chosen = shown[owner]
    begins, final, owner = begins[chosen], final[chosen], owner[chosen]
    kept = [text for text, is_shown in zip(texts, shown.tolist(), strict=True) if is_shown]
    # Where nothing is singled out, nothing has to be found.
    exact = shown | np.array([not any(text.answers) for text in texts], np.bool_)
    singled = np.array([answer for text in kept for answer in text.answers], np.bool_)
    # +1 where a singled-out run begins, -1 after it ends, summed up from the left.
    edges = np.zeros(ids.size + 1, np.int8)
    edges[begins[singled] - 1] += 1
    edges[final[singled]] -= 1
    label_mask = np.cumsum(edges[:-1], dtype=np.int8).astype(np.uint8)
    if learn_all:
        label_mask = 1 - label_mask
        label_mask[bounds[1:] - 1] = 0
    atomic: dict[int, list[tuple[int, int]]] = {}
    if any(any(text.calls) for text in kept) and not learn_all:
        calls = singled & np.array([call for text in kept for call in text.calls], np.bool_)
        for begin, end, at in zip(begins[calls], final[calls], owner[calls], strict=True):
            span = (int(begin - bounds[at]), int(end + 1 - bounds[at]))
            atomic.setdefault(int(at), []).append(span)
    return [
        TokenizedSample(ids[start:stop], label_mask[start:stop], tuple(atomic.get(index, ())))
        if is_exact
        else None
        for index, (start, stop, is_exact) in enumerate(
            zip(bounds[:-1].tolist(), bounds[1:].tolist(), exact.tolist(), strict=True)
        )
    ]


def _answers(flat: Flat, anchor: Anchor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where answers begin, after their headers, and in which text."""
    ids, bounds, header = flat.ids, flat.bounds, anchor.header
    places = (ids[: max(0, ids.size - len(header))] == header[0]).nonzero()[0]
    for offset, token in enumerate(header[1:], start=1):
        places = places[ids[places + offset] == token]
    begins = places + len(header)
    owner = np.searchsorted(bounds, places, side="right") - 1
    inside = begins < bounds[owner + 1]
    return begins[inside], owner[inside]
