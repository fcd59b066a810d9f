"""One case of fuzzing: a call of a real door under a time limit, and what every outcome must be.

A case is made by its kind and its seed alone, so it can be repeated. It runs in a fresh
folder, which is also the current one.
"""

import contextlib
import dataclasses
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import yaml

import roll_sft.run
from roll_sft.config.build import build_config
from roll_sft.config.schema import RunConfig
from roll_sft.config.validate import check_config
from roll_sft.convert import command, merge_lora
from tests.doors import prepares_here
from tests.outcome import Outcome

TIME_LIMIT_S = 10.0  # of the processor, so that a machine that is busy fails nothing
WAIT_LIMIT_S = 30.0  # of the clock, for what waits
PROCESS_LIMIT_S = 60.0  # a process imports torch first
LONGEST_LINE = 2000
HUNG = 124

# Of text: characters that steer a terminal, or the order in which a line is shown.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

MAINS = {"roll_sft.convert.command": command.main, "roll_sft.convert.merge_lora": merge_lora.main}
Action = Callable[[RunConfig, str], None]


class OutOfTimeError(BaseException):
    """Raised by the alarm; no handler of ours catches it."""


@dataclass(kw_only=True)
class Case:
    """A call, and what it may come to.

    `arguments` are those of the door `program`; in their place `values` of a configuration spare
    the run's door its composition. `names`: a refusal shows one of them. `check` looks at what was
    done where the call ended as it may.
    """

    what: str
    program: str = "roll_sft.run"
    arguments: list[str] = field(default_factory=list)
    values: dict[str, Any] | None = None
    action: Action | None = None
    codes: frozenset[int]
    names: tuple[str, ...] = ()
    check: Callable[[Outcome], list[str]] = lambda _: []

    def run(self) -> list[str]:
        """Run it in this process and return what is wrong."""
        return self._judged(called(self._call))

    def run_process(self) -> list[str]:
        """Run it as a user would, and return what is wrong."""
        arguments = self.arguments
        if self.values is not None:
            text = yaml.safe_dump({"defaults": ["base", "_self_"], **self.values})
            Path("case.yaml").write_text(text, encoding="utf-8")
            arguments = ["--config-dir", ".", "--config-name", "case"]
        try:
            ended = subprocess.run(
                [sys.executable, "-m", self.program, *arguments],
                capture_output=True,
                timeout=PROCESS_LIMIT_S,
                check=False,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            )
        except subprocess.TimeoutExpired as error:
            return [f"no end after {PROCESS_LIMIT_S:g} s: {_end(error.stderr or b'')}"]
        stdout, stderr = (_decoded(text) for text in (ended.stdout, ended.stderr))
        return self._judged(Outcome(ended.returncode, stdout, stderr))

    def _call(self) -> int:
        if self.program != "roll_sft.run":
            return MAINS[self.program](self.arguments)
        action = self.action or run_config
        if self.values is None:
            return roll_sft.run.main(self.arguments, action=action)
        with patch.object(roll_sft.run, "compose", lambda _: _composed(self.values or {})):
            return roll_sft.run.main([], action=action)

    def _judged(self, outcome: Outcome) -> list[str]:
        found = faults_of(outcome, codes=self.codes, names=self.names)
        if outcome.code in self.codes:
            found += self.check(outcome)
        return found


def faults_of(outcome: Outcome, *, codes: frozenset[int], names: Sequence[str] = ()) -> list[str]:
    """What is wrong with how a call ended, whatever it was."""
    if outcome.code == HUNG:
        return [f"no end: {outcome.last_line}"]
    found, last = [], outcome.last_line
    if outcome.code not in codes:
        found.append(f"exit {outcome.code}: {shown(last)}")
    if "Traceback" in outcome.stderr or "panicked" in outcome.stderr:
        found.append(f"a traceback: {shown(last)}")
    for text in (outcome.stdout, outcome.stderr):
        if steering := _STEERING.search(text):
            around = text[max(0, steering.start() - 60) : steering.end() + 40]
            found.append(f"the raw character {steering.group()!r} in {around!r}")
    if outcome.code == 0:
        return found
    if not last.strip():
        found.append(f"exit {outcome.code} without a word")
    if len(last) > LONGEST_LINE:
        found.append(f"a last line of {len(last)} characters: {shown(last)}")
    if names and not any(name in outcome.stderr for name in names):
        found.append(f"the refusal shows none of {[shown(name) for name in names]}: {shown(last)}")
    return found


def shown(text: str, *, limit: int = 300) -> str:
    """`text` as a line that is safe to print."""
    plain = "".join(c if unicodedata.category(c)[0] not in "CZ" or c == " " else "?" for c in text)
    return plain if len(plain) <= limit else f"{plain[: limit // 2]} ... {plain[-limit // 2 :]}"


def called(call: Callable[[], int]) -> Outcome:
    """What `call` returned and wrote, also from native code; `HUNG` where it took too long."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with _streams(out.fileno(), err.fileno()), _put_back():
            try:
                with _time_limit():
                    code = call()
            except OutOfTimeError as error:
                code = HUNG
                sys.stderr.write(f"{error}\n")
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(_decoded(file.read()))
    return Outcome(code, *texts)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """`folder` as the current one."""
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _composed(values: dict[str, Any]) -> tuple[RunConfig, str]:
    config = build_config(values)
    check_config(config)
    return config, yaml.safe_dump(values)


def run_config(config: RunConfig, composed_yaml: str) -> None:
    """What the door does, and never more than a plan or a preparation."""
    from roll_sft import stages

    if not config.prepare_only:
        config = dataclasses.replace(config, dry_run=True)
    # A case has seconds, and the process of its own would import for as long.
    with patch.object(stages, "preparing", prepares_here):
        stages.run(config, composed_yaml=composed_yaml)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def ring(_number: int, frame: FrameType | None) -> None:
        places = []
        while frame is not None:
            name = frame.f_code.co_filename
            if "roll_sft" in name or not places:
                places.append(f"{name.rpartition('/')[2]}:{frame.f_lineno}")
            frame = frame.f_back
        raise OutOfTimeError(" < ".join(places[:8]))

    timers = (
        (signal.SIGALRM, signal.ITIMER_REAL, WAIT_LIMIT_S),
        (signal.SIGPROF, signal.ITIMER_PROF, TIME_LIMIT_S),
    )
    before = [
        (signal.signal(number, ring), signal.setitimer(timer, limit_s))
        for number, timer, limit_s in timers
    ]
    try:
        yield
    finally:
        for (number, timer, _), (handler, left) in zip(timers, before, strict=True):
            signal.setitimer(timer, *left)
            signal.signal(number, handler)


@contextlib.contextmanager
def _streams(out: int, err: int) -> Iterator[None]:
    """Descriptors 1 and 2, and Python's streams on them, led to files."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept, streams = (os.dup(1), os.dup(2)), (sys.stdout, sys.stderr)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="strict")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError, OSError):
                stream.close()
        sys.stdout, sys.stderr = streams
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)


@contextlib.contextmanager
def _put_back() -> Iterator[None]:
    """What a door changes in its process, put back."""
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    loggers = [logging.getLogger("roll_sft"), logging.getLogger()]  # hydra.verbose sets the root's
    kept = [(each, each.handlers[:], each.level, each.propagate) for each in loggers]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGTERM, handler)
        for logger, handlers, level, propagate in kept:
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", errors="backslashreplace")


def _end(text: bytes) -> str:
    return shown(_decoded(text).rstrip("\n").rpartition("\n")[2])
