"""JSON inside of a row: texts that hold a value, and values that are written as JSON again."""

import json
from collections.abc import Mapping
from typing import Any

from roll_sft.data.rows.checks import BadRowError, kind_of, shown, text_of

# Deeper than any schema of a tool, and shallow enough for a template to walk through.
_MAX_DEPTH = 100
_NO_NUMBERS = ("NaN", "Infinity")


def parsed_json(text: str, *, where: str) -> Any:
    """Return the JSON value that `text` holds; raise `BadRowError` if it holds none."""
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, where=where))
    except json.JSONDecodeError as error:
        raise BadRowError(
            f"{where} is no JSON: {error.msg} at character {error.pos + 1}; correct it"
        ) from None
    except RecursionError:
        raise BadRowError(f"{where} is nested too deep to be read as JSON; flatten it") from None
    except ValueError as error:
        raise BadRowError(f"{where} holds JSON that cannot be read: {error}") from None


def _unique(pairs: list[tuple[str, Any]], *, where: str) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        check_unique([name for name, _ in pairs], where=where)
    return values


def check_unique(names: list[str], *, where: str) -> None:
    """Raise `BadRowError` if a name comes twice: of two values, one would be lost."""
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise BadRowError(f"{where} has the key '{shown(repeated)}' twice; keep one of them")


def check_json(value: object, *, where: str, depth: int = 0) -> None:
    """Raise `BadRowError` if `value`, a parsed one, cannot be written as JSON again, as text."""
    if depth > _MAX_DEPTH:
        raise BadRowError(f"a value is nested more than {_MAX_DEPTH} levels deep; flatten it")
    if isinstance(value, str):
        text_of(value, where=where)
    elif isinstance(value, Mapping):
        for name, content in value.items():
            check_json(name, where=f"a name in {where}")
            check_json(content, where=f"{where}.{name}", depth=depth + 1)
    elif isinstance(value, list):
        for index, content in enumerate(value):
            check_json(content, where=f"{where}[{index}]", depth=depth + 1)
    elif not (value is None or isinstance(value, int | float)) or kind_of(value) in _NO_NUMBERS:
        raise BadRowError(f"{where} is {kind_of(value)}, which JSON cannot hold; replace it")
