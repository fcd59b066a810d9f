"""An entry of a list of messages that holds more than a role and a text -> `Message`.

A key that changes what is trained, and that `Message` has no field for, is refused by name. A key
that only describes the entry (an id, a time) is left aside, and its name is noted.
"""

from collections.abc import Mapping

from roll_sft.data.rows.checks import BadRowError, is_empty, kind_of, listed, text_of
from roll_sft.data.rows.conversation import Message, ToolCall

_REASONING = ("reasoning_content", "reasoning", "thinking")
# Whether a message is trained on, in various data formats; `masked` is the opposite.
_BOOLEANS = ("train", "training", "loss", "masked")
_NUMBERS = ("weight", "loss_weight", "loss_scale", "loss_mask")
_MEDIA = "only text can be trained on"
_THOUGHT = "write it as reasoning_content"
_CALLS = "write calls as tool_calls, and each answer as a message of role tool"
_TOOLS = "write the tools as a column of the row"
_HARMONY = "write thoughts as reasoning_content, and calls as tool_calls"
_ONE_ANSWER = "one answer is trained on: write it as content"
# Key that changes what is trained -> what to write instead.
_REFUSED = {
    "mask": "data formats read it in opposite ways: write train, true or false",
    "train_detail": "write whole messages, with train true or false",
    "refusal": "write it as content",
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _MEDIA),
    **dict.fromkeys(("files", "attachments"), _MEDIA),
    **dict.fromkeys(("thought", "thoughts", "think"), _THOUGHT),
    **dict.fromkeys(("function_calls", "tool_call"), _CALLS),
    **dict.fromkeys(("tool_responses", "tool_results", "tool_outputs"), _CALLS),
    **dict.fromkeys(("tools", "functions"), _TOOLS),
    **dict.fromkeys(("channel", "recipient"), _HARMONY),
    **dict.fromkeys(("chosen", "rejected", "rejected_response"), _ONE_ANSWER),
}
# By the key that holds the text.
_SPELLINGS = {"content": {"role", "content"}, "value": {"from", "value"}}
_READ = frozenset(
    {"name", "tool_call_id", "tool_calls", "function_call", *_REASONING, *_BOOLEANS, *_NUMBERS}
)


def read_fields(
    entry: Mapping[str, object],
    speaker: str,
    role: str,
    *,
    text_field: str,
    where: str,
    left_aside: set[str],
) -> Message:
    """Return the message of `entry`, which `speaker` of that `role` says in `text_field`.

    Raises `BadRowError` for an entry that cannot be used. The names of keys that are left aside go
    into `left_aside`.
    """
    fields = {name: value for name, value in entry.items() if value is not None}
    others = fields.keys() - _READ - _SPELLINGS[text_field]
    if others:
        left_aside |= _describing(others, fields, where=where)
    text, thought, calls = _content(fields, text_field, speaker, where=where, left_aside=left_aside)
    if text_field not in fields and not calls:
        given = f"null {text_field}" if text_field in entry else f"no {text_field}"
        raise BadRowError(f"{where} has {given} (fields found: {listed(entry)})")
    reasoning = _reasoning(fields, thought, where=where)
    if role != "assistant" and (calls or reasoning):
        what = "calls tools" if calls else "has reasoning"
        raise BadRowError(f"{where} ({role}) {what}; only an assistant message can; correct it")
    return Message(
        role,
        text,
        reasoning=reasoning,
        tool_calls=calls,
        name=_optional_text(fields, "name", where=where),
        tool_call_id=_optional_text(fields, "tool_call_id", where=where),
        train=_is_trained(fields, role=role, where=where),
    )


def _content(
    fields: Mapping[str, object],
    text_field: str,
    speaker: str,
    *,
    where: str,
    left_aside: set[str],
) -> tuple[str, str, tuple[ToolCall, ...]]:
    """The text, the reasoning among its parts, and the tool calls of a message."""
    value, at = fields.get(text_field), f"{where}.{text_field}"
    text = thought = ""
    calls: tuple[ToolCall, ...] = ()
    if fields.get("tool_calls") or fields.get("function_call"):
        from roll_sft.data.rows.tool_calls import read_calls

        calls = read_calls(fields, where=where, left_aside=left_aside)
    if speaker == "function_call":
        from roll_sft.data.rows.tool_calls import calls_in_text

        calls += calls_in_text(value, where=at, left_aside=left_aside)
    elif isinstance(value, list):
        from roll_sft.data.rows.content_parts import read_parts

        text, thought, calls_of_parts = read_parts(value, where=at, left_aside=left_aside)
        if calls and calls_of_parts:
            raise BadRowError(
                f"{where} has calls among its parts and beside them; keep one of them"
            )
        calls += calls_of_parts
    elif value is not None:
        text = text_of(value, where=at)
    return text, thought, calls


def _describing(others: set[str], fields: Mapping[str, object], *, where: str) -> set[str]:
    """Those of `others` that only describe the message; raise `BadRowError` for the rest."""
    filled = {name for name in others if not is_empty(fields[name])}
    for name in sorted(_REFUSED.keys() & filled):
        raise BadRowError(
            f"{where} has '{name}', which would be lost; {_REFUSED[name]}, or remove it"
        )
    return filled


def _optional_text(fields: Mapping[str, object], name: str, *, where: str) -> str:
    return text_of(fields.get(name, ""), where=f"{where}.{name}")


def _reasoning(fields: Mapping[str, object], of_parts: str, *, where: str) -> str:
    found = {name: _optional_text(fields, name, where=where) for name in _REASONING}
    found["content"] = of_parts
    texts = {text: name for name, text in found.items() if text}
    if len(texts) > 1:
        names = " and ".join(f"'{name}'" for name in texts.values())
        raise BadRowError(f"{where} has {names} with different texts; keep one of them")
    return next(iter(texts), "")


def _is_trained(fields: Mapping[str, object], *, role: str, where: str) -> bool:
    asked: dict[str, bool] = {}
    for name in _BOOLEANS:
        if (flag := fields.get(name)) is not None:
            if not isinstance(flag, bool):
                raise BadRowError(f"{where}.{name} is {kind_of(flag)}; it must be true or false")
            asked[name] = flag != (name == "masked")
    for name in _NUMBERS:
        if (number := fields.get(name)) is not None:
            if isinstance(number, bool) or number not in (0, 1):
                raise BadRowError(
                    f"{where} has {name} {number!r}; a message is trained on or not: 1 or 0 are"
                    " accepted"
                )
            asked[name] = bool(number)
    if len(set(asked.values())) > 1:
        told = " and ".join(f"{name} {fields[name]}" for name in asked)
        raise BadRowError(f"{where} has {told}; keep one of them")
    if role != "assistant" and any(asked.values()):
        raise BadRowError(
            f"{where} ({role}) asks to be trained on with '{next(iter(asked))}'; only assistant "
            f"messages are, or every token with data.train_on=all; remove it"
        )
    return all(asked.values())
