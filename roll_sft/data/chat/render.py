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

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2

from roll_sft.base.errors import DataError
from roll_sft.data.chat.reasoning import ThinkStyle, written_inline
from roll_sft.data.chat.sample import UnusableRow
from roll_sft.data.chat.template_limits import (
    OverBudgetError,
    compile_bounded,
    has_marks,
    variables_of,
)
from roll_sft.data.rows.conversation import Conversation, Message, ToolCall

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
# Arguments of `apply_chat_template` that are no variables of a template; training sets them.
RESERVED = (
    "messages", "conversation", "tools", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
_BLOCKS_COUNTED = 64  # pieces of output that are counted at once
_PROBE_CALL = ToolCall("probe_tool", {"probe_key": "probe_value"}, id="probe1234")
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {}},
    },
}
_PROBE_REASONING = "probe reasoning"

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
        inline = written_inline(message, self.think)
        return self._turn(message if inline is None else inline)

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
        if any(message.tool_calls for message in row.messages) and self._arguments is None:
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
            style = self._arguments
            turn["tool_calls"] = [
                _call(call, as_text=style == "text") for call in message.tool_calls
            ]
        if message.name:
            turn["name"] = message.name
        if message.tool_call_id:
            turn["tool_call_id"] = message.tool_call_id
        return turn

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads and does not set itself."""
        return variables_of(self.template)

    @cached_property
    def think(self) -> ThinkStyle:
        """How the template treats reasoning."""
        question = {"role": "user", "content": "question"}

        def written(*answers: dict[str, Any]) -> str:
            return self._text([question, *answers])

        answer = Message("assistant", "answer", reasoning=_PROBE_REASONING)
        return ThinkStyle.of(
            self.template,
            question=written(),
            prompt=self._text([question], add_generation_prompt=True),
            has_field=_PROBE_REASONING in self._probe(self._turn(answer)),
            written=lambda message: written(self._turn(message)),
        )

    @cached_property
    def _arguments(self) -> str | None:
        """The form in which tool arguments come out as JSON: "object", "text", or neither."""
        name, value = "probe_key", "probe_value"
        for style in ("object", "text"):
            call = _call(_PROBE_CALL, as_text=style == "text")
            text = self._probe({"role": "assistant", "content": "", "tool_calls": [call]})
            # Python's quotes, or a JSON text inside a JSON text, show that the other form is meant.
            is_bent = f"'{name}'" in text or f'\\"{name}\\"' in text
            if _PROBE_CALL.name in text and name in text and value in text and not is_bent:
                return style
        return None

    def _probe(self, answer: dict[str, Any]) -> str:
        """The text of a question and `answer`, without tools and with one; empty if refused."""
        turns = [{"role": "user", "content": "question"}, answer]
        return "".join(self._text(turns, tools=tools) for tools in ((), (_PROBE_TOOL,)))

    def _text(
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


def _call(call: ToolCall, *, as_text: bool) -> dict[str, Any]:
    arguments = dict(call.arguments)
    given = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
    told = {"id": call.id} if call.id else {}
    return {"type": "function", **told, "function": {"name": call.name, "arguments": given}}
