"""Processes with torch and Megatron-Core imported once, reused by every test that needs ranks.

`RankPool.run(function, layout, *args)` runs an importable function on each rank of `layout`, inside
its process groups, and returns the results by rank. An error on any rank is raised with its
traceback.
"""

import contextlib
import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from roll_sft.base.gc_pauses import imports_kept
from roll_sft.base.layout import ParallelLayout
from roll_sft.engine.without_compiler import compiler_left_out

TIMEOUT_S = 120.0


class RankPool:
    """As many ranks as were asked for at once so far."""

    def __init__(self) -> None:
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []

    def _grow(self, size: int) -> None:
        # A forked rank has what this process has imported: for a process without threads alone.
        context = multiprocessing.get_context(os.environ.get("RANKS_START_BY", "spawn"))
        while len(self._pipes) < size:
            ours, theirs = context.Pipe()
            # Not a daemon: Megatron forks writers. It ends when our end of the pipe closes.
            process = context.Process(target=_serve, args=(theirs,))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run_alone(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function` in one process, without process groups."""
        self._grow(1)
        with self._alive(0):
            self._pipes[0].send((function, None, 0, "", args))
        text, value = self._answer(0, function)
        if text:
            raise AssertionError(text)
        return value

    def run(self, function: Callable[..., Any], layout: ParallelLayout, *args: Any) -> list[Any]:
        self._grow(layout.world_size)
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            pipes = self._pipes[: layout.world_size]
            for rank, pipe in enumerate(pipes):
                with self._alive(rank):
                    pipe.send((function, layout, rank, store, args))
            answers = [self._answer(rank, function) for rank in range(layout.world_size)]
        errors = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text]
        if errors:
            raise AssertionError("\n".join(errors))
        return [value for _, value in answers]

    def _answer(self, rank: int, function: Callable[..., Any]) -> tuple[str | None, Any]:
        if not self._pipes[rank].poll(TIMEOUT_S):
            # Anew: a late answer would be taken for that to the next question.
            self.close()
            raise TimeoutError(f"rank {rank} did not answer {function}")
        with self._alive(rank):
            answer: tuple[str | None, Any] = self._pipes[rank].recv()
        return answer

    @contextlib.contextmanager
    def _alive(self, rank: int) -> Iterator[None]:
        """Say how `rank` ended where it is not there, and have new ranks for the next test."""
        try:
            yield
        except (EOFError, BrokenPipeError):
            process = self._processes[rank]
            process.join(timeout=10)
            code = process.exitcode
            self.close()
            raise AssertionError(f"rank {rank} of the tests ended with {code}") from None

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []


def _serve(pipe: Connection) -> None:
    with imports_kept():
        import torch
        import torch.distributed as dist

        with compiler_left_out():
            from roll_sft.engine.process_groups import Rendezvous, process_groups
            from tests import parity  # noqa: F401 -- what most tests run
    torch.set_num_threads(1)

    while True:
        try:
            function, layout, rank, store, args = pipe.recv()
        except EOFError:
            return
        try:
            if layout is None:
                value = function(*args)
            else:
                rendezvous = Rendezvous(0, rank, layout.world_size, 60.0, 60.0)
                file_store = dist.FileStore(store, layout.world_size)
                with process_groups(rendezvous, layout, device="cpu", store=file_store):
                    value = function(*args)
            # What is left of an engine holds its process groups, and each of those has three
            # threads of gloo's, which wake a hundred times a second.
            gc.collect()
            pipe.send((None, value))
        except BaseException:  # noqa: BLE001 -- reported to the test, which raises
            pipe.send((traceback.format_exc(), None))
