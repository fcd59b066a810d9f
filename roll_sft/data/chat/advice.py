"""Advice for a row that the chat template cannot write: named templates that can."""

from dataclasses import replace
from functools import cached_property

from roll_sft.base.errors import DataError
from roll_sft.data.chat.chat import ChatTokenizer, Recipe
from roll_sft.data.chat.sample import UnusableRow
from roll_sft.data.chat.templates import fitting_templates, preferred
from roll_sft.data.rows.conversation import Conversation, Document

_MOST_ADVISED = 200  # rows for which templates are tried; a preview lists half as many


class Advice:
    """Tries the named templates on rows, with the tokenizer of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._num_advised = recipe, 0

    def remedy(self, row: Conversation | Document) -> str:
        """Which named templates write `row` with this tokenizer."""
        self._num_advised += 1
        if self._num_advised > _MOST_ADVISED:
            return "use another template (data.chat_template)"
        working = []
        for name, other in self._others.items():
            try:
                other.tokenize(row)
            except (UnusableRow, DataError):
                continue
            working.append(name)
        if not working:
            return "use a Jinja file that writes it (data.chat_template); no named template does"
        *others, last = preferred(working)
        names = f"{', '.join(others)} or {last}" if others else last
        return f"use data.chat_template={names}, or a Jinja file that writes it"

    @cached_property
    def _others(self) -> dict[str, ChatTokenizer]:
        """Tokenizers like that of the recipe, by the name of the template of ours that they use."""
        facts = self._recipe.encoder
        fitting = fitting_templates(
            facts.protected,
            eos_token=self._recipe.special_tokens.get("eos_token"),
            begins_with_bos=bool(facts.first_ids),
        )
        return {
            name: ChatTokenizer.of(replace(self._recipe, templates={"default": template}))
            for name, template in fitting.items()
        }
