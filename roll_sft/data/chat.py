"""Rows -> samples: token ids and the mask of what is learnt, exact or refused.

A conversation is rendered by the chat template and encoded once. What is learnt is found in one of
two ways, which give the same samples:
- the quick one: a template that writes from left to right (`data.causal`) and sets control tokens
  around each answer needs one rendering, and the answers are found in the ids of many rows at once;
- the proved one, for all else: the turns are found in the text (`data.turns`), and carried over to
  the tokens by the ids or by character offsets (`data.mask`).

A document is encoded without a template, begins as the tokenizer begins a text, ends with the
end-of-text token, and is learnt as a whole.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from roll_sft.data.anchor import Probe, end_of_turn, find_anchor, prove_probes
from roll_sft.data.conversation import Conversation, Document
from roll_sft.data.encode import Encoder, EncoderFacts, placed, unmarked
from roll_sft.data.mask import Anchor, Flat, mask_by_places, masks_by_ids
from roll_sft.data.render import Renderer
from roll_sft.data.samples import TokenizedSample, UnusableRow
from roll_sft.data.turns import Text, TurnFinder
from roll_sft.errors import DataError

__all__ = ["ChatTokenizer", "TokenizedSample", "UnusableRow"]

# Part of the fingerprint: raise it when the same row gives other ids or another mask.
_VERSION = 3


@dataclass(frozen=True, slots=True)
class _Recipe:
    """All that decides the samples, as plain values."""

    encoder: EncoderFacts
    template: str | None
    template_names: tuple[str, ...]
    special_tokens: Mapping[str, Any]
    train_on: str


@dataclass(slots=True)
class _Plan:
    """A text on its way to its sample. `is_marked`: the row spells control tokens."""

    text: Text
    by_ids: bool
    is_marked: bool = False
    is_document: bool = False
    result: TokenizedSample | UnusableRow | None = None


class ChatTokenizer:
    """Turns rows into samples with one tokenizer, one chat template and one `train_on`.

    `template` is the template's text (None: the tokenizer has none). `fingerprint` (hexadecimal
    SHA-256) changes with anything that changes a sample: vocabulary, merges, normalisation, added
    tokens, template, `train_on`, and the rules of these modules. Travels between processes as the
    text of the tokenizer and the template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        train_on: str = "assistant",
    ) -> None:
        """`template` is Jinja text in place of the tokenizer's own; `train_on` as `data.train_on`.

        Raise `DataError` if `tokenizer` reports no character offsets.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise DataError(
                f"tokenizer {type(tokenizer).__name__}: is not a fast one and reports no character "
                f"offsets, which the loss mask needs; use a model folder with a tokenizer.json"
            )
        own = tokenizer.chat_template
        names = tuple(sorted(own)) if isinstance(own, dict) else ()
        self._set_up(
            _Recipe(
                EncoderFacts.of(tokenizer),
                template=_own_template(tokenizer) if template is None else template,
                template_names=names,
                special_tokens=dict(tokenizer.special_tokens_map),
                train_on=train_on,
            )
        )

    def __getstate__(self) -> _Recipe:
        return self._recipe

    def __setstate__(self, recipe: _Recipe) -> None:
        self._set_up(recipe)

    def _set_up(self, recipe: _Recipe) -> None:
        self._recipe = recipe
        self._encoder = Encoder(recipe.encoder)
        self._learn_all = recipe.train_on == "all"
        self.template = recipe.template
        parts = (
            _VERSION,
            recipe.encoder.backend,
            recipe.template,
            recipe.special_tokens,
            sorted(recipe.encoder.protected.items()),
            recipe.encoder.first_ids,
            recipe.encoder.end_of_text,
            recipe.train_on,
        )
        described = json.dumps(parts, sort_keys=True, default=str)
        self.fingerprint = hashlib.sha256(described.encode("utf-8")).hexdigest()

    @property
    def end_of_turn_id(self) -> int | None:
        """The token that ends an answer; None without a template, or if it writes no probe."""
        if self.template is None:
            return None
        return end_of_turn(self._probes)

    def tokenize(self, row: Conversation | Document) -> list[TokenizedSample]:
        """Return the samples of one row, or raise `UnusableRow`; see `tokenize_many`."""
        result = self.tokenize_many([row])[0]
        if isinstance(result, UnusableRow):
            raise result
        return result

    def tokenize_many(
        self, rows: Sequence[Conversation | Document]
    ) -> list[list[TokenizedSample] | UnusableRow]:
        """Return for each row its samples, in order, or why it has none (not raised).

        A conversation gives one sample, or one for each learnt turn (see `data.turns`). Encodes all
        rows together, which uses all cores. Raises `DataError` if the template cannot be used with
        any conversation: it is missing or broken, or writes no end-of-turn token after an answer.
        """
        plans = [self._planned(row) for row in rows]
        self._sample_by_ids(_select(plans, by_ids=True))
        for index, plan in enumerate(plans):
            # An answer whose header is not there as expected: say where it is, or why not.
            if isinstance(plan, list) and any(each.by_ids and each.result is None for each in plan):
                plans[index] = self._planned(rows[index], by_ids=False)
        self._sample_by_places(_select(plans, by_ids=False))
        return [_results(plan) for plan in plans]

    def _planned(
        self, row: Conversation | Document, *, by_ids: bool = True
    ) -> list[_Plan] | UnusableRow:
        try:
            if isinstance(row, Document):
                return [self._document(row)]
            return self._plans(row, by_ids=by_ids)
        except UnusableRow as error:
            return error

    def _document(self, row: Document) -> _Plan:
        if self._recipe.encoder.end_of_text is None:
            raise DataError(
                "the tokenizer has no eos_token, so a text would have no end; name one in its "
                "tokenizer_config.json"
            )
        encoder = self._encoder
        if not encoder.holds_control_text(row.text):
            return _Plan(Text(row.text, answers=(), calls=()), by_ids=True, is_document=True)
        sample = self._document_sample(encoder.encode_renamed(row.text).ids)
        return _Plan(Text(row.text, answers=(), calls=()), by_ids=False, result=sample)

    def _document_sample(self, ids: Iterable[int]) -> TokenizedSample:
        facts = self._recipe.encoder
        whole = np.array([*facts.first_ids, *ids, facts.end_of_text], np.int32)
        label_mask = np.ones(whole.size, np.uint8)
        label_mask[-1] = 0
        return TokenizedSample(whole, label_mask)

    def _plans(self, row: Conversation, *, by_ids: bool) -> list[_Plan]:
        if not row.messages:
            raise UnusableRow("the conversation holds no message; remove the row")
        if row.messages[0].role == "assistant":
            raise UnusableRow(
                "the conversation begins with an assistant message, which answers nothing; "
                "begin with a user message"
            )
        marked = self._encoder.marked(row)
        if marked is not None:
            return self._marked_plans(row, marked)
        anchor = self._anchor if by_ids else None
        if anchor and self._renderer.is_causal and (text := self._quick(row, anchor)):
            return [_Plan(text, by_ids=True)]
        return [
            _Plan(text, by_ids=anchor is not None and anchor.fits(text))
            for text in self._finder.find(row)
        ]

    def _quick(self, row: Conversation, anchor: Anchor) -> Text | None:
        """Return the row as one text if it is plain and every message stands in it, in order."""
        if row.tools or any(
            message.reasoning or message.tool_calls or message.role == "tool"
            for message in row.messages
        ):
            return None
        renderer = self._renderer
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

    def _marked_plans(self, row: Conversation, marked: Conversation) -> list[_Plan]:
        """Plan a row that spells control tokens: see `data.encode`."""
        texts = self._finder.find(marked)
        bare = self._finder.find(row)
        if [unmarked(text.text) for text in texts] != [text.text for text in bare]:
            raise UnusableRow(
                "the row spells a control token where the chat template looks at the text, so the "
                "two cannot be told apart; reword or remove it"
            )
        return [_Plan(_moved(text, self._encoder), by_ids=False, is_marked=True) for text in texts]

    def _sample_by_ids(self, plans: Sequence[_Plan]) -> None:
        if not plans:
            return
        # The template writes what begins a text; adding it again would double it.
        encoded = self._encoder.encode([plan.text.text for plan in plans])
        chats: list[tuple[_Plan, NDArray[np.int32]]] = []
        for plan, ids in zip(plans, encoded, strict=True):
            if plan.is_document:
                plan.result = self._document_sample(ids)
            else:
                chats.append((plan, ids))
        if not chats:
            return
        assert self._anchor is not None, "nothing is planned by ids without an anchor"
        samples = masks_by_ids(
            [plan.text for plan, _ in chats],
            Flat.of([ids for _, ids in chats]),
            anchor=self._anchor,
            learn_all=self._learn_all,
        )
        for (plan, _), sample in zip(chats, samples, strict=True):
            plan.result = sample

    def _sample_by_places(self, plans: Sequence[_Plan]) -> None:
        encoder = self._encoder
        unmarked_texts = [plan.text.text for plan in plans if not plan.is_marked]
        encodings = iter(encoder.backend.encode_batch(unmarked_texts, add_special_tokens=False))
        for plan in plans:
            try:
                plan.result = mask_by_places(
                    plan.text,
                    encoder.encode_renamed(plan.text.text)
                    if plan.is_marked
                    else placed(next(encodings)),
                    control_ids=encoder.control_ids,
                    learn_all=self._learn_all,
                )
            except UnusableRow as error:
                plan.result = error

    @cached_property
    def _renderer(self) -> Renderer:
        if self.template is None:
            names = ", ".join(self._recipe.template_names) or "none"
            raise DataError(
                f"the tokenizer has no default chat template (found: {names}); give it one, "
                f"name one with data.chat_template, or give the tokenizer of an instruction-tuned "
                f"model with model.tokenizer_path"
            )
        return Renderer(self.template, self._recipe.special_tokens)

    @cached_property
    def _finder(self) -> TurnFinder:
        return TurnFinder(self._renderer, train_on=self._recipe.train_on)

    @cached_property
    def _probes(self) -> list[Probe]:
        return prove_probes(self._renderer, self._encoder)

    @cached_property
    def _anchor(self) -> Anchor | None:
        return find_anchor(self._probes, self._encoder)


def _select(plans: Iterable[list[_Plan] | UnusableRow], *, by_ids: bool) -> list[_Plan]:
    """Return the plans that go one way and have no result yet."""
    return [
        each
        for plan in plans
        if isinstance(plan, list)
        for each in plan
        if each.by_ids == by_ids and each.result is None
    ]


def _results(plans: list[_Plan] | UnusableRow) -> list[TokenizedSample] | UnusableRow:
    if isinstance(plans, UnusableRow):
        return plans
    samples: list[TokenizedSample] = []
    for plan in plans:
        if isinstance(plan.result, UnusableRow):
            return plan.result
        assert plan.result is not None, "every plan has been sampled"
        samples.append(plan.result)
    return samples


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


def _own_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the tokenizer's template as text, the default one if it has several."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        return None
