"""Lists of messages, as data sets spell them -> `Message`, and tools -> JSON schemas.

Two spellings are read, told from each entry: {role, content} of OpenAI's and transformers' chats,
and {from, value} of ShareGPT's. Text is passed on as it stands. What an entry holds that would
change what is trained, and that a `Message` cannot say, is refused by name; what only describes
the entry (an id, a time) is left aside.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from roll_sft.data.conversation import ROLES, Message, ToolCall
from roll_sft.data.values import BadRowError, NoAnswerError, check_json, kind_of, listed, text_of

# What a speaker is called -> role. `function_call` is an assistant whose text is calls as JSON.
_ROLES_OF_ROLE: Mapping[str, str] = {**{role: role for role in ROLES}, "function": "tool"}
_ROLES_OF_FROM: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
# Would change what is trained; another spelling of `train` first, then what is no text.
_REFUSED = {
    "loss": "write it as train, true or false",
    "loss_mask": "write it as train, true or false",
    "train_detail": "write whole messages, with train true or false",
    "refusal": "write it as content",
    "image": "only text can be trained on",
    "images": "only text can be trained on",
    "audio": "only text can be trained on",
    "audios": "only text can be trained on",
    "video": "only text can be trained on",
    "videos": "only text can be trained on",
}


def read_messages(entries: object, *, column: str) -> tuple[Message, ...]:
    """Return the messages that `column` lists; raise `BadRowError` for what cannot be used."""
    if not isinstance(entries, list):
        raise BadRowError(
            f"column '{column}' is {kind_of(entries)}; it must be a list of {{role, content}}"
        )
    return tuple(_message(entry, where=f"{column}[{index}]") for index, entry in enumerate(entries))


def check_answer(messages: Sequence[Message], *, where: str) -> None:
    """Raise `NoAnswerError` unless an assistant says or calls something."""
    for message in messages:
        if message.role == "assistant" and (message.content.strip() or message.tool_calls):
            return
    raise NoAnswerError(
        f"{where} has no assistant message with text among its {len(messages)}; "
        f"a row needs one to train on"
    )


def with_system(messages: tuple[Message, ...], system: str, *, where: str) -> tuple[Message, ...]:
    """Put the text of a column before `messages`, unless they begin with the same."""
    if not system:
        return messages
    first = next((message for message in messages if message.role == "system"), None)
    if first is None:
        return (Message("system", system), *messages)
    if first.content != system:
        raise BadRowError(
            f"{where} and a system message of the row hold different texts; keep one of them"
        )
    return messages


def read_tools(value: object, *, where: str) -> tuple[Mapping[str, Any], ...]:
    """Return the tools of a list, or of the JSON text of one; each must be an object."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    tools = _parsed(value, where=where) if isinstance(value, str) else value
    if not isinstance(tools, list):
        raise BadRowError(f"{where} is {kind_of(tools)}; it must be a list of tools, or its JSON")
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise BadRowError(f"{where}[{index}] is {kind_of(tool)}; each tool must be an object")
    check_json(tools, where=where)
    return tuple(tools)


def _message(entry: object, *, where: str) -> Message:
    if not isinstance(entry, dict):
        raise BadRowError(f"{where} is {kind_of(entry)}; it must be an object {{role, content}}")
    fields = {name: value for name, value in entry.items() if value is not None}
    speaker, text_field, roles = "role", "content", _ROLES_OF_ROLE
    if "from" in fields and "role" not in fields:
        speaker, text_field, roles = "from", "value", _ROLES_OF_FROM
    said = fields.get(speaker)
    if not isinstance(said, str) or said not in roles:
        shown = f"{speaker} '{said}'" if isinstance(said, str) else "no role that is a string"
        raise BadRowError(f"{where} has {shown}; accepted are {', '.join(roles)}")
    _refuse_unsupported(fields, where=where)
    role, calls = roles[said], _tool_calls(fields, where=where)
    content = ""
    if said == "function_call":
        calls += _calls_in_text(fields.get(text_field), where=f"{where}.{text_field}")
    elif text_field in fields:
        content = _content(fields[text_field], where=f"{where}.{text_field}")
    elif not calls:
        given = f"null {text_field}" if text_field in entry else f"no {text_field}"
        raise BadRowError(f"{where} has {given} (fields found: {listed(entry)})")
    reasoning = _reasoning(fields, where=where)
    if role != "assistant" and (calls or reasoning):
        what = "calls tools" if calls else "has reasoning"
        raise BadRowError(f"{where} ({role}) {what}; only an assistant message can; correct it")
    return Message(
        role,
        content,
        reasoning=reasoning,
        tool_calls=calls,
        name=_optional_text(fields, "name", where=where),
        tool_call_id=_optional_text(fields, "tool_call_id", where=where),
        train=_is_trained(fields, where=where),
    )


def _refuse_unsupported(fields: Mapping[str, object], *, where: str) -> None:
    for name in sorted(_REFUSED.keys() & fields.keys()):
        if fields[name] not in ("", []):
            raise BadRowError(
                f"{where} has '{name}', which would be lost; {_REFUSED[name]}, or remove it"
            )


def _content(value: object, *, where: str) -> str:
    """The text, or the texts of a list of parts joined without anything between them."""
    if not isinstance(value, list):
        return text_of(value, where=where)
    texts = []
    for index, part in enumerate(value):
        at = f"{where}[{index}]"
        if not isinstance(part, dict):
            raise BadRowError(f"{at} is {kind_of(part)}; a part must be {{type: text, text}}")
        if part.get("type") != "text":
            raise BadRowError(f"{at} has type {part.get('type')!r}; only text can be trained on")
        texts.append(text_of(part.get("text"), where=f"{at}.text"))
    return "".join(texts)


def _optional_text(fields: Mapping[str, object], name: str, *, where: str) -> str:
    return text_of(fields.get(name, ""), where=f"{where}.{name}")


def _reasoning(fields: Mapping[str, object], *, where: str) -> str:
    found = {name: _optional_text(fields, name, where=where) for name in _REASONING}
    texts = {text: name for name, text in found.items() if text}
    if len(texts) > 1:
        names = " and ".join(f"'{name}'" for name in texts.values())
        raise BadRowError(f"{where} has {names} with different texts; keep one of them")
    return next(iter(texts), "")


def _is_trained(fields: Mapping[str, object], *, where: str) -> bool:
    train, weight = fields.get("train"), fields.get("weight")
    if train is not None and not isinstance(train, bool):
        raise BadRowError(f"{where}.train is {kind_of(train)}; it must be true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise BadRowError(
            f"{where} has weight {weight!r}; a message is trained on or not: 1 or 0 are accepted"
        )
    asked = {bool(value) for value in (train, weight) if value is not None}
    if len(asked) > 1:
        raise BadRowError(f"{where} has train {train} and weight {weight}; keep one of them")
    return asked.pop() if asked else True


def _tool_calls(fields: Mapping[str, object], *, where: str) -> tuple[ToolCall, ...]:
    calls = fields.get("tool_calls") or []
    if not isinstance(calls, list):
        raise BadRowError(f"{where}.tool_calls is {kind_of(calls)}; it must be a list of calls")
    read = [_call(call, where=f"{where}.tool_calls[{at}]") for at, call in enumerate(calls)]
    legacy = fields.get("function_call")  # one call, in OpenAI's form before tool_calls
    if legacy:
        if read:
            raise BadRowError(f"{where} has both tool_calls and function_call; keep one of them")
        read.append(_call(legacy, where=f"{where}.function_call"))
    return tuple(read)


def _calls_in_text(value: object, *, where: str) -> tuple[ToolCall, ...]:
    parsed = _parsed(value, where=where) if isinstance(value, str) else value
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls:
        raise BadRowError(f"{where} calls nothing; give one call or a list of calls")
    return tuple(
        _call(call, where=f"{where}[{at}]" if isinstance(parsed, list) else where)
        for at, call in enumerate(calls)
    )


def _call(call: object, *, where: str) -> ToolCall:
    """Read {name, arguments}, or that under `function` with a type and an id beside it."""
    if not isinstance(call, dict):
        raise BadRowError(f"{where} is {kind_of(call)}; a call must be {{name, arguments}}")
    kind = call.get("type") or "function"
    if kind != "function":
        raise BadRowError(f"{where} has type {kind!r}; only calls of type 'function' are accepted")
    inner = call.get("function") or call
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise BadRowError(f"{where} has no name; a call must be {{name, arguments}}")
    arguments = inner.get("arguments")
    at = f"{where}.arguments"
    if isinstance(arguments, str):
        arguments = _parsed(arguments, where=at) if arguments.strip() else {}
    if arguments is None and "parameters" in inner:
        raise BadRowError(f"{where} has parameters and no arguments; name them arguments")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise BadRowError(f"{at} is {kind_of(arguments)}; they must be an object, or its JSON")
    check_json(arguments, where=at)
    name = text_of(inner["name"], where=f"{where}.name")
    return ToolCall(name, arguments, id=_optional_text(call, "id", where=where))


def _parsed(text: str, *, where: str) -> Any:
    """The JSON value that `text` holds."""
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, where=where))
    except json.JSONDecodeError as error:
        raise BadRowError(
            f"{where} is no JSON: {error.msg} at character {error.pos + 1}; correct it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{where} holds JSON that cannot be read: {error}") from None


def _unique(pairs: list[tuple[str, Any]], *, where: str) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise BadRowError(f"{where} has the key '{repeated}' twice; keep one of them")
    return values
