"""Shards prepared in this process, or by several: who does the work, and nothing of what it is.

What is promised:
- results come as they are ready, in any order; the first error of a task ends all of them;
- nothing hangs when a process of the pool dies, and the pool dies with this process, however that
  ends: each process holds the end of a pipe that the system closes with this one.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection

from roll_sft.data.chat import ChatTokenizer
from roll_sft.data.fill import Filled, ShardTask, fill
from roll_sft.errors import ResourceError

_log = logging.getLogger(__name__)

# Below this much text, starting processes takes longer than they save: the tokenizer's own threads
# do most of the work there is.
_SMALL_BYTES = 64 << 20

Spread = Callable[[ChatTokenizer, Sequence[ShardTask]], Generator[Filled, None, None]]
"""Runs `fill` on each task, somewhere."""

_tokenizer: ChatTokenizer | None = None  # of a process of the pool, which serves one run


def spread_for(tasks: Sequence[ShardTask], *, num_proc: int | None) -> Spread:
    """Where `tasks` are best run on this machine; None leaves it to its cores and their size."""
    num_processes = min(len(tasks), num_proc or len(os.sched_getaffinity(0)))
    if num_proc is None and sum(task.num_bytes for task in tasks) < _SMALL_BYTES:
        num_processes = 1
    if num_processes <= 1:
        return here

    def in_pool(
        tokenizer: ChatTokenizer, tasks: Sequence[ShardTask]
    ) -> Generator[Filled, None, None]:
        return over_processes(tokenizer, tasks, num_processes=num_processes)

    return in_pool


def here(tokenizer: ChatTokenizer, tasks: Sequence[ShardTask]) -> Generator[Filled, None, None]:
    """One after the other in this process, where the tokenizer uses all cores."""
    for task in tasks:
        yield fill(tokenizer, task)


def over_processes(
    tokenizer: ChatTokenizer, tasks: Sequence[ShardTask], *, num_processes: int
) -> Generator[Filled, None, None]:
    """In `num_processes` processes of their own. Raises `ResourceError` if one of them dies."""
    # Spawned: this process may have threads (of Ray, of the tokenizer) that a fork would break.
    context = multiprocessing.get_context("spawn")
    ended, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        num_processes, context, initializer=_begin, initargs=(tokenizer, ended)
    )
    try:
        futures = [pool.submit(_fill, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise ResourceError(
            f"a process that prepares data died, one of {num_processes} (out of memory?); what is"
            " done is kept, so run again, with a smaller data.num_proc"
        ) from error
    finally:
        held.close()  # the processes end at once, whatever they have in hand
        pool.shutdown(wait=True, cancel_futures=True)
        ended.close()


def _begin(tokenizer: ChatTokenizer, ended: Connection) -> None:
    """Make this process ready for tasks."""
    global _tokenizer
    _tokenizer = tokenizer
    # One thread for each process: with more they would compete for the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started us tells us when to end
    threading.Thread(target=_end_with, args=(ended,), daemon=True).start()


def _end_with(ended: Connection) -> None:
    """Wait until the other end of the pipe is closed, which the system does for a dead process."""
    ended.poll(None)
    os._exit(1)


def _fill(task: ShardTask) -> Filled:
    assert _tokenizer is not None, "a task before the process was made ready"
    return fill(_tokenizer, task)
