"""Records what would make the host wait for a GPU, and where the code asks for it.

A wait is named after the innermost function of the project or of Megatron-Core that causes it, in
the backward as in the forward.
"""

import functools
import sys
import traceback
from dataclasses import dataclass
from types import FrameType

OWNERS = ("/roll_sft/", "/megatron/core/")


@dataclass(frozen=True, slots=True)
class Wait:
    """One call that waits for the device."""

    what: str  # such as item, synchronize or copy
    place: str  # file and function, such as roll_sft/engine/engine.py:read


class Waits(list[Wait]):
    """The waits so far, in order."""

    def add(self, what: str) -> None:
        """Record a wait that the calling code causes."""
        self.append(Wait(what, caller()))


def caller() -> str:
    """File and function of the innermost frame that is the project's or Megatron-Core's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if owner := _owner(frame.f_code.co_filename):
            return f"{owner}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "unknown"


def raiser(error: BaseException) -> str:
    """File, line and function of the innermost such frame that `error` went through."""
    found = "unknown"
    for frame in traceback.extract_tb(error.__traceback__):
        if owner := _owner(frame.filename):
            found = f"{owner}:{frame.lineno}:{frame.name}"
    return found


@functools.cache
def _owner(file: str) -> str | None:
    """`file` from the package's folder on, if it is of a package that is looked at."""
    for folder in OWNERS:
        _, found, rest = file.rpartition(folder)
        if found and "site-packages" not in rest:
            return f"{found[1:]}{rest}"
    return None
