"""The loss mask of a chat, computed from the places of its answers in the text.

Supervised are the tokens of each answer, from the first one after its header to its end-of-turn
token. No token lies partly inside an answer: at inference the header is encoded by itself, so a
token across the border never occurs there. A chat for which this cannot be done is refused.

The labels are shifted here: the mask is set on the token that predicts. The tokenizer must report
character offsets.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from roll_sft.base.errors import DataError
from roll_sft.data.chat.encoder import Encoded, Encoder
from roll_sft.data.chat.sample import TokenizedSample, UnusableRow, quoted
from roll_sft.data.chat.turns import AnswerSpan, RenderedChat


def mask_by_places(
    text: RenderedChat,
    encoded: Encoded,
    *,
    control_ids: frozenset[int],
    end_ids: frozenset[int] = frozenset(),
    train_on_all: bool,
) -> TokenizedSample:
    """Return the sample of a text whose `turns` are known.

    `end_ids` are the control tokens that are known to end an answer. Raises `UnusableRow` for a row
    whose answer has no exact border, and `DataError` for a template that does not end an answer.
    """
    assert text.turns is not None, "places are found before they are used"
    if any(left > right for left, right in pairwise(encoded.starts)):
        raise UnusableRow(
            "the tokenizer reports character offsets that go backwards, so the answer cannot "
            "be told from its context; normalise the text of the row (NFC) beforehand"
        )
    label_mask = np.full(len(encoded.ids), train_on_all, np.uint8)
    label_mask[-1:] = 0
    atomic: list[tuple[int, int]] = []
    calls = [call for call, answer in zip(text.calls, text.answers, strict=True) if answer]
    for turn, is_call in zip(text.turns, calls, strict=True):
        # First: a template that writes no end is wrong for every row.
        trailing = _trailing_control(text.text, turn, encoded, control_ids=control_ids)
        final = _end_of_turn(trailing, turn, encoded, end_ids=end_ids, is_call=is_call)
        for start, end in turn.spans:
            first = _first_token(text.text, start, turn.message, encoded)
            stop = final  # the end of the turn is set below
            if end < encoded.starts[final]:
                stop = _first_token(text.text, end, turn.message, encoded)
            # The token before predicts. Nothing predicts the first token of a text.
            label_mask[max(first, 1) - 1 : stop - 1] = not train_on_all
        label_mask[final - 1] = not train_on_all
        if is_call and not train_on_all:
            atomic.append((_first_token(text.text, turn.start, turn.message, encoded), final + 1))
    return TokenizedSample(np.array(encoded.ids, np.int32), label_mask, tuple(atomic))


def cut_at_headers(
    text: RenderedChat, encoded: Encoded, encoder: Encoder, *, is_renamed: bool = False
) -> Encoded:
    """Return `encoded` without tokens that lie across the end of a header.

    At inference the prompt is encoded by itself, so the first token of an answer holds none of it.
    Where a cut would change the text, `encoded` is returned as it is.
    """
    places = []
    for turn in text.turns or ():
        before = bisect_left(encoded.starts, turn.start) - 1
        if before >= 0 and encoded.ends[before] > turn.start:
            places.append(turn.start)
    if not places:
        return encoded
    from roll_sft.data.chat.cut_text import encode_cut

    return encode_cut(text.text, places, encoder, is_renamed=is_renamed) or encoded


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
    text: str, turn: AnswerSpan, encoded: Encoded, *, control_ids: frozenset[int]
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
    turn: AnswerSpan,
    encoded: Encoded,
    *,
    end_ids: frozenset[int],
    is_call: bool,
) -> int:
    """Return which of the `trailing` control tokens, last first, ends the turn.

    Markup may stand before it (the end of a tool call), and the end of the whole text after it. So
    it is the first one that is known to end an answer. If none is known, it is the last one after a
    tool call, and the first one after plain text, which has no markup.
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


def supervised_runs(sample: TokenizedSample) -> tuple[list[int], list[int]]:
    """Return the first and the last token of each run of supervised tokens."""
    edges = np.diff(sample.label_mask.astype(np.int8), prepend=0)
    firsts: list[int] = ((edges == 1).nonzero()[0] + 1).tolist()
    finals: list[int] = (edges == -1).nonzero()[0].tolist()
    return firsts, finals
