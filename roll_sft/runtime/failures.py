"""Turns failed calls to the workers into one error that names rank, host and cause.

When a rank fails, its peers fail too in the collective that it left, or wait there for ever. So the
first error to arrive may not be the cause. A death explains every other error, and any other error
explains those which only report a lost peer.
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
from roll_sft.base.errors import KILLED, RollSftError, WorkerError
from roll_sft.runtime.rank_faults import RankError
from roll_sft.runtime.worker import WorkerAddress, log_path, started_line

LOG = logging.getLogger(__name__)
CAUSE_GRACE_S = 3.0  # how long to wait for the cause after an error about a lost peer
LOG_TAIL_BYTES = 1 << 18
MAX_SHOWN = 4  # ranks in one message
EXIT_DETAIL = re.compile(r"Worker exit detail: (.*?)(?:\. Some common causes|\n|$)")
END_OF_FILE = "connection error code 2"  # Ray lost the process and knows no more
# Collectives; what Megatron-Core's pipelines and gradients wait in; the end of a step on a GPU.
WAITING = re.compile(
    r"torch/distributed/|torch/cuda/|/p2p_communication\.py|/param_and_grad_buffer\.py"
    r"|engine/engine\.py\", line \d+ in read|engine/optimizer\.py\", line \d+ in gradient_norm"
)
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
    """Addresses of the ranks, empty until all have started, and the folder of their logs."""

    addresses: tuple[WorkerAddress, ...]
    logs: Path

    def name(self, rank: int) -> str:
        """Rank, host and process."""
        return str(self.addresses[rank]) if self.addresses else f"rank {rank}"

    def error(self, rank: int, message: str, *, may_pass: bool = True) -> WorkerError:
        """The error that `rank` caused."""
        error = WorkerError(message)
        error.rank, error.may_pass = rank, may_pass
        error.host = self.addresses[rank].host if self.addresses else ""
        return error

    def log(self, rank: int) -> str:
        """The end of the rank's log, at most `LOG_TAIL_BYTES`, without earlier runs."""
        try:
            with log_path(self.logs, rank).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - LOG_TAIL_BYTES))
                text = file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""
        started = started_line(self.addresses[rank]) if self.addresses else ""
        return text.rpartition(started)[2] if started else text


def first_cause(phase: str, references: Sequence[Any], ranks: Ranks) -> RollSftError:
    """The error that explains the others; `references` has one call a rank, one of them failed."""
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
    phase: str, late: Sequence[int], *, deadline_s: float, ranks: Ranks
) -> WorkerError:
    """The error of a phase in which the ranks `late` made no progress: where they are.

    Each worker writes its stacks to its log at the deadline; a rank without one is stopped or gone.
    """
    stacks = {rank: stack_in(ranks.log(rank)) for rank in late}
    waiting = [rank for rank in late if is_waiting(stacks[rank])]
    # A rank that waits in a collective is late because of another rank.
    culprits = [rank for rank in late if rank not in waiting] or waiting
    culprits.sort(key=lambda rank: bool(stacks[rank]))  # first those without a sign of life
    for rank in [rank for rank in culprits if stacks[rank]][:1]:
        LOG.error(
            "stack of %s, innermost call first:\n%s", ranks.name(rank), "\n".join(stacks[rank])
        )
    found = [f"{ranks.name(rank)} {_state(stacks[rank])}" for rank in culprits[:MAX_SHOWN]]
    if culprits[MAX_SHOWN:]:
        found.append(f"likewise {_listed(culprits[MAX_SHOWN:])}")
    if waiting and culprits != waiting:
        found.append(f"{_listed(waiting)} waited for that")
    return ranks.error(
        culprits[0],
        f"{phase} did not finish within {deadline_s:g} s: {'; '.join(found)}; the stacks are at the"
        f" end of {log_path(ranks.logs, culprits[0])} and of the other logs beside it",
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
    """Distance from the cause: 0 is a death, 1 an error of the rank itself, 2 a lost peer."""
    if isinstance(failure, RayTaskError) and isinstance(failure.cause, RankError):
        return 2 if failure.cause.fault.is_collateral else 1
    return 0 if isinstance(failure, RayActorError) else 1


def _as_ours(phase: str, rank: int, failure: RayError, ranks: Ranks) -> RollSftError:
    if isinstance(failure, RayTaskError) and isinstance(failure.cause, RankError):
        fault = failure.cause.fault
        if fault.exit_code is None:  # a bug: log the traceback
            LOG.error("%s\n%s", ranks.name(rank), fault.details)
        message = f"{fault}; {_see_log(rank, ranks)}"
        if (kind := KINDS.get(fault.exit_code or 0)) is not None:
            return kind(message)
        return ranks.error(rank, message, may_pass=fault.may_pass)
    reason = _reason_of_death(failure, ranks.log(rank))
    # An actor that cannot even be made would fail again.
    may_pass = not (isinstance(failure, RayActorError) and failure.actor_init_failed)
    message = f"{ranks.name(rank)} died during {phase}: {reason}; {_see_log(rank, ranks)}"
    return ranks.error(rank, message, may_pass=may_pass)


def _reason_of_death(failure: RayError, log: str) -> str:
    crash = re.findall(r"^Fatal Python error: (.*)$", log, re.MULTILINE)
    if crash:
        return f"it crashed ({crash[-1]})"
    detail = EXIT_DETAIL.search(str(failure))
    if detail and END_OF_FILE in detail.group(1):
        return KILLED
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    # The error of an actor that could not be created holds a traceback; its last line is the cause.
    is_traceback = isinstance(failure, RayActorError) and failure.actor_init_failed
    return detail.group(1).strip() if detail else lines[-1 if is_traceback else 0]


def _see_log(rank: int, ranks: Ranks) -> str:
    return f"its log is {log_path(ranks.logs, rank)}"


def stack_in(log: str) -> list[str]:
    """Frames of the thread that runs the worker's method, innermost first.

    They come from the last stacks that a deadline wrote to `log`; without any the list is empty.
    """
    _before, *threads = re.split(r"^(?:Current t|T)hread 0x.*$", log, flags=re.MULTILINE)
    for thread in reversed(threads):
        frames = list(_frames(thread))
        if any("roll_sft/runtime/worker.py" in frame for frame in frames):
            return frames
    return []


def _frames(thread: str) -> Iterator[str]:
    for line in thread.splitlines():
        if line.startswith("  File "):
            yield line.strip()
        elif line.strip():
            return  # a log line of another thread, written after the stacks


def is_waiting(frames: Sequence[str]) -> bool:
    """Whether a stack waits for other ranks, or for a device that may wait for those of others."""
    return any(WAITING.search(frame) for frame in frames)


def _listed(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - MAX_SHOWN} more" if ranks[MAX_SHOWN:] else ""
    return f"rank {', '.join(map(str, ranks[:MAX_SHOWN]))}{more}"


def _state(frames: Sequence[str]) -> str:
    if not frames:
        return "gives no sign of life"
    verb = "waits for its peers in" if is_waiting(frames) else "is in"
    return f"{verb} {frames[0].removeprefix('File ')}"
