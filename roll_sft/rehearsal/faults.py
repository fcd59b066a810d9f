"""The faults of a rehearsal, each in a run of its own, and what came of it.

A fault of a rank is planted by `debug.faults`; one of the command is a signal from here. Every
outcome rests on a proof that the fault happened: the file that the fault leaves, or the exit code
of the signal. A run that ends is followed by the same command.
"""

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from roll_sft.base.errors import CheckpointError, DivergedError, PreemptedError
from roll_sft.base.files import json_lines
from roll_sft.checkpoint.resume import step_folders, step_of
from roll_sft.report import RESTARTS

STEPS, SAVE_STEPS, EVAL_STEPS = 24, 6, 8
SIGNAL_AFTER = 8  # steps, of which some are not saved yet
COMMAND_TIMEOUT_S = 600.0
GONE_TIMEOUT_S = 30.0
POLL_S = 0.02
# What does not depend on the clock.
EXACT = ("step", "train_loss", "grad_norm", "learning_rate", "sample_ids_sha256")
BEGINS = re.compile(r"step \d+ begins ([\d.]+) s after the command")


class RehearsalError(Exception):
    """A run that does not do what it should."""


@dataclass(frozen=True, slots=True)
class Fault:
    """An entry of debug.faults, or a signal to the command, and the exit code that it ends with."""

    title: str
    planted: str | None = None
    sent: signal.Signals | None = None
    code: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row of the table: seconds from the fault, or the `problem` of a row that does not hold."""

    detected_s: float = 0.0
    back_s: float = 0.0
    steps_lost: int = 0
    problem: str | None = None


def faults_for(last_rank: int) -> Iterator[Fault]:
    """What is rehearsed."""
    for rank in dict.fromkeys((0, last_rank)):
        yield Fault(f"rank {rank} is killed in a step", f"kind: kill, rank: {rank}, step: 10")
    last = f"rank: {last_rank}"
    checkpoint = f"{last}, step: 12, where: checkpoint"
    yield Fault(f"rank {last_rank} is killed in a save", f"kind: kill, {checkpoint}")
    yield Fault(f"rank {last_rank} is stopped in a step", f"kind: stop, {last}, step: 10")
    evaluation = f"{last}, step: {EVAL_STEPS}, where: evaluation"
    yield Fault(f"rank {last_rank} is stopped in an evaluation", f"kind: stop, {evaluation}")
    code = CheckpointError.exit_code
    yield Fault("the disk is full in a save", f"kind: full_disk, {checkpoint}", code=code)
    code = DivergedError.exit_code
    yield Fault("a weight becomes NaN", "kind: nan, rank: 0, step: 10", code=code)
    yield Fault("the command is killed", sent=signal.SIGKILL, code=-signal.SIGKILL)
    yield Fault("the command gets SIGTERM", sent=signal.SIGTERM, code=PreemptedError.exit_code)


@dataclass(frozen=True, slots=True)
class Runs:
    """The commands of a rehearsal, in `folder`, with the same `overrides`."""

    folder: Path
    overrides: Sequence[str]

    def undisturbed(self) -> None:
        """The run that the others are compared with."""
        self._run("undisturbed", code=0)

    def rehearsed(self, name: str, fault: Fault) -> Outcome:
        """The run `name` with `fault`."""
        try:
            return self._rehearsed(name, fault)
        except RehearsalError as problem:
            return Outcome(problem=str(problem))

    def _rehearsed(self, name: str, fault: Fault) -> Outcome:
        output = self.folder / name
        if fault.sent is None:
            ended = self._run(name, f"debug.faults=[{{{fault.planted}}}]", code=fault.code)
            mark = output / ".fault_00"
            if not mark.exists():
                raise RehearsalError("the fault did not happen")
            happened = mark.stat().st_mtime
        else:
            happened, ended = self._signalled(name, fault.sent, code=fault.code)
        if fault.code == 0:
            outcome = _restarted(output, happened)
        else:
            reached = len(_steps(output))
            kept = max(map(step_of, step_folders(output / "checkpoints")), default=0)
            self._run(name, code=0)
            begins = BEGINS.search(self._log(name).read_text(encoding="utf-8"))
            if begins is None:
                raise RehearsalError("the same command did not go on")
            back_s = ended - happened + float(begins.group(1))
            outcome = Outcome(ended - happened, back_s, max(0, reached - kept))
        if fault.sent == signal.SIGTERM and outcome.steps_lost:
            raise RehearsalError(f"{outcome.steps_lost} steps were lost")
        if _steps(output) != _steps(self.folder / "undisturbed"):
            raise RehearsalError("the losses are not those of an undisturbed run")
        return outcome

    def _run(self, name: str, *more: str, code: int) -> float:
        """Run a command into `name`; returns the time at its end."""
        with self._started(name, *more) as program:
            try:
                ended_with = program.wait(COMMAND_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise RehearsalError(f"it did not end within {COMMAND_TIMEOUT_S:g} s") from None
        self._check(name, ended_with, code)
        return time.time()

    def _signalled(self, name: str, sent: signal.Signals, *, code: int) -> tuple[float, float]:
        """Send a signal to a command after some steps; returns the time, and that of its end."""
        with self._started(name) as program:
            ends = time.monotonic() + COMMAND_TIMEOUT_S
            while _num_steps(self.folder / name) < SIGNAL_AFTER:
                if program.poll() is not None or time.monotonic() > ends:
                    raise RehearsalError(
                        f"it did not reach step {SIGNAL_AFTER}: {self._last(name)}"
                    )
                time.sleep(POLL_S)
            family = psutil.Process(program.pid).children(recursive=True)
            program.send_signal(sent)
            happened = time.time()
            ended_with = program.wait(COMMAND_TIMEOUT_S)
            _gone, left = psutil.wait_procs(family, timeout=GONE_TIMEOUT_S)
            ended = time.time()
        self._check(name, ended_with, code)
        if left:
            raise RehearsalError(f"{len(left)} processes outlived the command")
        return happened, ended

    @contextlib.contextmanager
    def _started(self, name: str, *more: str) -> Iterator[subprocess.Popen[bytes]]:
        arguments = [f"output_dir={self.folder / name}", *self.overrides, *more]
        command = [sys.executable, "-m", "roll_sft.run", *arguments]
        with self._log(name).open("wb") as log:
            program = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                yield program
            finally:
                if program.poll() is None:
                    program.kill()  # what it started ends with it
                    program.wait()

    def _check(self, name: str, ended_with: int, code: int) -> None:
        if ended_with != code:
            raise RehearsalError(f"it ended with {ended_with}, not {code}: {self._last(name)}")

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _last(self, name: str) -> str:
        text = self._log(name).read_text(encoding="utf-8", errors="replace").strip()
        return (text.splitlines() or ["no message"])[-1]


def _restarted(output: Path, happened: float) -> Outcome:
    restarts = [*json_lines(output / RESTARTS)]
    if len(restarts) != 1:
        raise RehearsalError(f"{len(restarts)} restarts followed one fault")
    (restart,) = restarts
    detected_s = restart["time"] - happened
    lost = restart["step"] - 1 - restart["from_step"]
    return Outcome(detected_s, detected_s + restart["seconds"], lost)


def _num_steps(output: Path) -> int:
    """The whole lines of a log that is being written."""
    path = output / "steps.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _steps(output: Path) -> list[list[Any]]:
    return [[line[key] for key in EXACT] for line in json_lines(output / "steps.jsonl")]
