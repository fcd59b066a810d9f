"""Errors that reach the user, and the exit code each one ends the run with.

Every message names the value, the rule and the remedy in one line. The doors print that line and no
traceback; anything that is not a `RollSftError` is a fault of ours and keeps its traceback.
"""

import reprlib
from typing import ClassVar

SHOWN_LENGTH = 200
_AS_YAML = {None: "null", True: "true", False: "false"}
MAX_LINE_CHARS = 2000


class RollSftError(Exception):
    """Base of the errors a user can cause or must act on."""

    exit_code: ClassVar[int] = 1


class ConfigError(RollSftError):
    """A configuration value, or a combination of values, that cannot run."""

    exit_code = 2


class DataError(RollSftError):
    """Training or validation data that is missing, malformed or unusable."""

    exit_code = 3


class ResourceError(RollSftError):
    """The cluster does not have what the layout asks for."""

    exit_code = 4


class DivergedError(RollSftError):
    """The loss or the gradient norm is no longer finite."""

    exit_code = 5


class CheckpointError(RollSftError):
    """A checkpoint or an export that is damaged, incomplete or cannot be written."""

    exit_code = 6


class WorkerError(RollSftError):
    """A worker died, hung past its deadline, or raised an error of ours."""

    exit_code = 7


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shown(value: object) -> str:
    """`value` for a message: quoted, without control characters, at most some 200 characters."""
    if value is None or isinstance(value, bool):
        return _AS_YAML[value]
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = SHOWN_LENGTH
    text = short.repr(value)
    return text if len(text) <= 2 * SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}..."


def printable(text: str) -> str:
    """`text` as a terminal may show it: what a file or a key brought along cannot steer it.

    Control characters are escaped, and a line of more than `MAX_LINE_CHARS` loses its middle.
    """
    return "\n".join(_printable_line(line) for line in text.split("\n"))


def _printable_line(line: str) -> str:
    if len(line) > MAX_LINE_CHARS:
        half = MAX_LINE_CHARS // 2
        line = f"{line[:half]} ... ({len(line):,} characters) ... {line[-half:]}"
    if line.isprintable():
        return line
    escaped = (each.encode("unicode_escape").decode("ascii") for each in line)
    return "".join(c if c.isprintable() else e for c, e in zip(line, escaped, strict=True))


def refuse(problems: list[str]) -> None:
    """Raise all `problems` as one `ConfigError`, if there are any."""
    if problems:
        raise ConfigError("\n".join(problems))
