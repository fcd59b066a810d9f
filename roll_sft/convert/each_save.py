"""Exports of every checkpoint, in the background, while training goes on.

The driver holds each checkpoint by hard links when it is published, so that an export can read it,
whatever `checkpoint.keep_last` deletes. A thread starts processes of low priority, one after the
other. The export of step n is `exports/step_<n>`, and on the hub the branch `step_<n>`; it stays as
long as its checkpoint.

Promises: at most one process, with a deadline, and `MOST_WAITING` checkpoints that wait for it; a
failure never ends training, warns, and is told again at the end; a partial export never has its
final name.
"""

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from roll_sft.base.errors import CheckpointError, why_ended
from roll_sft.base.files import writing
from roll_sft.checkpoint.resume import step_folders, step_of
from roll_sft.config.schema import RunConfig
from roll_sft.convert.exports import conversion

LOG = logging.getLogger(__name__)
EXPORTS, HELD, CHECKPOINTS = "exports", ".exporting", "checkpoints"
MOST_WAITING = 3
LOOK_EVERY_S = 1.0


@contextlib.contextmanager
def exporting_saves(
    config: RunConfig, folder: Path, *, last_step: int
) -> Iterator[Callable[[], None]]:
    """Export the checkpoints of the run in `folder` while the block runs.

    The block is given a function that waits for the exports that are begun, and tells what failed.
    The checkpoint of `last_step` is left to the end of the run. A process that still works when the
    block ends is ended.
    """
    shutil.rmtree(folder / HELD, ignore_errors=True)  # left by a process that was killed
    for checkpoint in step_folders(folder / CHECKPOINTS):
        if not (folder / EXPORTS / checkpoint.name).is_dir():
            hold(checkpoint, folder)
    exports = _Exports(config, folder, last_step=last_step)
    exports.thread.start()
    try:
        yield exports.finish
    finally:
        exports.end()


def hold(checkpoint: Path, folder: Path) -> None:
    """Keep `checkpoint` for its export, whatever is deleted: no byte is copied.

    Raises `CheckpointError` where the disk refuses.
    """
    held = folder / HELD / checkpoint.name
    partial = held.with_name(f".{held.name}")
    with writing(held, CheckpointError):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            shutil.copytree(checkpoint, partial, copy_function=os.link)
        except (OSError, shutil.Error):  # a disk without hard links
            shutil.rmtree(partial, ignore_errors=True)
            partial.symlink_to(checkpoint)
        partial.rename(held)


class _Exports:
    """The thread, the checkpoints that wait, and the process that works."""

    def __init__(self, config: RunConfig, folder: Path, *, last_step: int) -> None:
        self._config, self._folder, self._last_step = config, folder, last_step
        self._held = folder / HELD
        self._waiting = deque[str]()  # names of step folders
        self._seen, self._failed = set[str](), dict[str, str]()
        self._done = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._closing, self._ending = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._work, name="exports", daemon=True)

    def finish(self) -> None:
        """Wait for all exports, and tell those that failed."""
        self._closing.set()
        if self._process is not None or self._waiting:
            LOG.info("waiting for the exports of earlier checkpoints")
        self.thread.join()
        for name, reason in self._failed.items():
            LOG.warning("%s was not exported: %s", name, reason)
        if self._failed:
            LOG.warning(
                "%d of %d exports failed; `roll-sft convert CHECKPOINT --output FOLDER` makes one",
                len(self._failed),
                len(self._failed) + self._done,
            )

    def end(self) -> None:
        """End the process that works, and drop what waits."""
        self._ending.set()
        self._closing.set()
        self.thread.join()
        shutil.rmtree(self._held, ignore_errors=True)

    def _work(self) -> None:
        is_last = False
        while not self._ending.is_set() and not (is_last and not self._waiting):
            is_last = self._closing.is_set()
            self._look()
            if self._waiting:
                self._export(self._waiting.popleft())
            else:
                self._closing.wait(LOOK_EVERY_S)

    def _look(self) -> None:
        """Take the checkpoints that are newly held; drop the oldest where too many wait."""
        names = sorted(path.name for path in self._held.iterdir()) if self._held.exists() else []
        for name in names:
            is_step = not name.startswith(".") and name not in self._seen
            if is_step and step_of(Path(name)) != self._last_step:
                self._seen.add(name)
                self._waiting.append(name)
        while len(self._waiting) > MOST_WAITING:
            name = self._waiting.popleft()
            self._fail(name, "exports take longer than the time between checkpoints")
            self._let_go(name)

    def _export(self, name: str) -> None:
        """Make one export, push it where the run is pushed, and delete those without checkpoint."""
        output = self._folder / EXPORTS / name
        commands = [conversion(self._config, self._held / name, output)]
        push = self._config.export.push_to_hub
        if push.repo_id is not None:
            branch = f"{push.revision}-{name}" if push.revision else name
            arguments = [str(output), "--repo-id", push.repo_id, "--revision", branch]
            arguments += [] if push.private else ["--public"]
            commands.append(["roll_sft.convert.push", *arguments])
        for command in commands:
            reason = self._run(command)
            if reason is not None:
                self._fail(name, reason)
                break
        else:
            self._done += 1
            LOG.info("%s is exported to %s", name, output)
        self._let_go(name)
        for path in step_folders(self._folder / EXPORTS):
            if not (self._folder / CHECKPOINTS / path.name).exists():
                shutil.rmtree(path, ignore_errors=True)

    def _run(self, command: list[str]) -> str | None:
        """Run a module in the background; None, or why it failed."""
        deadline = time.monotonic() + self._config.cluster.checkpoint_timeout_s
        background = ["roll_sft.convert.in_background", str(os.getpid())]
        program = [sys.executable, "-m", *background, *command]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        with tempfile.TemporaryFile() as said:
            self._process = subprocess.Popen(
                program,
                env=one_thread,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,  # a signal to the group is for this process to handle
            )
            is_late = False
            while self._process.poll() is None:
                is_late = time.monotonic() > deadline
                if self._ending.is_set() or is_late:
                    self._process.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(10)
                    self._process.kill()
                self._look()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(LOOK_EVERY_S)
            code, self._process = self._process.returncode, None
            said.seek(0)
            errors = said.read().decode(errors="replace")
        if is_late:
            return f"took longer than {self._config.cluster.checkpoint_timeout_s:g} s"
        return why_ended(code, errors) if code else None

    def _fail(self, name: str, reason: str) -> None:
        self._failed[name] = reason
        if not self._ending.is_set():
            LOG.warning("%s is not exported: %s; training continues", name, reason)

    def _let_go(self, name: str) -> None:
        held = self._held / name
        if held.is_symlink():
            held.unlink()
        shutil.rmtree(held, ignore_errors=True)
