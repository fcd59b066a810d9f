"""The content of a message as a list of parts -> its text, its reasoning and its calls.

Three vocabularies are read, which do not contradict each other: {type: text, text} of OpenAI and
transformers, {type: thinking, thinking} and {type: tool_use, name, input} of Anthropic, and
{type: text | reasoning | tool_call, value} of LLaMA-Factory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from roll_sft.data.rows.conversation import ToolCall
from roll_sft.data.rows.tool_calls import calls_in_text, read_call
from roll_sft.data.rows.values import BadRowError, is_empty, kind_of, shown, text_of

# Type of a part -> what it is of a message, and the keys that can hold it.
_TEXT = ("text", "value")
_THOUGHT = ("thinking", "reasoning", "value", "text")
_TYPES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "text": ("content", _TEXT),
    "input_text": ("content", _TEXT),
    "output_text": ("content", _TEXT),
    "reasoning": ("reasoning", _THOUGHT),
    "thinking": ("reasoning", _THOUGHT),
    "tool_call": ("tool calls", ("value", "tool_call", "function")),
    "tool_use": ("tool calls", ("name",)),
}
# The order in which a message holds what its parts say.
_ORDER = ("reasoning", "content", "tool calls")
_WEIGHTS = ("train", "training", "loss", "weight", "loss_weight", "loss_scale", "loss_mask", "mask")
_CALL_KEYS = frozenset({"id", "name", "input", "arguments", "function"})


@dataclass(frozen=True, slots=True)
class Content:
    """What the content of a message says."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


def read_content(value: object, *, where: str, left_aside: set[str]) -> Content:
    """Return the text, or what a list of parts says, joined without anything between them."""
    if not isinstance(value, list):
        return Content(text_of(value, where=where))
    texts: dict[str, list[str]] = {what: [] for what in _ORDER}
    calls: list[ToolCall] = []
    last = _ORDER[0]
    for index, part in enumerate(value):
        at = f"{where}[{index}]"
        what, fields, keys = _judged(part, where=at, left_aside=left_aside)
        if what == "tool calls":
            calls += _calls(fields, where=at, left_aside=left_aside)
        else:
            text = _text(fields, keys, where=at)
            texts[what].append(text)
            if not text:
                continue
        if _ORDER.index(what) < _ORDER.index(last):
            raise BadRowError(f"{at} is {what} after {last}; write {', then '.join(_ORDER)}")
        last = what
    return Content("".join(texts["content"]), "".join(texts["reasoning"]), tuple(calls))


def _judged(
    part: object, *, where: str, left_aside: set[str]
) -> tuple[str, Mapping[str, object], Sequence[str]]:
    """What a part is of the message, its fields that are not null, and which may hold it."""
    if not isinstance(part, dict):
        raise BadRowError(f"{where} is {kind_of(part)}; a part must be {{type: text, text}}")
    fields = {name: each for name, each in part.items() if each is not None}
    kind = fields.get("type")
    if not isinstance(kind, str) or kind not in _TYPES:
        described = repr(shown(kind)) if isinstance(kind, str) else kind_of(kind)
        raise BadRowError(f"{where} has type {described}; only text can be trained on")
    what, keys = _TYPES[kind]
    for name in _WEIGHTS:
        if fields.get(name, 1) not in (True, 1):
            raise BadRowError(
                f"{where} has '{name}', which would be lost; a message is trained on as a whole or"
                " not: write train, true or false, beside its role"
            )
    known = {"type", *keys, *_WEIGHTS} | (_CALL_KEYS if what == "tool calls" else set())
    others = (name for name in fields.keys() - known if not is_empty(fields[name]))
    left_aside.update(f"content[].{name}" for name in others)
    return what, fields, keys


def _text(fields: Mapping[str, object], keys: Sequence[str], *, where: str) -> str:
    found = [name for name in keys if name in fields]
    if not found:
        raise BadRowError(f"{where}.{keys[0]} is null; it must be a string")
    if any(fields[name] != fields[found[0]] for name in found):
        raise BadRowError(f"{where} has different {' and '.join(found)}; keep one of them")
    return text_of(fields[found[0]], where=f"{where}.{found[0]}")


def _calls(
    fields: Mapping[str, object], *, where: str, left_aside: set[str]
) -> tuple[ToolCall, ...]:
    for name in ("value", "tool_call"):
        if name in fields:
            return calls_in_text(fields[name], where=f"{where}.{name}", left_aside=left_aside)
    call = {name: each for name, each in fields.items() if name in _CALL_KEYS}
    if fields["type"] == "tool_use":
        call["arguments"] = call.pop("input", None)
    return (read_call(call, where=where, left_aside=left_aside),)
