"""Reasoning in an answer: in what form a template must be given it to train as it is asked.

A model that reasons writes `<think>`, what it thinks, `</think>` and the answer. Many templates
have the generation prompt write the `<think>` (or, to keep the model from thinking, a whole empty
block), so a supervised answer must go on from there. Rows keep reasoning in a field of its own,
or in the content, or hold none. What the template makes of each is found on probes:

- reasoning in a field goes to the template as a field, or if it knows none and does write think
  blocks, into the content;
- an answer without reasoning, after a prompt that has begun a block, has an empty block: from the
  template itself, or if it writes none, from here;
- an answer whose content begins inside the block (recorded from such a prompt) is given its
  beginning back.

This is for answers that are trained on. Earlier ones stay as they are, since that is how a
conversation comes back to the template at inference.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from roll_sft.data.rows.conversation import Message

_OPEN, _CLOSE = "<think>", "</think>"
_THOUGHT = "probe reasoning"


@dataclass(frozen=True, slots=True)
class ThinkStyle:
    """What a template does with reasoning.

    `prompt_tail` is what the generation prompt adds to a question, `lead` that of it from "<think>"
    on (empty: it writes none). `has_field`: the template writes reasoning that is kept apart.
    `is_inline`: it does not, and writes a think block in the content as it stands. `fills`: it
    leaves the empty block after its `lead` to us.
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
        """Judge a template by a question: alone, as a prompt, and `written` with an answer."""
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
        """Whether reasoning that a row keeps apart can be written."""
        return self.has_field or self.is_inline

    @property
    def is_closed(self) -> bool:
        """Whether the generation prompt ends the thinking, which it may have begun."""
        return _CLOSE in self.prompt_tail

    def block(self, reasoning: str) -> str:
        """A think block in the spaces of the generation prompt."""
        if self.is_closed and not reasoning:
            return self.lead
        opening = self.lead if self.lead and not self.is_closed else f"{_OPEN}\n"
        closing = f"\n{_CLOSE}\n\n" if "\n" in opening else _CLOSE
        return opening + reasoning.strip("\n") + closing


def written_inline(message: Message, style: ThinkStyle) -> Message | None:
    """Return an answer with its think block in the content; None where it stays as it is."""
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
