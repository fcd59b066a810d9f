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

from dataclasses import dataclass, replace

from roll_sft.data.chat.render import QUESTION, Renderer
from roll_sft.data.chat.tool_rendering import probe_answer
from roll_sft.data.rows.conversation import Message

_OPEN, _CLOSE = "<think>", "</think>"
_THOUGHT = "probe reasoning"


@dataclass(frozen=True, slots=True)
class ThinkStyle:
    """How a template treats reasoning.

    `lead` is what the generation prompt writes from "<think>" on; empty if there is none.
    `has_field`: the template writes reasoning that is given in a field. `is_inline`: it does not,
    but keeps a think block in the content. `fills`: it does not close the block that its `lead`
    opens, so an empty block must be given to it.
    """

    lead: str
    is_closed: bool  # whether the generation prompt closes a think block
    has_field: bool
    is_inline: bool
    fills: bool

    @property
    def has_place(self) -> bool:
        """Whether the template writes reasoning that a row has in a field."""
        return self.has_field or self.is_inline

    def block(self, reasoning: str) -> str:
        """A think block with the spaces that the generation prompt uses."""
        if self.is_closed and not reasoning:
            return self.lead
        opening = self.lead if self.lead and not self.is_closed else f"{_OPEN}\n"
        closing = f"\n{_CLOSE}\n\n" if "\n" in opening else _CLOSE
        return opening + reasoning.strip("\n") + closing


def think_style(renderer: Renderer) -> ThinkStyle:
    """The style of a template, from a question alone, with the generation prompt, and answered."""
    tail, prompt = renderer.prompt_tail, renderer.question_and_prompt[1]
    plain = Message("assistant", "answer")
    style = ThinkStyle(
        lead=tail[tail.rfind(_OPEN) :] if _OPEN in tail else "",
        is_closed=_CLOSE in tail,
        has_field=_THOUGHT in probe_answer(renderer, replace(plain, reasoning=_THOUGHT)),
        is_inline=False,
        fills=False,
    )

    def written(before: str) -> str:
        content = before + plain.content
        return renderer.text_of([QUESTION, *renderer.turns([replace(plain, content=content)])])

    thought, filled = style.block(_THOUGHT), written(style.block(""))
    has_lead = bool(style.lead)
    return replace(
        style,
        is_inline=not (style.has_field or style.is_closed)
        and (has_lead or _CLOSE in renderer.template)
        and thought in written(thought),
        fills=has_lead
        and not written("").startswith(prompt)
        and filled.startswith(prompt)
        and plain.content in filled,
    )


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


def closed_to(message: Message, style: ThinkStyle, *, index: int) -> str:
    """Why no form of an answer goes on from the think block of the generation prompt."""
    what = "with" if message.reasoning or _CLOSE in message.content else "without"
    return (
        f"the generation prompt of the chat template ends in {style.lead!r}, and the template does "
        f"not write message {index}, an answer {what} reasoning, as going on from there"
    )
