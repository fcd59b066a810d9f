"""Signals that ask a run to end: SIGTERM, SIGINT, SIGHUP and SIGUSR1, as schedulers send them.

Promises: the command ends within `cluster.grace_s` of a request, whatever it is doing then; a
second signal ends it at once; handlers are set in the main thread alone and are put back; a signal
that is ignored, as SIGHUP under nohup, stays ignored.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

from roll_sft.base.errors import PreemptedError
from roll_sft.base.text import printable
from roll_sft.config.schema import RunConfig
from roll_sft.training.stop import Stop

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# `timeout` signals its child and then the group of its child, systemd sends SIGHUP with SIGTERM:
# signals within this time of the first one are the same request.
REPEAT_S = 1.0
# The part of the grace that is kept for ending workers, cluster and trackers.
CLOSE_S, MOST_CLOSE_SHARE = 5.0, 0.5
AGAIN_S = 0.5
IMPORT_S = 0.05  # between looks whether an import is over
JOB_STOP_WAIT_S = 3.0  # `ray job stop` kills after RAY_JOB_STOP_WAIT_TIME_S, which is 3 by default

_waiting = set[int]()  # signals of `noted_signals` that wait for the end of an import


@contextlib.contextmanager
def stoppable(config: RunConfig) -> Iterator[Stop]:
    """A `Stop` for the block. Raises `PreemptedError` where a request interrupts the block.

    A second signal raises `SystemExit` with 128 and its number.
    """
    if _waiting:  # the handlers below would never hear of them
        raise KeyboardInterrupt
    stop = Stop(config, grace_s=_grace_s(config))
    with _Handlers(stop).installed() if _is_main_thread() else contextlib.nullcontext():
        try:
            with interruption_named(stop):
                yield stop
        except (KeyboardInterrupt, SystemExit):
            if stop.second is None:
                raise
            name = signal.Signals(stop.second).name
            line = f"ended by a second signal, {name}: {stop.outlook}"
            sys.stderr.write(f"{printable(line)}\n")
            raise SystemExit(128 + stop.second) from None


@contextlib.contextmanager
def interruption_named(stop: Stop) -> Iterator[None]:
    """Raise `PreemptedError` where a request interrupts the block."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if stop.reason is None or stop.second is not None:
            raise
        raise PreemptedError(stop.last_line()) from None


@contextlib.contextmanager
def noted_signals() -> Iterator[list[signal.Signals]]:
    """The signals that arrive while the block runs; each raises KeyboardInterrupt there."""
    signals: list[signal.Signals] = []
    imports = _num_imports(sys._getframe())

    def note(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            signals.append(signal.Signals(number))
        if _num_imports(frame) > imports:
            _waiting.add(number)
            _wake_at(time.monotonic() + IMPORT_S)
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt

    numbers = (*SIGNALS, signal.SIGALRM)
    with _handled(numbers, note) if _is_main_thread() else contextlib.nullcontext():
        try:
            yield signals
        finally:
            if _waiting:  # no alarm may come after its handler
                signal.setitimer(signal.ITIMER_REAL, 0)
                _waiting.clear()


class _Handlers:
    """Turns signals into requests, and sees to it that a request is obeyed in time.

    Handlers raise KeyboardInterrupt, because no other exception passes through `ray.get`. They wait
    for the end of an import: a module in C may swallow what is raised there, with a traceback.
    """

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._first_at: float | None = None
        self._is_noted = self._is_interrupted = False
        self._imports = 0  # around the block

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Signals and the limit of time are requests while the block runs."""
        stop, before = self._stop, signal.getitimer(signal.ITIMER_REAL)
        self._imports = _num_imports(sys._getframe())
        with _handled(SIGNALS, self._on_signal), _handled((signal.SIGALRM,), self._on_alarm):
            if stop.limit is not None:
                _wake_at(stop.limit)
            stop.changed = self._changed
            try:
                yield
            finally:
                stop.changed = lambda: None
                signal.setitimer(signal.ITIMER_REAL, *before)

    def _changed(self) -> None:
        stop = self._stop
        if stop.reason is None:
            return
        if stop.is_deferred:
            self._is_noted = True
            _wake_at(stop.deadline - min(CLOSE_S, MOST_CLOSE_SHARE * stop.grace_s))
        elif self._is_noted:  # training is over, and ends the command
            self._is_interrupted = True
            _wake_at(stop.deadline)
        else:
            _wake_at(time.monotonic())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            self._stop.ask(f"ended by {signal.Signals(number).name}")
        elif now - self._first_at >= REPEAT_S:
            if self._stop.second is not None:  # what ends the run hangs
                self._leave(128 + number)
            self._stop.second = number
            if self._waits_for_import(frame):
                self._is_interrupted = False
                return
            raise KeyboardInterrupt

    def _on_alarm(self, _number: int, frame: FrameType | None) -> None:
        if not self._stop.is_asked():
            return
        if self._is_interrupted:
            if time.monotonic() >= self._stop.deadline:
                self._leave(PreemptedError.exit_code)
            return
        if self._waits_for_import(frame):
            return
        self._is_interrupted, self._stop.is_late = True, self._stop.is_deferred
        _wake_at(self._stop.deadline)
        raise KeyboardInterrupt

    def _waits_for_import(self, frame: FrameType | None) -> bool:
        """Whether `frame` is within an import of the block; if so, SIGALRM comes again."""
        now = time.monotonic()
        if _num_imports(frame) <= self._imports or now >= self._stop.deadline:
            return False
        _wake_at(now + IMPORT_S)
        return True

    def _leave(self, code: int) -> None:
        """End this process now; what it started ends with it."""
        os.write(2, f"{printable(self._stop.last_line())}\n".encode())
        os._exit(code)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _num_imports(frame: FrameType | None) -> int:
    """How many imports `frame` is within."""
    number = 0
    while frame is not None:
        number += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return number


@contextlib.contextmanager
def _handled(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Have `handler` for the signals that are not ignored, while the block runs."""
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: each for number, each in before.items() if each is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _wake_at(moment: float) -> None:
    """Have SIGALRM at `moment` of the monotonic clock, and again and again after it.

    A signal that arrives just before a call that blocks does not end that call; the next one does.
    """
    signal.setitimer(signal.ITIMER_REAL, max(moment - time.monotonic(), 1e-3), AGAIN_S)


def _grace_s(config: RunConfig) -> float:
    """Seconds from a request to the end: `cluster.grace_s`, or less under a Ray job."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return config.cluster.grace_s
    wait_s = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", JOB_STOP_WAIT_S))
    return min(config.cluster.grace_s, 0.9 * wait_s)
