"""Shards prepared by several processes of this machine.

Promises:
- results come as they are ready, in any order; the first error of a task ends all of them;
- a process that dies is one `ResourceError`;
- no process outlives this one: each holds one end of a pipe and ends when the other end is closed,
  which the system does for a process that is killed.
"""

import functools
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from roll_sft.base.errors import ResourceError
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.tokens.build_shard import BuiltShard, ShardTask, build_shard


def over_processes(
    tokenizer: ChatTokenizer, tasks: Sequence[ShardTask], *, num_processes: int
) -> Generator[BuiltShard, None, None]:
    """In `num_processes` processes of their own. Raises `ResourceError` if one of them dies."""
    spawn = multiprocessing.get_context("spawn")
    theirs, ours = spawn.Pipe(duplex=False)
    pool = ProcessPoolExecutor(num_processes, spawn, initializer=_start, initargs=(theirs,))
    try:
        # The tokenizer goes through a file. A process is started through a pipe, and starting one
        # that dies before it has read more than a pipe holds (64 KiB) would never return.
        with tempfile.NamedTemporaryFile() as file:
            pickle.dump(tokenizer, file)
            file.flush()
            with _without_interrupts():
                futures = [pool.submit(_build, Path(file.name), task) for task in tasks]
            for future in as_completed(futures):
                yield future.result()
    except BrokenProcessPool as error:
        raise ResourceError(
            f"a process that prepares data died, one of {num_processes} (out of memory, or the"
            " error above); what is done is kept, so run again, with a smaller data.num_proc"
        ) from error
    finally:
        ours.close()  # ends the processes, whatever they have in hand
        pool.shutdown(wait=False, cancel_futures=True)
        theirs.close()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started in the block ignore Ctrl-C, which a terminal sends to them as well."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(lifeline: Connection) -> None:
    """Begin a process of the pool."""
    # One thread for each process: with more they would compete for the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    lifeline.poll(None)  # nothing is ever sent: it returns when the other end is closed
    os._exit(1)


def _build(tokenizer: Path, task: ShardTask) -> BuiltShard:
    return build_shard(_loaded(tokenizer), task)


@functools.cache
def _loaded(file: Path) -> ChatTokenizer:
    with file.open("rb") as pickled:
        tokenizer: ChatTokenizer = pickle.load(pickled)  # written by `over_processes`
    return tokenizer
