"""Rows -> samples: token ids and an exact loss mask, or the reason why there is none.

The chat template renders a conversation, which is encoded once. `turns` finds the answers in the
text, and `mask` maps them to tokens by character offsets. Many templates write messages in order
and set the same control tokens around each answer. For these `fast/` finds the answers of many rows
in their ids; the samples are the same.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from roll_sft.base.errors import DataError
from roll_sft.data.chat.encoder import Encoder, EncoderFacts
from roll_sft.data.chat.prepared import PlannedText, PreparedTemplate
from roll_sft.data.chat.render import Renderer
from roll_sft.data.chat.sample import TokenizedSample, UnusableRow
from roll_sft.data.rows.conversation import Conversation, Document, Message

if TYPE_CHECKING:
    from roll_sft.data.chat.advice import Advice

__all__ = ["ChatTokenizer", "TokenizedSample", "UnusableRow"]

# Part of the fingerprint: raise it when the same row gives other ids or another mask.
_VERSION = 4
_MOST_PREPARED = 64  # sets of variables; rows with more of them hardly repeat one
_PLAIN_ROW = Conversation((Message("user", "q"), Message("assistant", "a")), row=0, line=1)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The inputs that decide the samples, as plain values.

    `templates` has the text of the template under "default" and, if the tokenizer has one for rows
    with tools, under "tool_use". `template_names` are the names of all templates of the tokenizer.
    """

    encoder: EncoderFacts
    templates: Mapping[str, str]
    template_names: tuple[str, ...]
    special_tokens: Mapping[str, Any]
    variables: Mapping[str, Any]
    train_on: str
    use_fast: bool


@dataclass(slots=True)
class _Plan:
    """A text and, once it is known, its sample. A document has no template."""

    planned: PlannedText
    template: PreparedTemplate | None = None
    result: TokenizedSample | UnusableRow | None = None


class ChatTokenizer:
    """Turns rows into samples with one tokenizer, its chat template and one `train_on`.

    `template` is the template's text (None: the tokenizer has none). `fingerprint` (hexadecimal
    SHA-256) changes with anything that changes a sample: vocabulary, merges, normalisation, added
    tokens, templates and their variables, `train_on`, and the rules of these modules. Pickled as
    the text of the tokenizer and the template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        train_on: str = "assistant",
        use_fast: bool = True,
    ) -> None:
        """`template` is Jinja text that replaces the tokenizer's own; it reads `variables`.

        `train_on` is as `data.train_on`. `use_fast`: use the modules of `fast/`, which change no
        sample. Raises `DataError` if `tokenizer` reports no character offsets.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise DataError(
                f"tokenizer {type(tokenizer).__name__}: is not a fast one and reports no character "
                f"offsets, which the loss mask needs; use a model folder with a tokenizer.json"
            )
        own = tokenizer.chat_template or {}
        named = dict(own) if isinstance(own, dict) else {"default": own}
        self._set_up(
            Recipe(
                EncoderFacts.of(tokenizer),
                templates=named if template is None else {"default": template},
                template_names=tuple(sorted(named)),
                special_tokens=dict(tokenizer.special_tokens_map),
                variables=dict(variables or {}),
                train_on=train_on,
                use_fast=use_fast,
            )
        )

    @classmethod
    def of(cls, recipe: Recipe) -> "ChatTokenizer":
        """The tokenizer that `recipe` describes."""
        tokenizer = cls.__new__(cls)
        tokenizer._set_up(recipe)
        return tokenizer

    def __getstate__(self) -> Recipe:
        return self.recipe

    def __setstate__(self, recipe: Recipe) -> None:
        self._set_up(recipe)

    def _set_up(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.encoder = Encoder(recipe.encoder, use_fast=recipe.use_fast)
        self._prepared: dict[tuple[str, str], PreparedTemplate] = {}
        self.template = recipe.templates.get("default")
        parts = (
            _VERSION,
            recipe.encoder.backend,
            recipe.templates,
            recipe.special_tokens,
            recipe.variables,
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
        return self.prepared_for(_PLAIN_ROW).end_of_turn_id

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

        A conversation gives one sample, or one for each supervised turn (see `turns`). Encodes all
        rows together, which uses all cores. Raises `DataError` if the template cannot be used with
        any conversation: it is missing or broken, or writes no end-of-turn token after an answer.
        """
        plans = [self._planned(row) for row in rows]
        self._sample_by_ids(_select(plans, by_ids=True))
        for index, plan in enumerate(plans):
            # The ids did not show every answer: find the places in the text, or the reason.
            if isinstance(plan, list) and any(
                each.planned.by_ids and each.result is None for each in plan
            ):
                plans[index] = self._planned(rows[index], by_ids=False)
        self._sample_by_places(_select(plans, by_ids=False))
        results = [_results(plan) for plan in plans]
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, UnusableRow) and result.is_of_template:
                result.remedy = partial(self._remedy, row)
        return results

    def _planned(
        self, row: Conversation | Document, *, by_ids: bool = True
    ) -> list[_Plan] | UnusableRow:
        try:
            if isinstance(row, Document):
                from roll_sft.data.chat.documents import planned_document

                planned, sample = planned_document(row, self.encoder, self.recipe.encoder)
                return [_Plan(planned, result=sample)]
            _check_turns(row)
            template = self.prepared_for(row)
            return [_Plan(planned, template) for planned in template.plan(row, by_ids=by_ids)]
        except UnusableRow as error:
            return error

    def _sample_by_ids(self, plans: Sequence[_Plan]) -> None:
        # The template writes the first tokens of a text itself.
        encoded = self.encoder.encode([plan.planned.text.text for plan in plans])
        chats: dict[PreparedTemplate, list[tuple[_Plan, NDArray[np.int32]]]] = {}
        for plan, ids in zip(plans, encoded, strict=True):
            if plan.template is None:
                from roll_sft.data.chat.documents import document_sample

                plan.result = document_sample(ids, self.recipe.encoder)
            else:
                chats.setdefault(plan.template, []).append((plan, ids))
        for template, group in chats.items():
            from roll_sft.data.chat.fast.answer_markers import masks_by_markers

            assert template.markers is not None, "a text is planned by ids only with markers"
            samples = masks_by_markers(
                [plan.planned.text for plan, _ in group],
                [ids for _, ids in group],
                markers=template.markers,
                train_on_all=self.recipe.train_on == "all",
            )
            for (plan, _), sample in zip(group, samples, strict=True):
                plan.result = sample

    def _sample_by_places(self, plans: Sequence[_Plan]) -> None:
        groups: dict[PreparedTemplate, list[_Plan]] = {}
        for plan in plans:
            assert plan.template is not None, "a document has its sample by now"
            groups.setdefault(plan.template, []).append(plan)
        for template, group in groups.items():
            results = template.sample_by_places([plan.planned for plan in group])
            for plan, result in zip(group, results, strict=True):
                plan.result = result

    def prepared_for(self, row: Conversation) -> PreparedTemplate:
        """The template that transformers takes for `row`, with its variables."""
        recipe = self.recipe
        name = "tool_use" if row.tools and "tool_use" in recipe.templates else "default"
        template = recipe.templates.get(name)
        if template is None:
            raise DataError(
                f"the tokenizer has no default chat template (found: "
                f"{', '.join(recipe.template_names) or 'none'}); {self._remedy(_PLAIN_ROW)}, or "
                f"give the tokenizer of an instruction-tuned model with model.tokenizer_path"
            )
        own = row.template_kwargs
        key = (name, json.dumps(own, sort_keys=True) if own else "")
        prepared = self._prepared.get(key)
        if prepared is None:
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            renderer = Renderer(template, recipe.special_tokens, {**recipe.variables, **own})
            if own:
                from roll_sft.data.chat.templates import check_row_variables

                check_row_variables(own, renderer)
            prepared = PreparedTemplate(
                renderer, self.encoder, train_on=recipe.train_on, use_fast=recipe.use_fast
            )
            self._prepared[key] = prepared
        return prepared

    def _remedy(self, row: Conversation | Document) -> str:
        return self._advice.remedy(row)

    @cached_property
    def _advice(self) -> "Advice":
        from roll_sft.data.chat.advice import Advice

        return Advice(self.recipe)


def _check_turns(row: Conversation) -> None:
    if not row.messages:
        raise UnusableRow("the conversation holds no message; remove the row")
    if row.messages[0].role == "assistant":
        raise UnusableRow(
            "the conversation begins with an assistant message, which answers nothing; "
            "begin with a user message"
        )


def _select(plans: Iterable[list[_Plan] | UnusableRow], *, by_ids: bool) -> list[_Plan]:
    """Return the plans that go one way and have no result yet."""
    return [
        each
        for plan in plans
        if isinstance(plan, list)
        for each in plan
        if each.planned.by_ids == by_ids and each.result is None
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
