"""Finds the answers of many chats in their token ids, by the tokens around every answer.

With most templates each answer begins after the same header tokens, the first of which only a
template can write, and ends with one of a few control tokens. Then the mask follows from the ids
alone. The markers are found on probes, and used only if on each probe they give the mask that the
places in the text give. A chat that does not show one header for each of its answers gets no sample
here; `mask` makes it from the places.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from roll_sft.data.chat.encoder import Encoder
from roll_sft.data.chat.mask import supervised_runs
from roll_sft.data.chat.prepared import Probe
from roll_sft.data.chat.render import Renderer, Span
from roll_sft.data.chat.sample import TokenizedSample
from roll_sft.data.chat.turns import RenderedChat, TurnFinder
from roll_sft.data.rows.conversation import Conversation

# Control tokens in the header of an answer, at most: a role may stand between two.
_MAX_HEADER_CONTROL = 3


@dataclass(frozen=True, slots=True)
class AnswerMarkers:
    """The token ids before every answer, and those of which one ends it; both as text too."""

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

    def fits(self, text: RenderedChat) -> bool:
        """Whether ids can tell the supervised part of a text: whole turns, not parts of them."""
        return all(
            len(turn.spans) == 1
            and turn.spans[0][0] == turn.start
            and self.holds(text.text, turn.spans[0])
            for turn in text.turns or ()
        )


def find_markers(probes: Sequence[Probe], encoder: Encoder) -> AnswerMarkers | None:
    """Return the tokens around every answer, None if they are not always the same and proved."""
    token_ids = [np.array(probe.encoded.ids, np.int32) for probe in probes]
    texts = [probe.text for probe in probes]
    for num_control in range(1, _MAX_HEADER_CONTROL + 1):
        markers = _common(probes, control_ids=encoder.control_ids, num_control=num_control)
        if markers is None or not all(markers.fits(text) for text in texts):
            continue
        # Such a token takes the first spaces of an answer, and its id does not show that.
        if markers.header[-1] in encoder.absorbing:
            continue
        samples = masks_by_markers(texts, token_ids, markers=markers, train_on_all=False)
        if all(
            sample is not None and np.array_equal(sample.label_mask, probe.sample.label_mask)
            for sample, probe in zip(samples, probes, strict=True)
        ):
            return markers
    return None


def _common(
    probes: Sequence[Probe],
    *,
    control_ids: frozenset[int],
    num_control: int,
) -> AnswerMarkers | None:
    """Return the tokens around every supervised turn of `probes`, None if they differ.

    The header is taken from the `num_control`-th control token before the answer.
    """
    headers: set[tuple[tuple[int, ...], str]] = set()
    ends: dict[int, str] = {}
    for text, encoded, sample in probes:
        starts, finals = supervised_runs(sample)
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
    return AnswerMarkers(header_ids, tuple(ends), header_text, tuple(ends.values()))


def rendered_once(
    row: Conversation, renderer: Renderer, finder: TurnFinder, markers: AnswerMarkers
) -> RenderedChat | None:
    """Return a plain row as one text if every message stands in it, in order; else None.

    The template must write in order: see `fast.template_order`.
    """
    if (
        row.tools
        or renderer.opens_think
        or any(
            message.reasoning or message.tool_calls or message.role == "tool"
            for message in row.messages
        )
    ):
        return None
    turns = renderer.turns(row.messages)
    rendering = renderer.render(turns, tools=(), add_generation_prompt=False)
    text, place = rendering.text, 0
    for message in row.messages:
        content = message.content
        found = text.find(content, place)
        if found < 0:
            content = content.strip()
            found = text.find(content, place)
        if found < 0:
            return None
        place = found + len(content)
    if renderer.has_marks and not (
        len(rendering.marks) == sum(message.role == "assistant" for message in row.messages)
        and all(markers.holds(text, mark) for mark in rendering.marks)
    ):
        return None
    return finder.whole(row, text)


def masks_by_markers(
    texts: Sequence[RenderedChat],
    token_ids: Sequence[NDArray[np.int32]],
    *,
    markers: AnswerMarkers,
    train_on_all: bool,
) -> list[TokenizedSample | None]:
    """Return the sample of each text, None where it does not show one header for each answer."""
    stops = np.cumsum([ids.size for ids in token_ids], dtype=np.int64)
    joined = np.concatenate([np.empty(0, np.int32), *token_ids])
    begins = _after_headers(joined, markers.header)
    ends = np.append(np.isin(joined, markers.ends).nonzero()[0], joined.size)
    answers = np.stack((begins, ends[np.searchsorted(ends, begins)]), axis=1)
    # A header must lie within one text: joined texts may show one across their border.
    is_whole = (
        begins - len(markers.header)
        >= np.append(0, stops)[np.searchsorted(stops, begins, side="right")]
    )
    answers = answers[is_whole]
    bounds = np.searchsorted(answers[:, 0], np.append(0, stops)).tolist()
    samples: list[TokenizedSample | None] = []
    for index, (text, ids) in enumerate(zip(texts, token_ids, strict=True)):
        found = answers[bounds[index] : bounds[index + 1]] - (stops[index] - ids.size)
        spans = _supervised(text, found.tolist(), num_tokens=ids.size, markers=markers)
        if spans is None:
            samples.append(None)
            continue
        label_mask = np.full(ids.size, train_on_all, np.uint8)
        label_mask[-1:] = 0
        for begin, final, _ in spans:
            label_mask[begin - 1 : final] = not train_on_all
        calls = () if train_on_all else [(b, final + 1) for b, final, is_call in spans if is_call]
        samples.append(TokenizedSample(ids, label_mask, tuple(calls)))
    return samples


def _after_headers(ids: NDArray[np.int32], header: tuple[int, ...]) -> NDArray[np.int64]:
    """The places after each occurrence of `header`."""
    places: NDArray[np.int64] = (ids[: max(0, ids.size - len(header))] == header[0]).nonzero()[0]
    for offset, token in enumerate(header[1:], start=1):
        places = places[ids[places + offset] == token]
    return places + len(header)


def _supervised(
    text: RenderedChat, found: list[list[int]], *, num_tokens: int, markers: AnswerMarkers
) -> list[tuple[int, int, bool]] | None:
    """The first and last token of each answer that is singled out, and whether it is a call.

    None if the answers found are not those of the text.
    """
    if not any(text.answers):
        return []
    # The next header may begin with what ends this answer.
    limits = [begin - len(markers.header) for begin, _ in found[1:]] + [num_tokens - 1]
    if len(found) != len(text.answers) or any(
        final > limit for (_, final), limit in zip(found, limits, strict=True)
    ):
        return None
    return [
        (begin, final, is_call)
        for (begin, final), is_wanted, is_call in zip(found, text.answers, text.calls, strict=True)
        if is_wanted
    ]
