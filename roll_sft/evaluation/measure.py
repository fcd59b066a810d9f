"""A metric is called, and what it returns is checked. What goes wrong costs that metric alone."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from roll_sft.base.errors import first_line
from roll_sft.base.text import shown


class Attempt:
    """A block with code of others in it, whose error is kept and not raised."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


def measured(
    function: Callable[..., Any], num_prompts: int, **texts: Any
) -> tuple[dict[str, Any], str | None]:
    """What `function(**texts)` returns: a number or a list of `num_prompts` under each name.

    And what is wrong, in a line, with the call or with a value that is left out; None if nothing.
    """
    found, problems = dict[str, Any](), list[str]()
    with Attempt() as attempt:
        returned = function(**texts)
        if not isinstance(returned, Mapping):
            raise TypeError(f"returns {shown(returned)}, and not a mapping of names to numbers")
        for name, value in returned.items():
            with Attempt() as single:
                found[str(name)] = _numbers(value, num_prompts)
            if single.error is not None:
                problems.append(f"{name}: {first_line(single.error)}")
    if attempt.error is not None:
        problems.append(f"{type(attempt.error).__name__}: {first_line(attempt.error)}")
    return found, "; ".join(problems) or None


def _numbers(value: Any, num_prompts: int) -> float | list[float | None]:
    """A number, or a list, an array or a tensor of them, as plain values."""
    if hasattr(value, "tolist"):  # of numpy and torch
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return float(value)
    if len(value) != num_prompts:
        raise ValueError(f"{len(value)} values for {num_prompts} prompts")
    return [None if each is None else float(each) for each in value]
