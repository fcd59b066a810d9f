"""From what Ray says of a failed call to one error that names rank, host and cause.

When a rank fails its peers fail too, in the collective that it left, or wait there for ever. So the
first error to arrive need not be the cause: a death explains other errors, and an error of any kind
explains those that only say that a peer is gone.
"""

import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from roll_sft.base import errors
from roll_sft.base.errors import RollSftError, WorkerError
from roll_sft.runtime.worker import RankError, WorkerAddress, log_path, started_line

LOG = logging.getLogger(__name__)
CAUSE_GRACE_S = 3.0  # after a peer's error, how long the rank that caused it may take to be heard
LOG_TAIL_BYTES = 1 << 18
SHOWN = 4  # ranks in one message
EXIT_DETAIL = re.compile(r"Worker exit detail: (.*?)(?:\. Some common causes|\n|$)")
END_OF_FILE = "connection error code 2"  # the process is gone and nothing else is known
KINDS = {
    kind.exit_code: kind
    for kind in (
        errors.ConfigError,
        errors.DataError,
        errors.ResourceError,
        errors.DivergedError,
        errors.CheckpointError,
    )
}


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where the ranks run, empty until they have said so, and where their logs are."""

    addresses: tuple[WorkerAddress, ...]
    logs: Path

    def name(self, rank: int) -> str:
        """Rank, host and process."""
        return str(self.addresses[rank]) if self.addresses else f"rank {rank}"

    def log(self, rank: int) -> str:
        """What the rank has logged in this run; of a long log the end."""
        try:
            with log_path(self.logs, rank).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - LOG_TAIL_BYTES))
                text = file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""
        started = started_line(self.addresses[rank]) if self.addresses else ""
        return text.rpartition(started)[2] if started else text


def first_cause(phase: str, references: Sequence[Any], ranks: Ranks) -> RollSftError:
    """The error of `references`, one a rank and at least one failed, that explains the others."""
    ends = time.monotonic() + CAUSE_GRACE_S
    while True:
        ready, pending = ray.wait(list(references), num_returns=len(references), timeout=0)
        failures = _failures(references, set(ready))
        rank, failure = min(failures, key=lambda each: (_distance(each[1]), each[0]))
        remaining_s = ends - time.monotonic()
        if _distance(failure) < 2 or not pending or remaining_s <= 0:
            return _as_ours(phase, rank, failure, ranks)
        ray.wait(pending, timeout=remaining_s)


def missed_deadline(
    phase: str, references: Sequence[Any], *, deadline_s: float, ranks: Ranks
) -> WorkerError:
    """What the late ranks were doing when `phase` ran out of time, by the stacks in their logs."""
    _done, waited = ray.wait(list(references), num_returns=len(references), timeout=0)
    late = [rank for rank, each in enumerate(references) if each in waited or not waited]
    stacks = {rank: _stack(ranks.log(rank)) for rank in late}
    silent = [rank for rank in late if not stacks[rank]]
    busy = [rank for rank in late if stacks[rank] and not _is_waiting(stacks[rank])]
    waiting = [rank for rank in late if stacks[rank] and _is_waiting(stacks[rank])]
    blamed = (silent + busy) or waiting
    for rank in (busy or waiting)[:1]:
        LOG.error(
            "%s is here, innermost call first:\n%s", ranks.name(rank), "\n".join(stacks[rank])
        )
    found = [f"{ranks.name(rank)} {_state(stacks[rank])}" for rank in blamed[:SHOWN]]
    if blamed[SHOWN:]:
        found.append(f"so do {_listed(blamed[SHOWN:])}")
    if blamed is not waiting and waiting:
        found.append(f"{_listed(waiting)} waited for that")
    return WorkerError(
        f"{phase} did not finish within {deadline_s:g} s: {'; '.join(found)}; the stacks are at the"
        f" end of {log_path(ranks.logs, blamed[0])} and of the other logs beside it"
    )


def _failures(references: Sequence[Any], ready: set[Any]) -> list[tuple[int, RayError]]:
    failures = []
    for rank, reference in enumerate(references):
        try:
            if reference in ready:
                ray.get(reference)
        except RayError as error:
            failures.append((rank, error))
    assert failures, "first_cause is called once a call has failed"
    return failures


def _distance(failure: RayError) -> int:
    """From the cause: 0 for a death, 1 for an error of the rank's own, 2 for a lost peer."""
    if isinstance(failure, RayTaskError) and isinstance(failure.cause, RankError):
        return 2 if failure.cause.fault.is_collateral else 1
    return 0 if isinstance(failure, RayActorError) else 1


def _as_ours(phase: str, rank: int, failure: RayError, ranks: Ranks) -> RollSftError:
    if isinstance(failure, RayTaskError) and isinstance(failure.cause, RankError):
        fault = failure.cause.fault
        if fault.exit_code is None:  # not the user's: the traceback helps
            LOG.error("%s\n%s", ranks.name(rank), fault.details)
        return KINDS.get(fault.exit_code or 0, WorkerError)(f"{fault}; {_see_log(rank, ranks)}")
    reason = _reason_of_death(failure, ranks.log(rank))
    return WorkerError(f"{ranks.name(rank)} died during {phase}: {reason}; {_see_log(rank, ranks)}")


def _reason_of_death(failure: RayError, log: str) -> str:
    crash = re.findall(r"^Fatal Python error: (.*)$", log, re.MULTILINE)
    if crash:
        return f"it crashed ({crash[-1]})"
    detail = EXIT_DETAIL.search(str(failure))
    if detail and END_OF_FILE in detail.group(1):
        return "it was killed, by a signal or by the kernel for want of memory"
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    # An actor that could not be made brings a traceback, whose last line says why.
    is_traceback = isinstance(failure, RayActorError) and failure.actor_init_failed
    return detail.group(1).strip() if detail else lines[-1 if is_traceback else 0]


def _see_log(rank: int, ranks: Ranks) -> str:
    return f"its log is {log_path(ranks.logs, rank)}"


def _stack(log: str) -> list[str]:
    """The frames of the verb in the last stack that the deadline wrote, innermost first."""
    _before, marker, dump = log.rpartition("Timeout (")
    for thread in (
        re.split(r"^(?:Current t|T)hread 0x.*$", dump, flags=re.MULTILINE) if marker else []
    ):
        frames = list(_frames(thread))
        if any("roll_sft/runtime/worker.py" in frame for frame in frames):
            return frames
    return []


def _frames(thread: str) -> Iterator[str]:
    for line in thread.splitlines():
        if line.startswith("  File "):
            yield line.strip()
        elif line.strip():
            return  # a message of another thread, written after the dump


def _is_waiting(frames: Sequence[str]) -> bool:
    return any("torch/distributed/" in frame for frame in frames)


def _listed(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - SHOWN} more" if ranks[SHOWN:] else ""
    return f"rank {', '.join(map(str, ranks[:SHOWN]))}{more}"


def _state(frames: Sequence[str]) -> str:
    if not frames:
        return "gives no sign of life"
    verb = "waits for its peers in" if _is_waiting(frames) else "is in"
    return f"{verb} {frames[0].removeprefix('File ')}"
