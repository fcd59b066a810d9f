"""One chat template with its variables, and its properties that hold for all rows.

`turns` renders a conversation to texts. For each text this module decides whether its mask follows
from the token ids alone. The properties that this needs (how the template treats reasoning, which
tokens stand around an answer) are measured on probe conversations when they are first needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from roll_sft.base.errors import DataError
from roll_sft.data.chat.encoder import Encoded, Encoder, placed
from roll_sft.data.chat.mask import cut_at_headers, mask_by_places, supervised_runs
from roll_sft.data.chat.render import Renderer
from roll_sft.data.chat.sample import TokenizedSample, UnusableRow
from roll_sft.data.chat.turns import RenderedChat, TurnFinder
from roll_sft.data.rows.conversation import Conversation, Message

if TYPE_CHECKING:
    from roll_sft.data.chat.fast.answer_markers import AnswerMarkers

# All texts differ, so whatever repeats itself comes from the template.
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
    """A conversation of ours as text, as tokens, and as the sample that `mask_by_places` makes."""

    text: RenderedChat
    encoded: Encoded
    sample: TokenizedSample


def prove_probes(renderer: Renderer, encoder: Encoder) -> list[Probe]:
    """Return the probes that the template can render and that have an exact mask."""
    finder, probes = TurnFinder(renderer, train_on="assistant"), []
    for turns in _PROBES:
        messages = tuple(Message(role, content) for role, content in turns)
        try:
            for text in finder.find(Conversation(messages, row=0, line=1)):
                whole = placed(encoder.backend.encode(text.text, add_special_tokens=False))
                encoded = cut_at_headers(text, whole, encoder)
                sample = mask_by_places(
                    text, encoded, control_ids=encoder.control_ids, train_on_all=False
                )
                probes.append(Probe(text, encoded, sample))
        except (UnusableRow, DataError):
            continue
    return probes


def end_of_turn(probes: Sequence[Probe]) -> int | None:
    """Return the token that ends an answer; None without a probe."""
    if not probes:
        return None
    return probes[0].encoded.ids[supervised_runs(probes[0].sample)[1][-1]]


@dataclass(frozen=True, slots=True)
class PlannedText:
    """A text to be made a sample of. `is_marked`: its row spells control tokens."""

    text: RenderedChat
    by_ids: bool
    is_marked: bool = False


class PreparedTemplate:
    """Plans the texts of conversations under one template, and masks them by their places."""

    def __init__(
        self, renderer: Renderer, encoder: Encoder, *, train_on: str, use_fast: bool
    ) -> None:
        """`train_on` is as in the configuration. `use_fast`: use the modules of `fast/`."""
        self.renderer, self._encoder, self._train_on = renderer, encoder, train_on
        self._use_fast = use_fast
        self._finder = TurnFinder(renderer, train_on=train_on)

    @cached_property
    def _probes(self) -> list[Probe]:
        return prove_probes(self.renderer, self._encoder)

    @cached_property
    def markers(self) -> "AnswerMarkers | None":
        """The tokens around every answer; None if they differ between answers."""
        if not self._use_fast:
            return None
        from roll_sft.data.chat.fast.answer_markers import find_markers

        return find_markers(self._probes, self._encoder)

    @cached_property
    def _is_written_in_order(self) -> bool:
        from roll_sft.data.chat.fast.template_order import is_written_in_order

        return is_written_in_order(self.renderer.template)

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The token that ends an answer; None if the template writes no probe."""
        return end_of_turn(self._probes)

    def plan(self, row: Conversation, *, by_ids: bool) -> list[PlannedText]:
        """Return the texts of `row`; those whose mask follows from the ids only with `by_ids`.

        Raises `UnusableRow` for the row, and `DataError` if the template cannot be used with any
        conversation.
        """
        if self._encoder.spells_control(row):
            from roll_sft.data.chat.control_text import find_marked

            texts = find_marked(row, self._finder, self._encoder.control_text)
            return [PlannedText(text, by_ids=False, is_marked=True) for text in texts]
        markers = self.markers if by_ids else None
        if markers and self._is_written_in_order:
            from roll_sft.data.chat.fast.answer_markers import rendered_once

            if text := rendered_once(row, self.renderer, self._finder, markers):
                return [PlannedText(text, by_ids=True)]
        return [
            PlannedText(text, by_ids=markers is not None and markers.fits(text))
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
                    self._encoder.control_text.encode_renamed(plan.text.text)
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
            train_on_all=self._train_on == "all",
        )
