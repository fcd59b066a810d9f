"""Conversations -> text, by a chat template that is compiled once.

The template gets the context that `apply_chat_template` gives it: messages as dicts, tools as JSON
schemas, the special tokens by name, `documents=None`, and the given variables. So the text is equal
to the character. The compiled template is called directly, because the checks of transformers take
longer than a small template.

Three things differ on purpose. `strftime_now` returns the fixed day `PINNED_DAY`: a template that
writes the date would give other samples tomorrow. Tool arguments are given as an object or as its
JSON text, whichever the template writes as JSON. The reasoning of a supervised answer is given in
the form that continues the generation prompt: see `reasoning`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2

from roll_sft.base.errors import DataError
from roll_sft.data.chat.sample import UnusableRow
from roll_sft.data.chat.template_limits import OverBudgetError, compile_bounded, has_marks
from roll_sft.data.rows.conversation import Conversation, Message

if TYPE_CHECKING:
    from roll_sft.data.chat.reasoning import ThinkStyle

# The day that Llama 3's own templates fall back on where there is no clock.
PINNED_DAY = datetime(2024, 7, 26)

_log = logging.getLogger(__name__)

# Errors of a template over a row: raised by itself, or by an operation on a value of another type.
_ROW_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
_BLOCKS_COUNTED = 64  # pieces of output that are counted at once
_THINK = "<think>"
QUESTION = {"role": "user", "content": "question"}  # of probes

Turns = list[dict[str, Any]]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as text, and the spans of characters that the template marks as generated."""

    text: str
    marks: tuple[Span, ...] = ()


class Renderer:
    """One chat template with its variables.

    `template` is its text. `has_marks`: it has `{% generation %}` marks.
    """

    def __init__(
        self,
        template: str,
        special_tokens: Mapping[str, Any],
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """Raise `DataError` if the template is broken."""
        self.template = template
        self._over_budget: DataError | None = None
        try:
            self._compiled, self._budget = compile_bounded(template)
            self.has_marks = has_marks(template)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template is broken at its line {error.lineno}: {error.message}; mend "
                f"the tokenizer's template or use another tokenizer"
            ) from error
        except (RecursionError, MemoryError, OverBudgetError) as error:
            raise DataError(
                f"the chat template cannot be compiled ({type(error).__name__}: it is nested too "
                f"deep, or too large); mend the tokenizer's template or use another tokenizer"
            ) from error
        if "strftime_now" in template:
            _log.info("the chat template writes a date: samples have %s", PINNED_DAY.date())
        self._context = {
            **special_tokens,
            "documents": None,
            "strftime_now": PINNED_DAY.strftime,
            **(variables or {}),
        }

    def turns(self, messages: Sequence[Message]) -> Turns:
        """Return messages as the dicts that templates read."""
        return [self._turn(message) for message in messages]

    def answer(self, message: Message) -> dict[str, Any]:
        """Return the dict of an answer that is trained on, in the form that inference asks for."""
        if message.reasoning or self.opens_think:
            from roll_sft.data.chat.reasoning import written_inline

            message = written_inline(message, self.think) or message
        return self._turn(message)

    def render(
        self, turns: Turns, *, tools: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> Rendering:
        """Return the text of `turns`; raise `UnusableRow` if the template objects."""
        context = {
            **self._context,
            "messages": turns,
            "tools": list(tools) or None,
            "add_generation_prompt": add_generation_prompt,
        }
        if self._over_budget is not None:  # each try takes seconds
            raise self._over_budget
        self._budget.renew()
        try:
            if self.has_marks and not add_generation_prompt:
                return self._render_marked(context)
            return Rendering(self._compiled.render(context))
        except OverBudgetError as error:
            self._over_budget = DataError(
                f"the chat template does not come to an end: {error}; mend it, or use another"
            )
            raise self._over_budget from error
        except _ROW_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise UnusableRow(
                f"the chat template refuses the conversation: {reason}", is_of_template=True
            ) from error

    def _render_marked(self, context: Mapping[str, Any]) -> Rendering:
        blocks: list[str] = []
        marks: list[Span] = []
        environment: Any = self._compiled.environment
        with environment.activate_tracker(blocks, marks):
            for block in self._compiled.generate(context):
                blocks.append(block)  # one by one: a mark begins where the blocks end
                if not len(blocks) % _BLOCKS_COUNTED:
                    self._budget.spend(sum(map(len, blocks[-_BLOCKS_COUNTED:])))
        return Rendering("".join(blocks), tuple(marks))

    def check_expressible(self, row: Conversation) -> None:
        """Raise `UnusableRow` if the row has parts that the template has no place for."""
        if any(message.reasoning for message in row.messages) and not self.think.has_place:
            raise UnusableRow(
                "the row keeps reasoning apart from the answer, and the chat template has no "
                "place for it",
                is_of_template=True,
            )
        if any(message.tool_calls for message in row.messages) and self._argument_form is None:
            raise UnusableRow(
                "the row holds tool calls, and the chat template has no place for them",
                is_of_template=True,
            )

    def _turn(self, message: Message) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            # Both names, as transformers gives them.
            turn |= {"thinking": message.reasoning, "reasoning_content": message.reasoning}
        if message.tool_calls:
            from roll_sft.data.chat.tool_rendering import call_turn

            as_text = self._argument_form == "text"
            turn["tool_calls"] = [call_turn(call, as_text=as_text) for call in message.tool_calls]
        if message.name:
            turn["name"] = message.name
        if message.tool_call_id:
            turn["tool_call_id"] = message.tool_call_id
        return turn

    @cached_property
    def prompt_tail(self) -> str:
        """The text that the generation prompt adds to a question."""
        question, prompt = self.question_and_prompt
        return prompt[len(question) :] if prompt.startswith(question) else ""

    @cached_property
    def opens_think(self) -> bool:
        """Whether the generation prompt writes a think block, or the beginning of one."""
        return _THINK in self.prompt_tail

    @cached_property
    def question_and_prompt(self) -> tuple[str, str]:
        """The text of a question, without and with the generation prompt."""
        return self.text_of([QUESTION]), self.text_of([QUESTION], add_generation_prompt=True)

    @cached_property
    def think(self) -> "ThinkStyle":
        """How the template treats reasoning."""
        from roll_sft.data.chat.reasoning import think_style

        return think_style(self)

    @cached_property
    def _argument_form(self) -> str | None:
        from roll_sft.data.chat.tool_rendering import argument_form

        return argument_form(self)

    def text_of(
        self,
        turns: Turns,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """The text that `render` returns; empty if the template refuses the conversation."""
        try:
            return self.render(turns, tools=tools, add_generation_prompt=add_generation_prompt).text
        except UnusableRow:
            return ""
