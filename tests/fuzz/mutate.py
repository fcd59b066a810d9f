"""Seeded damage: odd texts and values, changed JSON, changed bytes."""

import random
from collections.abc import Iterator
from typing import Any

LONG = 5_000
_DEEPEST = 8  # where a change is made

# As they may stand in a file; halves of surrogate pairs come from JSON's escapes alone.
ODD_TEXTS = (
    "", " ", "\n", "\t", "\r\n", "\x00", "a\x00b", "\x1b[31mred\x1b[0m", "\x9b31m", "\x07\x08",
    "\u202egnp.exe", "\u2028", "\u2029", "\ufeff", "\u00a0", "\u200b", "\u200d", "\ufffd", "\ufdd0",
    "\ue000", "\U0010ffff", "\U0001f469\u200d\U0001f467", "e\u0301\u0302\u0303",
    "\u0645\u0631\u062d",
    "\u4f60\u597d", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "a <|im_end|> b", "{{ x }}",
    "{% raw %}", "${run_name}", "%s %d", "../../etc/passwd", "/dev/null", "NaN", "null", "true",
    "0", "1e999", "[]", "{}", '"', "'", "\\", "\\n", "word " * (LONG // 5), "\n\n\n start",
    "end \n\n",
    "\ud800", "ok \udfff",
)  # fmt: skip
ODD_NUMBERS = (
    0, 1, -1, 2, 7, 255, 2**31, 2**32, 2**53 + 1, 2**63, -(2**63) - 1, 10**30, 10**400, 0.0, -0.0,
    0.5, 1.5, -1e-9, 1e-320, 1e30, 1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip


def odd_value(rng: random.Random) -> Any:
    """A value that hardly anything expects."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(ODD_TEXTS)
    if kind == 1:
        return rng.choice(ODD_NUMBERS)
    if kind == 2:
        return rng.choice((None, True, False))
    if kind == 3:
        return rng.choice(([], {}, [[]], [None], {"": 0}, {"a": {"b": [1, "x"]}}, ["x", 1], [{}]))
    if kind == 4:
        return nested(rng.choice((3, 40, 900)), as_list=rng.random() < 0.5)
    return [odd_value(rng) for _ in range(rng.randrange(3))]


def brief(value: Any) -> str:
    """What `value` looks like, in few characters."""
    try:
        return f"{value!r:.80}"
    except (RecursionError, ValueError):  # thousands of levels, or of digits
        return f"a {type(value).__name__} that cannot be shown"


def nested(depth: int, *, as_list: bool) -> Any:
    """A value of `depth` levels."""
    value: Any = 0
    for _ in range(depth):
        value = [value] if as_list else {"a": value}
    return value


def changed(rng: random.Random, value: Any) -> tuple[Any, str]:
    """A copy of the JSON value `value` with one change, and what it is."""
    places = list(_places(value))
    if not places:
        odd = odd_value(rng)
        return odd, f"all = {brief(odd)}"
    path = rng.choice(places)
    how = rng.choice(("replace", "replace", "replace", "delete", "rename", "add", "wrap", "double"))
    return _with(value, path, how, rng), f"{how} {'.'.join(map(str, path))}"


def _places(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if len(prefix) == _DEEPEST:
        return
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, each in items:
        yield (*prefix, key)
        yield from _places(each, (*prefix, key))


def _with(value: Any, path: tuple[Any, ...], how: str, rng: random.Random) -> Any:
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    key, rest = path[0], path[1:]
    if rest:
        copy[key] = _with(copy[key], rest, how, rng)
    elif how == "delete":
        del copy[key]
    elif how == "rename" and isinstance(copy, dict):
        copy[rng.choice(ODD_TEXTS) if rng.random() < 0.5 else f"{key}_"] = copy.pop(key)
    elif how == "add" and isinstance(copy, dict):
        copy[rng.choice(("x", "id", *ODD_TEXTS))] = odd_value(rng)
    elif how == "wrap":
        copy[key] = rng.choice(([copy[key]], {"value": copy[key]}, [copy[key], copy[key]]))
    elif how == "double" and isinstance(copy, list):
        copy.insert(key, copy[key])
    else:
        copy[key] = odd_value(rng)
    return copy


def damaged(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """`data` with some bytes changed, lost or added, and how; it differs from `data`."""
    if not data:
        return b"\x00", "one byte in an empty file"
    at = rng.randrange(len(data))
    length = min(rng.choice((1, 1, 2, 7, 64, 1000)), len(data) - at)
    how = rng.choice(("flip", "flip", "flip", "cut", "lose", "double", "zero", "noise", "append"))
    if how == "flip":
        bit = 1 << rng.randrange(8)
        new = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
    elif how == "cut":
        new = data[:at]
    elif how == "lose":
        new = data[:at] + data[at + length :]
    elif how == "double":
        new = data[:at] + data[at : at + length] * 2 + data[at + length :]
    elif how == "zero":
        new = data[:at] + bytes(length) + data[at + length :]
    elif how == "noise":
        new = data[:at] + rng.randbytes(length) + data[at + length :]
    else:
        new = data + rng.choice((b"\x00", b"\n", b"}", b"{", rng.randbytes(20), data))
    if new == data:
        new = data + b"\x00"
    return new, f"{how} {length} at {at} of {len(data)}"
