"""Judging the values of a row: what they are called, and whether they are text.

Raises the three ways in which a row can be refused; they never leave `roll_sft.data`.
"""

import math
import re
from collections.abc import Mapping, Sequence

_SURROGATE = re.compile("[\ud800-\udfff]")
_NAMES_SHOWN = 12


class BadRowError(Exception):
    """Carries the reason from where a row is judged to where it is numbered."""


class NoAnswerError(BadRowError):
    """The row is well formed and holds nothing to learn."""


class UnusableFileError(Exception):
    """Carries what is wrong with the whole file from the row that shows it."""


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


def check_json(value: object, *, where: str) -> None:
    """Raise `BadRowError` if `value`, a parsed one, cannot be written as JSON again, as text."""
    if isinstance(value, str):
        text_of(value, where=where)
    elif isinstance(value, Mapping):
        for name, content in value.items():
            check_json(name, where=f"a name in {where}")
            check_json(content, where=f"{where}.{name}")
    elif isinstance(value, list):
        for index, content in enumerate(value):
            check_json(content, where=f"{where}[{index}]")
    elif not (value is None or isinstance(value, int | float)) or kind_of(value) in _NO_NUMBERS:
        raise BadRowError(f"{where} is {kind_of(value)}, which JSON cannot hold; replace it")


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
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        return "Infinity" if math.isinf(value) else "a number"
    return names.get(type(value), f"a value of type {type(value).__name__}")


_NO_NUMBERS = ("NaN", "Infinity")


def listed(names: Mapping[str, object] | Sequence[str]) -> str:
    """The names in order, cut short where they are many."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMES_SHOWN} more" if len(ordered) > _NAMES_SHOWN else ""
    return (", ".join(ordered[:_NAMES_SHOWN]) or "none") + more
