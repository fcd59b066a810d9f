"""Shards prepared in this process, or by several: who does the work, and nothing of what it is.

What is promised:
- results come as they are ready, in any order; the first error of a task ends all of them;
- nothing hangs when a helper process dies, and all of them end with this one, however it ends:
  a helper whose standard input is closed stops at once, whatever it has in hand.

Helpers are plain programs, and not those of `multiprocessing`: it would run the user's main module
again in each, and waits for ever for one that dies before it has read what it is started with.
"""

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import IO, Any

from roll_sft.base.errors import ResourceError, RollSftError
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.tokens.build_shard import Filled, ShardTask, fill

# Below this much text, starting processes takes longer than they save: the tokenizer's own threads
# do most of the work there is.
_SMALL_BYTES = 64 << 20
# With our search path, so that a helper finds what we found.
_PROGRAM = """
import sys; sys.path[:] = sys.argv[1:]
from roll_sft.data.tokens.workers import serve; serve()
"""

Spread = Callable[[ChatTokenizer, Sequence[ShardTask]], Generator[Filled, None, None]]
"""Runs `fill` on each task, somewhere."""


def spread_for(tasks: Sequence[ShardTask], *, num_proc: int | None) -> Spread:
    """Where `tasks` are best run on this machine; None leaves it to its cores and their size."""
    num_processes = min(len(tasks), num_proc or len(os.sched_getaffinity(0)))
    if num_proc is None and sum(task.num_bytes for task in tasks) < _SMALL_BYTES:
        num_processes = 1
    if num_processes <= 1:
        return here

    def over_helpers(
        tokenizer: ChatTokenizer, tasks: Sequence[ShardTask]
    ) -> Generator[Filled, None, None]:
        return over_processes(tokenizer, tasks, num_processes=num_processes)

    return over_helpers


def here(tokenizer: ChatTokenizer, tasks: Sequence[ShardTask]) -> Generator[Filled, None, None]:
    """One after the other in this process, where the tokenizer uses all cores."""
    for task in tasks:
        yield fill(tokenizer, task)


def over_processes(
    tokenizer: ChatTokenizer, tasks: Sequence[ShardTask], *, num_processes: int
) -> Generator[Filled, None, None]:
    """In `num_processes` processes of their own. Raises `ResourceError` if one of them dies."""
    waiting = deque(tasks)
    with ExitStack() as stack:
        # All are started before the first is spoken to: they load their libraries meanwhile.
        started = [stack.enter_context(_helper()) for _ in range(num_processes)]
        helpers: dict[Any, _Helper] = {helper.answers.fileno(): helper for helper in started}
        try:
            for helper in started:
                helper.send(tokenizer)
                helper.send(waiting.popleft())
            while helpers:
                for answers in wait(list(helpers)):
                    outcome = helpers[answers].receive()
                    if isinstance(outcome, RollSftError):
                        raise outcome
                    yield outcome
                    if waiting:
                        helpers[answers].send(waiting.popleft())
                    else:
                        del helpers[answers]
        except (BrokenPipeError, EOFError) as error:
            raise ResourceError(
                f"a process that prepares data died, one of {num_processes} (out of memory, or the"
                " error above); what is done is kept, so run again, with a smaller data.num_proc"
            ) from error


@dataclass(frozen=True, slots=True)
class _Helper:
    tasks: IO[bytes]
    answers: IO[bytes]

    def send(self, value: Any) -> None:
        pickle.dump(value, self.tasks)
        self.tasks.flush()

    def receive(self) -> Any:
        return pickle.load(self.answers)  # of our own process


@contextmanager
def _helper() -> Generator[_Helper, None, None]:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # What a terminal sends to us is not for it: it ends when we do.
        start_new_session=True,
        # One thread for each process: with more they would compete for the same cores.
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    assert process.stdin is not None, "a helper is given a pipe"
    assert process.stdout is not None, "a helper is given a pipe"
    try:
        yield _Helper(process.stdin, process.stdout)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        with suppress(BrokenPipeError):  # what was still to be said to a dead one
            process.stdin.close()


def serve() -> None:
    """Be a helper: a tokenizer, and then tasks, come on standard input; answers go to its output.

    Anything but an error of ours ends the process, with its traceback.
    """
    # Nothing that a library prints may get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    received: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(received,), daemon=True).start()
    tokenizer = received.get()
    while True:
        outcome: Filled | RollSftError
        try:
            outcome = fill(tokenizer, received.get())
        except RollSftError as error:
            outcome = error
        pickle.dump(outcome, answers)
        answers.flush()


def _receive(received: "queue.SimpleQueue[Any]") -> None:
    """Read until the input is closed, which the system does for a dead process; then end."""
    try:
        while True:
            received.put(pickle.load(sys.stdin.buffer))
    except EOFError:
        os._exit(1)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
        raise
