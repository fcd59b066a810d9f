"""Exports of every checkpoint, in the background, while training goes on.

A thread looks for new step folders and starts one process of low priority after the other. Each
checkpoint is held by hard links until its export is whole, whatever `checkpoint.keep_last` deletes.
The export of step n is `exports/step_<n>`, and on the hub the branch `step_<n>`; it stays as long
as its checkpoint.

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
    exports = _Exports(config, folder, last_step=last_step)
    exports.thread.start()
    try:
        yield exports.finish
    finally:
        exports.end()


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
        shutil.rmtree(self._held, ignore_errors=True)  # left by a process that was killed
        is_last = False
        while not self._ending.is_set() and not (is_last and not self._waiting):
            is_last = self._closing.is_set()
            self._look()
            if self._waiting:
                self._export(self._waiting.popleft())
            else:
                self._closing.wait(LOOK_EVERY_S)

    def _look(self) -> None:
        """Hold the checkpoints that are new; drop the oldest where too many wait."""
        for path in step_folders(self._folder / CHECKPOINTS):
            name = path.name
            is_made = (self._folder / EXPORTS / name).is_dir()
            if name in self._seen or is_made or step_of(path) == self._last_step:
                continue
            self._seen.add(name)
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                _hold(path, self._held / name)
                self._waiting.append(name)
        while len(self._waiting) > MOST_WAITING:
            name = self._waiting.popleft()
            self._fail(name, "exports take longer than the time between checkpoints")
            shutil.rmtree(self._held / name, ignore_errors=True)

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
        shutil.rmtree(self._held / name, ignore_errors=True)
        for path in step_folders(self._folder / EXPORTS):
            if not (self._folder / CHECKPOINTS / path.name).exists():
                shutil.rmtree(path, ignore_errors=True)

    def _run(self, command: list[str]) -> str | None:
        """Run a module in the background; None, or why it failed."""
        deadline = time.monotonic() + self._config.cluster.checkpoint_timeout_s
        program = [sys.executable, "-m", "roll_sft.convert.in_background", *command]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        with tempfile.TemporaryFile() as said:
            self._process = subprocess.Popen(
                program, env=one_thread, stdin=subprocess.DEVNULL, stdout=said, stderr=said
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
            lines = said.read().decode(errors="replace").strip().splitlines() or ["no message"]
        if is_late:
            return f"took longer than {self._config.cluster.checkpoint_timeout_s:g} s"
        return lines[-1] if code else None

    def _fail(self, name: str, reason: str) -> None:
        self._failed[name] = reason
        if not self._ending.is_set():
            LOG.warning("%s is not exported: %s; training continues", name, reason)


def _hold(path: Path, held: Path) -> None:
    """Hard links of the files of `path` in `held`; a symbolic link where the disk has none."""
    try:
        shutil.copytree(path, held, copy_function=os.link)
    except (OSError, shutil.Error):
        shutil.rmtree(held, ignore_errors=True)
        path.stat()  # raises where it is deleted
        held.parent.mkdir(exist_ok=True)
        held.symlink_to(path)
