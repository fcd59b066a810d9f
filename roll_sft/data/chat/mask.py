"""The supervised tokens of a chat, as a mask over token ids, from places in the text.

Promised, or refused: trained on are the tokens of each answer after its header, up to and with its
end-of-turn token, once; no token is partly inside. A token across the border between header and
answer would be one that no model is ever asked for, since at inference the header comes as tokens
of its own. The shift happens here: the mask lies on the token that predicts.

The tokenizer must report character offsets.
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
    """Return the sample of a text whose `turns` are known. Raises `UnusableRow` and `DataError`.

    `end_ids` are those of `control_ids` that are known to end an answer.
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
        # First, since a template without an end is at fault whatever the row holds.
        trailing = _trailing_control(text.text, turn, encoded, control_ids=control_ids)
        final = _end_of_turn(trailing, turn, encoded, end_ids=end_ids, is_call=is_call)
        for start, end in turn.spans:
            first = _first_token(text.text, start, turn.message, encoded)
            stop = final + 1
            if end < encoded.starts[final]:
                stop = _first_token(text.text, end, turn.message, encoded)
            # The token before is the one that predicts. Nothing predicts the first.
            label_mask[max(first, 1) - 1 : stop - 1] = not train_on_all
        label_mask[final - 1] = not train_on_all
        if is_call and not train_on_all:
            atomic.append((_first_token(text.text, turn.start, turn.message, encoded), final + 1))
    return TokenizedSample(np.array(encoded.ids, np.int32), label_mask, tuple(atomic))


def cut_at_headers(
    text: RenderedChat, encoded: Encoded, encoder: Encoder, *, is_renamed: bool = False
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


def supervised_runs(sample: TokenizedSample) -> tuple[list[int], list[int]]:
    """Return the first and the last token of each run of supervised tokens."""
    edges = np.diff(sample.label_mask.astype(np.int8), prepend=0)
    firsts: list[int] = ((edges == 1).nonzero()[0] + 1).tolist()
    finals: list[int] = (edges == -1).nonzero()[0].tolist()
    return firsts, finals
