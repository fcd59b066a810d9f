"""The content of a message as a list of parts -> its text, its reasoning and its tool calls.

Three formats are read: {type: text, text} of OpenAI and transformers, {type: thinking, thinking}
and {type: tool_use, name, input} of Anthropic, {type: text | reasoning | tool_call, value} of
LLaMA-Factory. No two of them give one type another meaning.
"""

from collections.abc import Mapping, Sequence

from roll_sft.data.rows.checks import BadRowError, is_empty, kind_of, shown, text_of
from roll_sft.data.rows.conversation import ToolCall
from roll_sft.data.rows.tool_calls import calls_in_text, read_call

# Type of a part -> field of the message, and the keys that can hold its value.
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
# The order of the fields in a message.
_ORDER = ("reasoning", "content", "tool calls")
_WEIGHTS = ("train", "training", "loss", "weight", "loss_weight", "loss_scale", "loss_mask", "mask")
_CALL_KEYS = frozenset({"id", "name", "input", "arguments", "function"})


def read_parts(
    parts: list[object], *, where: str, left_aside: set[str]
) -> tuple[str, str, tuple[ToolCall, ...]]:
    """Return the text, the reasoning and the tool calls of `parts`; texts are joined."""
    texts: dict[str, list[str]] = {what: [] for what in _ORDER}
    calls: list[ToolCall] = []
    last = _ORDER[0]
    for index, part in enumerate(parts):
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
    return "".join(texts["content"]), "".join(texts["reasoning"]), tuple(calls)


def _judged(
    part: object, *, where: str, left_aside: set[str]
) -> tuple[str, Mapping[str, object], Sequence[str]]:
    """The field of the message that a part is, its keys that are not null, and its value's keys."""
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
