"""The tokens around every answer of a template, found and proved on conversations of our own.

What is found: the ids from a control token up to the answer, and the ids that end one. Promised:
the masks that follow from them are, on every probe, those that follow from places in the text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from roll_sft.base.errors import DataError
from roll_sft.data.chat.encoder import Encoded, Encoder, placed
from roll_sft.data.chat.mask import (
    Anchor,
    Flat,
    cut_at_headers,
    learnt_runs,
    mask_by_places,
    masks_by_ids,
)
from roll_sft.data.chat.render import Renderer
from roll_sft.data.chat.sample import TokenizedSample, UnusableRow
from roll_sft.data.chat.turns import Text, TurnFinder
from roll_sft.data.rows.conversation import Conversation, Message

# Control tokens in the header of an answer, at most: a role may stand between two.
_MAX_HEADER_CONTROL = 3
# No two say the same, so that only the template repeats itself.
_PROBES = (
    (("user", "What is two and two?"), ("assistant", "Four.")),
    (
        ("user", "Name a colour"),
        ("assistant", "Blue it is"),
        ("user", "Another one, please!"),
        ("assistant", "Red"),
    ),
    (("system", "Be brief."), ("user", "Hello there"), ("assistant", "Good day to you")),
)


class Probe(NamedTuple):
    """A conversation of ours, as text, as tokens, and with the mask that places give."""

    text: Text
    encoded: Encoded
    sample: TokenizedSample


def prove_probes(renderer: Renderer, encoder: Encoder) -> list[Probe]:
    """Return what a template makes of the probes, those left out that it cannot be used with."""
    finder, probes = TurnFinder(renderer, train_on="assistant"), []
    for turns in _PROBES:
        messages = tuple(Message(role, content) for role, content in turns)
        try:
            for text in finder.find(Conversation(messages, row=0, line=1)):
                whole = placed(encoder.backend.encode(text.text, add_special_tokens=False))
                encoded = cut_at_headers(text, whole, encoder)
                sample = mask_by_places(
                    text, encoded, control_ids=encoder.control_ids, learn_all=False
                )
                probes.append(Probe(text, encoded, sample))
        except (UnusableRow, DataError):
            continue
    return probes


def end_of_turn(probes: Sequence[Probe]) -> int | None:
    """Return the token that ends an answer; None without a probe."""
    if not probes:
        return None
    return probes[0].encoded.ids[learnt_runs(probes[0].sample)[1][-1]]


def find_anchor(probes: Sequence[Probe], encoder: Encoder) -> Anchor | None:
    """Return the tokens around every answer, None if they are not always the same and proved."""
    flat = Flat.of([np.array(probe.encoded.ids, np.int32) for probe in probes])
    texts = [probe.text for probe in probes]
    for num_control in range(1, _MAX_HEADER_CONTROL + 1):
        anchor = _common(probes, control_ids=encoder.control_ids, num_control=num_control)
        if anchor is None or not all(anchor.fits(text) for text in texts):
            continue
        # Such a token could hold the first spaces of an answer and look no different.
        if anchor.header[-1] in encoder.absorbing:
            continue
        samples = masks_by_ids(texts, flat, anchor=anchor, learn_all=False)
        if all(
            sample is not None and np.array_equal(sample.label_mask, probe.sample.label_mask)
            for sample, probe in zip(samples, probes, strict=True)
        ):
            return anchor
    return None


def _common(
    probes: Sequence[Probe],
    *,
    control_ids: frozenset[int],
    num_control: int,
) -> Anchor | None:
    """Return what stands around every learnt turn of `probes`, None if it is not always the same.

    The header is taken from the `num_control`-th control token before the answer.
    """
    headers: set[tuple[tuple[int, ...], str]] = set()
    ends: dict[int, str] = {}
    for text, encoded, sample in probes:
        starts, finals = learnt_runs(sample)
        if len(starts) != len(text.turns or ()):
            return None
        for turn, start, final in zip(text.turns or (), starts, finals, strict=True):
            control = [at for at in range(start) if encoded.ids[at] in control_ids]
            if len(control) < num_control:
                return None
            begin = control[-num_control]
            header = text.text[encoded.starts[begin] : turn.start]
            headers.add((tuple(encoded.ids[begin:start]), header))
            ends[encoded.ids[final]] = text.text[encoded.starts[final] : encoded.ends[final]]
    if len(headers) != 1:
        return None
    ((header_ids, header_text),) = headers
    return Anchor(header_ids, tuple(ends), header_text, tuple(ends.values()))
