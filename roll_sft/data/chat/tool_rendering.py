"""Tools and their calls in a chat template: how they are given to it, and whether it writes them.

Tool arguments are given as an object or as its JSON text, whichever the template writes as JSON.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from roll_sft.data.chat.render import QUESTION, Renderer
from roll_sft.data.chat.sample import UnusableRow, quoted
from roll_sft.data.chat.turns import forms
from roll_sft.data.rows.conversation import Message, ToolCall

_CALL = ToolCall("probe_tool", {"probe_key": "probe_value"}, id="probe1234")
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {}},
    },
}


def call_turn(call: ToolCall, *, as_text: bool) -> dict[str, Any]:
    """A call as the dict that templates read."""
    arguments = dict(call.arguments)
    given = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
    told = {"id": call.id} if call.id else {}
    return {"type": "function", **told, "function": {"name": call.name, "arguments": given}}


def argument_form(renderer: Renderer) -> str | None:
    """The form in which tool arguments come out as JSON: "object", "text", or neither."""
    name, value = "probe_key", "probe_value"
    for form in ("object", "text"):
        call = call_turn(_CALL, as_text=form == "text")
        text = _probe(renderer, {"role": "assistant", "content": "", "tool_calls": [call]})
        # Python's quotes, or a JSON text inside a JSON text, show that the other form is meant.
        is_bent = f"'{name}'" in text or f'\\"{name}\\"' in text
        if _CALL.name in text and name in text and value in text and not is_bent:
            return form
    return None


def probe_answer(renderer: Renderer, answer: Message) -> str:
    """The text of a question and `answer`, without tools and with one; empty if refused."""
    return _probe(renderer, *renderer.turns([answer]))


def _probe(renderer: Renderer, answer: dict[str, Any]) -> str:
    return "".join(renderer.text_of([QUESTION, answer], tools=tools) for tools in ((), (_TOOL,)))


def check_calls(message: Message, *, index: int, text: str) -> None:
    """Raise `UnusableRow` if `text` lacks a part of a call of message `index`."""
    for call in message.tool_calls:
        for part in (call.name, *_texts(call.arguments)):
            if not any(form in text for form in forms(part)):
                raise UnusableRow(
                    f"the chat template drops {quoted(part)} of the tool call {call.name!r} in "
                    f"message {index}",
                    is_of_template=True,
                )


def check_tools(tools: Sequence[Mapping[str, Any]], *, text: str) -> None:
    """Raise `UnusableRow` if `text` lacks one of the tools that a row offers."""
    for tool in tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and not any(form in text for form in forms(name)):
            raise UnusableRow(
                f"the row offers the tool {name!r}, and the chat template does not write it",
                is_of_template=True,
            )


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (str(key) for key in value)
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
