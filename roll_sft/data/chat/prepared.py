"""One chat template with its variables, and what is found out about it once for all rows.

A conversation becomes texts with their turns (`data.turns`), and it is decided for each text
whether its mask can be read off the token ids. What that needs (how the template treats reasoning,
which tokens stand around an answer) is found on probes when it is first asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from roll_sft.data.chat.encoder import Encoded, Encoder, placed, unmarked
from roll_sft.data.chat.fast.answer_markers import Probe, end_of_turn, find_anchor, prove_probes
from roll_sft.data.chat.mask import Anchor, cut_at_headers, mask_by_places
from roll_sft.data.chat.render import Renderer
from roll_sft.data.chat.sample import TokenizedSample, UnusableRow
from roll_sft.data.chat.turns import Text, TurnFinder
from roll_sft.data.rows.conversation import Conversation


@dataclass(frozen=True, slots=True)
class PlannedText:
    """A text to be made a sample of. `is_marked`: its row spells control tokens."""

    text: Text
    by_ids: bool
    is_marked: bool = False


class PreparedTemplate:
    """Plans the texts of conversations under one template, and masks them by their places."""

    def __init__(self, renderer: Renderer, encoder: Encoder, *, train_on: str) -> None:
        """`train_on` is as in the configuration."""
        self._renderer, self._encoder, self._train_on = renderer, encoder, train_on
        self._finder = TurnFinder(renderer, train_on=train_on)

    @cached_property
    def _probes(self) -> list[Probe]:
        return prove_probes(self._renderer, self._encoder)

    @cached_property
    def anchor(self) -> Anchor | None:
        """The tokens around every answer, if they are always the same."""
        return find_anchor(self._probes, self._encoder)

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The token that ends an answer; None if the template writes no probe."""
        return end_of_turn(self._probes)

    def plan(self, row: Conversation, *, by_ids: bool) -> list[PlannedText]:
        """Return the texts of `row`, or raise `UnusableRow`; nothing goes by ids unless asked for.

        Raises `DataError` if the template cannot be used with any conversation.
        """
        marked = self._encoder.marked(row)
        if marked is not None:
            return self._plan_marked(row, marked)
        anchor = self.anchor if by_ids else None
        if anchor and self._renderer.is_causal and (text := self._quick(row, anchor)):
            return [PlannedText(text, by_ids=True)]
        return [
            PlannedText(text, by_ids=anchor is not None and anchor.fits(text))
            for text in self._finder.find(row)
        ]

    def sample_by_places(self, plans: Sequence[PlannedText]) -> list[TokenizedSample | UnusableRow]:
        """Return the sample of each text whose turns are known, or why it has none."""
        texts = [plan.text.text for plan in plans if not plan.is_marked]
        encodings = iter(self._encoder.backend.encode_batch(texts, add_special_tokens=False))
        samples: list[TokenizedSample | UnusableRow] = []
        for plan in plans:
            encoding = None if plan.is_marked else next(encodings)
            try:
                whole = (
                    self._encoder.encode_renamed(plan.text.text)
                    if encoding is None
                    else placed(encoding)
                )
                samples.append(self._masked(plan, whole))
            except UnusableRow as error:
                samples.append(error)
        return samples

    def _masked(self, plan: PlannedText, encoded: Encoded) -> TokenizedSample:
        encoder = self._encoder
        return mask_by_places(
            plan.text,
            cut_at_headers(plan.text, encoded, encoder, is_renamed=plan.is_marked),
            control_ids=encoder.control_ids,
            end_ids=frozenset(() if self.end_of_turn_id is None else (self.end_of_turn_id,)),
            learn_all=self._train_on == "all",
        )

    def _quick(self, row: Conversation, anchor: Anchor) -> Text | None:
        """Return the row as one text if it is plain and every message stands in it, in order."""
        renderer = self._renderer
        if (
            row.tools
            or renderer.think.lead
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
            and all(anchor.holds(text, mark) for mark in rendering.marks)
        ):
            return None
        return self._finder.whole(row, text)

    def _plan_marked(self, row: Conversation, marked: Conversation) -> list[PlannedText]:
        """Plan a row that spells control tokens: see `data.encode`."""
        texts = self._finder.find(marked)
        bare = self._finder.find(row)
        if [unmarked(text.text) for text in texts] != [text.text for text in bare]:
            raise UnusableRow(
                "the row spells a control token where the chat template looks at the text, so the "
                "two cannot be told apart; reword or remove it"
            )
        return [
            PlannedText(_moved(text, self._encoder), by_ids=False, is_marked=True) for text in texts
        ]


def _moved(text: Text, encoder: Encoder) -> Text:
    """Return a text with marks as the renaming backend reads it, and the places of its turns."""

    def at(place: int) -> int:
        return len(encoder.renamed(text.text[:place]))

    turns = tuple(
        replace(
            turn,
            start=at(turn.start),
            end=at(turn.end),
            spans=tuple((at(start), at(end)) for start, end in turn.spans),
        )
        for turn in text.turns or ()
    )
    return replace(text, text=encoder.renamed(text.text), turns=turns)
