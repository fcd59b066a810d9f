"""Records one run with one tracker, from a thread of its own. The driver never waits for it.

The thread owns the tracker: imports, requests and retries run there. It reads metrics and samples
from the files of the run (see `journal`), so none is kept in memory.

Promises: a failure of the tracker never ends or slows a run, and each kind of failure is logged
once with its cause; values that a server missed are sent when it answers again, by the next start
of the same command, or by `roll-sft sync`; `close` is bounded.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

from roll_sft.base.errors import ResourceError, first_line
from roll_sft.base.text import redacted
from roll_sft.tracking.journal import Journal
from roll_sft.tracking.run_facts import RunFacts
from roll_sft.tracking.trackers import FINISHED, Request, Status, Tracker

LOG = logging.getLogger(__name__)
SEND_EVERY_S = 2.0
RETRY_PAUSES_S = (10.0, 60.0, 600.0)  # between attempts; the last one repeats
CLOSE_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_AFTER_FAILURE_S = 10.0  # of the run, or of an earlier request


class _RefusedError(Exception):
    """The tracker refuses the request; another attempt would fail too."""


class _UnreachableError(Exception):
    """The tracker does not answer; another attempt may succeed."""


class Recorder:
    """Sends the run in `folder` to `tracker`. `facts` is called in the thread."""

    def __init__(
        self, tracker: Tracker, folder: Path, *, journal: Journal, facts: Callable[[], RunFacts]
    ) -> None:
        self._tracker, self._folder = tracker, folder
        self._journal, self._facts = journal, facts
        self._device: str | None = None
        self._status: Status = "FAILED"
        self.warned = set[str]()  # kinds of requests that failed
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name=tracker.name, daemon=True)

    def start(self, *, device: str | None = None) -> None:
        """Open the record in the thread: the files of the run exist, and only grow."""
        self._device = device
        self._thread.start()

    def close(self, status: Status) -> None:
        """Finish the record as `status`, if it was started; waits at most `CLOSE_TIMEOUT_S`."""
        if self._thread.ident is None:
            return
        self._status = status
        self._closing.set()
        has_failed = status != FINISHED or self.warned
        self._thread.join(CLOSE_TIMEOUT_AFTER_FAILURE_S if has_failed else CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._warn("speed", f"is too slow: not all is recorded; {self._remedy()}")

    def send_all(self, status: Status) -> None:
        """Record the whole run in this thread, with one attempt for each request.

        Raises `ResourceError` where the tracker does not answer, or refuses to open a record.
        """
        self._status = status
        self._closing.set()
        try:
            self._record()
        except (_RefusedError, _UnreachableError, ImportError, OSError) as error:
            raise ResourceError(
                redacted(
                    f"tracking.backends: {self._tracker.title}: {first_line(error)}; the files of"
                    " the run keep every value: make it answer and run the same command again"
                )
            ) from error

    def _work(self) -> None:
        try:
            self._record()
        except (_RefusedError, _UnreachableError, ImportError, OSError) as error:
            # OSError: from the files of the run.
            self._warn("server", f"{first_line(error)}; {self._remedy()}")

    def _record(self) -> None:
        facts = self._facts()  # first: they are kept on disk, for a server that never answers
        self._with_retries(self._tracker.open)
        if self._device is not None:
            facts = replace(facts, tags={**facts.tags, "device": self._device})
        self._make(self._tracker.describe(facts))
        is_last = False
        while not is_last:
            # Before the files are read, so that the last round reads all lines.
            is_last = self._closing.wait(SEND_EVERY_S)
            for records in self._journal.batches(is_last=is_last):
                self._make(self._tracker.send(records))
            self._make(self._tracker.send([]))
        self._make(self._tracker.finish(self._status))

    def _make(self, requests: Iterable[Request]) -> None:
        for kind, send, is_repeated in requests:
            try:
                if is_repeated:
                    self._with_retries(send)
                else:
                    self._attempt(send)
            except _RefusedError as error:
                self._warn(kind, f"{kind} are refused: {error}")
            except _UnreachableError as error:
                if is_repeated:
                    raise
                self._warn(kind, f"{kind} are not recorded: {error}")

    def _with_retries(self, send: Callable[[], object]) -> None:
        """Make a request; while the tracker does not answer, repeat it until the run is over."""
        for pause_s in chain(RETRY_PAUSES_S, repeat(RETRY_PAUSES_S[-1])):
            is_last = self._closing.is_set()
            try:
                self._attempt(send)
                return
            except _UnreachableError as error:
                if is_last:
                    raise
                self._warn("server", f"{error}; the run continues and sends the metrics later")
            self._closing.wait(pause_s)

    def _attempt(self, send: Callable[[], object]) -> None:
        """Make a request once. Raises `_RefusedError` or `_UnreachableError`."""
        try:
            send()
        except Exception as error:
            # Any type is possible: a tracker's stores and credentials may be plugins.
            is_refused = self._tracker.is_refused(error)
            raise (_RefusedError if is_refused else _UnreachableError)(first_line(error)) from error

    def _warn(self, kind: str, reason: str) -> None:
        if kind not in self.warned:
            LOG.warning(redacted(f"{self._tracker.title}: {reason}"))
        self.warned.add(kind)

    def _remedy(self) -> str:
        return f"the files of the run have all: `roll-sft sync {self._folder}` sends it"
