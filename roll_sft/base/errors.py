"""Errors that reach the user, and the exit code each one ends the run with.

Every message names the value, the rule and the remedy in one line. The doors print that line and no
traceback; anything that is not a `RollSftError` is a fault of ours and keeps its traceback.
"""

import signal
import sys
import traceback
from typing import ClassVar

from roll_sft.base.text import printable

FAULT = 1
KILLED = "it was killed, by a signal or by the kernel for want of memory"
LESS_MEMORY = (  # what helps where a GPU has too little
    "give fewer tokens to train.micro_batch_tokens, set train.recompute=full, or cut the model over"
    " more GPUs (`roll-sft plan --suggest` names layouts that fit)"
)


class RollSftError(Exception):
    """Base of the errors that a user can cause or must act on."""

    exit_code: ClassVar[int] = FAULT


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
    """A loss, the gradient norm or a weight is no longer finite.

    `sound_step` is the last step whose weights are known to compute a finite loss.
    """

    exit_code = 5

    def __init__(self, message: str, *, sound_step: int = 0) -> None:
        super().__init__(message)
        self.sound_step = sound_step


class CheckpointError(RollSftError):
    """A checkpoint or an export that is damaged, incomplete or cannot be written."""

    exit_code = 6


class WorkerError(RollSftError):
    """A worker died, hung past its deadline, or raised an error of ours."""

    exit_code = 7
    rank: int | None = None  # that caused it, where it is known, and its host
    host, may_pass = "", False  # may_pass: new workers may not meet it again


class PreemptedError(RollSftError):
    """A run that was asked to end before its last step; the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


def first_line(error: BaseException) -> str:
    """The first line of a library's error, or its type's name where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def why_ended(code: int, errors: str) -> str:
    """Why a process ended with `code`, which wrote `errors` to stderr; -N is the signal N."""
    lines = errors.strip().splitlines() or [f"exit code {code} without a message"]
    return KILLED if code == -signal.SIGKILL else lines[-1]


def of_user(error: BaseException) -> BaseException:
    """`error`, or where a GPU ran out of memory a `ResourceError` that says what helps."""
    if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be imported here
        return error
    return ResourceError(
        f"the GPU has too little memory for this run; {LESS_MEMORY}: {first_line(error)}"
    )


def refuse(problems: list[str]) -> None:
    """Raise all `problems` as one `ConfigError`, if there are any."""
    if problems:
        raise ConfigError("\n".join(problems))


def report(error: BaseException) -> int:
    """Print the line that a command ends with on stderr, and return its exit code.

    An error that is not a `RollSftError` is a fault of ours: its traceback comes first.
    """
    sys.stdout.flush()
    error = of_user(error)
    text, code = str(error), FAULT
    if isinstance(error, RollSftError):
        code = error.exit_code
    else:
        text = f"{type(error).__name__}: {text}"
        sys.stderr.write(printable("".join(traceback.format_exception(error))))
    sys.stderr.write(f"{printable(text)}\n")
    return code
