"""Tool calls of a message -> `ToolCall`; tools of a row -> JSON schemas, as given.

The other keys of a call are judged like those of a message: refused if the call would lose a value
that matters, else left aside.
"""

from collections.abc import Mapping
from typing import Any

from roll_sft.data.rows.checks import (
    BadRowError,
    is_empty,
    kind_of,
    listed,
    text_of,
)
from roll_sft.data.rows.conversation import ToolCall
from roll_sft.data.rows.json_values import check_json, parsed_json

_CALL_KEYS = frozenset({"id", "type", "function", "index", "name", "arguments"})
# What a call was answered with is a message of its own.
_RESULTS = ("result", "output", "response")


def read_tools(value: object, *, where: str) -> tuple[Mapping[str, Any], ...]:
    """Return the tools of a list, or of the JSON text of one; each is an object, or its JSON."""
    tools = value
    if isinstance(tools, str):
        tools = parsed_json(tools, where=where) if tools.strip() else None
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise BadRowError(f"{where} is {kind_of(tools)}; it must be a list of tools, or its JSON")
    read = []
    for index, given in enumerate(tools):
        at = f"{where}[{index}]"
        tool = parsed_json(given, where=at) if isinstance(given, str) else given
        if not isinstance(tool, dict):
            raise BadRowError(f"{at} is {kind_of(tool)}; each tool must be an object")
        read.append(tool)
    check_json(read, where=where)
    return tuple(read)


def read_calls(
    fields: Mapping[str, object], *, where: str, left_aside: set[str]
) -> tuple[ToolCall, ...]:
    """Return the calls of a message: its `tool_calls`, or its `function_call`."""
    calls = fields.get("tool_calls") or []
    if isinstance(calls, str):
        calls = parsed_json(calls, where=f"{where}.tool_calls") or []
    if not isinstance(calls, list):
        raise BadRowError(f"{where}.tool_calls is {kind_of(calls)}; it must be a list of calls")
    read = [
        read_call(call, where=f"{where}.tool_calls[{at}]", left_aside=left_aside)
        for at, call in enumerate(calls)
    ]
    legacy = fields.get("function_call")  # one call, in OpenAI's form before tool_calls
    if legacy:
        if read:
            raise BadRowError(f"{where} has both tool_calls and function_call; keep one of them")
        read.append(read_call(legacy, where=f"{where}.function_call", left_aside=left_aside))
    return tuple(read)


def calls_in_text(value: object, *, where: str, left_aside: set[str]) -> tuple[ToolCall, ...]:
    """Return the call, or the calls, that `value` or its JSON text is."""
    parsed = parsed_json(value, where=where) if isinstance(value, str) else value
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls:
        raise BadRowError(f"{where} calls nothing; give one call or a list of calls")
    return tuple(
        read_call(
            call,
            where=f"{where}[{at}]" if isinstance(parsed, list) else where,
            left_aside=left_aside,
        )
        for at, call in enumerate(calls)
    )


def read_call(call: object, *, where: str, left_aside: set[str]) -> ToolCall:
    """Read {name, arguments}, or that under `function` with a type and an id beside it."""
    if not isinstance(call, dict):
        raise BadRowError(f"{where} is {kind_of(call)}; a call must be {{name, arguments}}")
    kind = call.get("type") or "function"
    if kind != "function":
        raise BadRowError(f"{where} has type {kind!r}; only calls of type 'function' are accepted")
    inner = call.get("function") or call
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise BadRowError(f"{where} has no name; a call must be {{name, arguments}}")
    _check_keys(call, inner, where=where, left_aside=left_aside)
    arguments = inner.get("arguments")
    at = f"{where}.arguments"
    if isinstance(arguments, str):
        arguments = parsed_json(arguments, where=at) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise BadRowError(f"{at} is {kind_of(arguments)}; they must be an object, or its JSON")
    check_json(arguments, where=at)
    name = text_of(inner["name"], where=f"{where}.name")
    return ToolCall(name, arguments, id=text_of(call.get("id") or "", where=f"{where}.id"))


def _check_keys(
    call: Mapping[str, Any], inner: Mapping[str, Any], *, where: str, left_aside: set[str]
) -> None:
    """Raise `BadRowError` for keys that would be lost; note those that only describe the call."""
    for name in ("name", "arguments"):
        beside = call.get(name)
        if inner is not call and beside is not None and beside != inner.get(name):
            raise BadRowError(
                f"{where} has {name} beside its function; write it inside the function"
            )
    others = {
        name
        for each in (call, inner)
        for name in each.keys() - _CALL_KEYS
        if not is_empty(each[name])
    }
    if inner.get("arguments") is None and others:
        raise BadRowError(f"{where} has {listed(others)} and no arguments; name them arguments")
    if lost := others.intersection(_RESULTS):
        raise BadRowError(
            f"{where} has '{lost.pop()}', which would be lost; write it as a message of role tool"
        )
    left_aside.update(f"tool_calls[].{name}" for name in others)
