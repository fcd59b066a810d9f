"""Reasoning in an answer, in the form that the template trains and later asks for.

A model that reasons writes `<think>`, its reasoning, `</think>` and the answer. In many templates
the generation prompt already writes `<think>`, or a whole empty block that keeps the model from
reasoning. A supervised answer must continue from there. Rows hold reasoning in a field of its own,
in the content, or not at all. Probes show how the template treats each:

- Reasoning in a field is given to the template as a field. If the template has no such field but
  writes think blocks, the reasoning goes into the content.
- An answer without reasoning, after a prompt that opened a block, gets an empty block. If the
  template does not write it, this module does.
- An answer whose content begins inside the block, as recorded from such a prompt, gets the
  beginning of the block back.

This holds for answers that are trained on. Earlier answers stay as they are: at inference the
template gets them in that form.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from roll_sft.data.rows.conversation import Message

_OPEN, _CLOSE = "<think>", "</think>"
_THOUGHT = "probe reasoning"


@dataclass(frozen=True, slots=True)
class ThinkStyle:
    """How a template treats reasoning.

    `prompt_tail` is the text that the generation prompt adds to a question. `lead` is the part of
    it from "<think>" on; empty if there is none. `has_field`: the template writes reasoning that is
    given in a field. `is_inline`: it does not, but keeps a think block in the content. `fills`: it
    does not close the block that its `lead` opens, so an empty block must be given to it.
    """

    prompt_tail: str
    lead: str
    has_field: bool
    is_inline: bool
    fills: bool

    @classmethod
    def of(
        cls,
        template: str,
        *,
        question: str,
        prompt: str,
        has_field: bool,
        written: Callable[[Message], str],
    ) -> "ThinkStyle":
        """The style of a template, from a question alone, with the generation prompt, and answered.

        `written` renders the question with a given answer.
        """
        tail = prompt[len(question) :] if prompt.startswith(question) else ""
        lead = tail[tail.rfind(_OPEN) :] if _OPEN in tail else ""
        style = cls(tail, lead, has_field=has_field, is_inline=False, fills=False)
        plain = Message("assistant", "answer")
        thought = style.block(_THOUGHT)
        reasoned = written(replace(plain, content=thought + plain.content))
        unreasoned = written(plain)
        filled = written(replace(plain, content=style.block("") + plain.content))
        return replace(
            style,
            is_inline=not (has_field or style.is_closed)
            and (bool(lead) or _CLOSE in template)
            and thought in reasoned,
            fills=bool(lead)
            and not unreasoned.startswith(prompt)
            and filled.startswith(prompt)
            and plain.content in filled,
        )

    @property
    def has_place(self) -> bool:
        """Whether the template writes reasoning that a row has in a field."""
        return self.has_field or self.is_inline

    @property
    def is_closed(self) -> bool:
        """Whether the generation prompt closes a think block."""
        return _CLOSE in self.prompt_tail

    def block(self, reasoning: str) -> str:
        """A think block with the spaces that the generation prompt uses."""
        if self.is_closed and not reasoning:
            return self.lead
        opening = self.lead if self.lead and not self.is_closed else f"{_OPEN}\n"
        closing = f"\n{_CLOSE}\n\n" if "\n" in opening else _CLOSE
        return opening + reasoning.strip("\n") + closing


def written_inline(message: Message, style: ThinkStyle) -> Message | None:
    """Return an answer with its think block in the content; None if it needs no change."""
    if message.reasoning:
        if style.has_field or not style.is_inline:
            return None
        content = style.block(message.reasoning) + message.content
        return replace(message, content=content, reasoning="")
    if not style.fills:
        return None
    if _CLOSE not in message.content:
        return replace(message, content=style.block("") + message.content)
    if _OPEN not in message.content and not style.is_closed:
        return replace(message, content=style.lead + message.content)
    return None
