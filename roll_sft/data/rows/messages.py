"""A list of messages in a row -> `Message`.

Two formats of an entry are read: {role, content} of OpenAI and transformers, and {from, value} of
ShareGPT. Text is passed on as it stands. An entry with other keys is read by `message_fields`.
"""

from collections.abc import Mapping, Sequence

from roll_sft.data.rows.checks import (
    BadRowError,
    NoAnswerError,
    kind_of,
    shown,
    text_of,
)
from roll_sft.data.rows.conversation import ROLES, Message

# Name of a speaker -> role. `function_call` is an assistant whose text is calls as JSON.
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


def read_messages(entries: object, *, column: str, left_aside: set[str]) -> tuple[Message, ...]:
    """Return the messages that `column` lists; raise `BadRowError` for what cannot be used.

    The names of keys that are left aside go into `left_aside`, as `messages[].id`.
    """
    if not isinstance(entries, list):
        raise BadRowError(
            f"column '{column}' is {kind_of(entries)}; it must be a list of {{role, content}}"
        )
    keys: set[str] = set()
    messages = tuple(
        _message(entry, where=f"{column}[{index}]", left_aside=keys)
        for index, entry in enumerate(entries)
    )
    if keys:
        left_aside.update(f"{column}[].{key}" for key in keys)
    return messages


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
    """Put a system message before `messages`, unless they have one with the same text."""
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


def _message(entry: object, *, where: str, left_aside: set[str]) -> Message:
    if not isinstance(entry, dict):
        raise BadRowError(f"{where} is {kind_of(entry)}; it must be an object {{role, content}}")
    fields = {name: value for name, value in entry.items() if value is not None}
    speaker, role, text_field = _speaker(fields, where=where)
    if len(fields) == 2 and speaker != "function_call" and isinstance(fields.get(text_field), str):
        return Message(role, text_of(fields[text_field], where=f"{where}.{text_field}"))
    from roll_sft.data.rows.message_fields import read_fields

    return read_fields(
        entry, speaker, role, text_field=text_field, where=where, left_aside=left_aside
    )


def _speaker(fields: Mapping[str, object], *, where: str) -> tuple[str, str, str]:
    """The name of the speaker, its role, and the key that holds the text."""
    speaker, text_field, roles = "role", "content", _ROLES_OF_ROLE
    if "from" in fields and "role" not in fields:
        speaker, text_field, roles = "from", "value", _ROLES_OF_FROM
    said = fields.get(speaker)
    if not isinstance(said, str) or said not in roles:
        given = f"{speaker} '{shown(said)}'" if isinstance(said, str) else f"no {speaker} as text"
        raise BadRowError(f"{where} has {given}; accepted are {', '.join(roles)}")
    return said, roles[said], text_field
