"""The columns of a row that set variables of the chat template."""

from collections.abc import Mapping
from typing import Any

from roll_sft.data.rows.checks import BadRowError, kind_of
from roll_sft.data.rows.columns import ENABLE_THINKING, TEMPLATE_KWARGS
from roll_sft.data.rows.json_values import check_json, parsed_json

# Set by the rendering itself, or by a column of their own.
_NO_VARIABLES = ("messages", "tools", "add_generation_prompt", "continue_final_message")
_KWARGS, _THINKING = f"column '{TEMPLATE_KWARGS}'", f"column '{ENABLE_THINKING}'"


def read_template_kwargs(columns: Mapping[str, object]) -> Mapping[str, Any]:
    """Return name -> value; raise `BadRowError` for what is no object of variables."""
    given = columns.get(TEMPLATE_KWARGS)
    if isinstance(given, str):
        given = parsed_json(given, where=_KWARGS) if given.strip() else None
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise BadRowError(f"{_KWARGS} is {kind_of(given)}; it must be an object of variables")
    for name in _NO_VARIABLES:
        if name in given:
            raise BadRowError(f"{_KWARGS} sets '{name}', which is no variable of a row; remove it")
    check_json(given, where=_KWARGS)
    thinks = columns.get(ENABLE_THINKING)
    if thinks is None:
        return given
    if not isinstance(thinks, bool):
        raise BadRowError(f"{_THINKING} is {kind_of(thinks)}; it must be true or false")
    if given.get(ENABLE_THINKING, thinks) is not thinks:
        raise BadRowError(f"{_KWARGS} and {_THINKING} differ; keep one of them")
    return {**given, ENABLE_THINKING: thinks}
