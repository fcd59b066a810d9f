"""Checks of single values of a row, and their names in messages.

`BadRowError` and `NoAnswerError` refuse a row; they never leave `roll_sft.data`.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

_SURROGATE = re.compile("[\ud800-\udfff]")
_NAMES_SHOWN = 12
_NAME_LENGTH_SHOWN = 60


class BadRowError(Exception):
    """The row cannot be used: the reason, to which the reader of the file adds the place."""


class NoAnswerError(BadRowError):
    """The row is well formed and has no answer to train on."""


@dataclass(frozen=True, slots=True)
class NoJson:
    """Stands for a value of a table that JSON has no form for, or that was not read: its type."""

    kind: str


def text_of(value: object, *, where: str) -> str:
    """Return `value` if it is text that a tokenizer can read; raise `BadRowError` if not."""
    if not isinstance(value, str):
        raise BadRowError(f"{where} is {kind_of(value)}; it must be a string")
    # JSON can escape one half of a surrogate pair: Python accepts it, no tokenizer can.
    if not value.isascii() and (lone := _SURROGATE.search(value)):
        raise BadRowError(
            f"{where} holds the lone surrogate \\u{ord(lone.group()):04x} at character "
            f"{lone.start() + 1}, which is no text; remove it"
        )
    return value


def is_empty(value: object) -> bool:
    """Whether a key with this value says nothing."""
    return value is None or value in ("", [], {})


def kind_of(value: object) -> str:
    """What `value` is called in a message."""
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    if isinstance(value, NoJson):
        return f"a value of type {value.kind}"
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        return "Infinity" if math.isinf(value) else "a number"
    return names.get(type(value), f"a value of type {type(value).__name__}")


def listed(names: Iterable[str]) -> str:
    """The names in order, cut short where they are many or long."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMES_SHOWN} more" if len(ordered) > _NAMES_SHOWN else ""
    return (", ".join(map(shown, ordered[:_NAMES_SHOWN])) or "none") + more


def shown(text: str, *, length: int = _NAME_LENGTH_SHOWN) -> str:
    """Text of a file as a message may hold it: cut short, and without what a terminal obeys."""
    cut = text if len(text) <= length else f"{text[: length - 3]}..."
    if cut.isprintable():
        return cut
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in cut)
