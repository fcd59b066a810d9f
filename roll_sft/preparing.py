"""Preparation in a process of its own, so that the process that trains loads nothing of it.

    python -m roll_sft.preparing FOLDER DESCRIPTOR     (RunConfig and references, pickled, on stdin)

The child writes what it found into FOLDER. An error of ours crosses to the parent through the pipe
DESCRIPTOR and is raised there; a fault keeps its traceback in the child. Promise: the child ends
with its parent, and where its log has no new line for `cluster.prepare_timeout_s`.
"""

import contextlib
import gc
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from roll_sft.base.console import set_up_logging
from roll_sft.base.errors import FAULT, RollSftError, report
from roll_sft.base.text import refer, references
from roll_sft.config.schema import RunConfig, cluster_address
from roll_sft.job.prepared import write_prepared

_END_TIMEOUT_S = 10.0


@contextlib.contextmanager
def preparing(config: RunConfig, folder: Path) -> Iterator[Callable[[], None]]:
    """Prepare `config` into `folder` while the block runs.

    The block gets a function that waits, and raises as `prepare` does; the child ends with it.
    """
    reader, writer = os.pipe()
    with contextlib.ExitStack() as stack:
        answer = stack.enter_context(os.fdopen(reader, "rb"))
        try:
            program = ["roll_sft.base.child", str(os.getpid()), "roll_sft.preparing"]
            child = subprocess.Popen(
                [sys.executable, "-m", *program, str(folder), str(writer)],
                stdin=subprocess.PIPE,
                pass_fds=[writer],
                start_new_session=True,  # a signal to the group is for the parent to handle
            )
        finally:
            os.close(writer)
        stack.callback(_end, child)
        assert child.stdin is not None, "the child has a pipe for its input"
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(pickle.dumps((config, references())))

        def finish() -> None:
            parts = iter(lambda: _read(answer.fileno(), child.pid, config, folder), b"")
            pickled = b"".join(parts).lstrip(b"\n")
            code = child.wait()
            if pickled:
                raise pickle.loads(pickled)
            if code:  # the child has said why
                raise SystemExit(code if code > 0 else FAULT)

        yield finish


def _read(number: int, pid: int, config: RunConfig, folder: Path) -> bytes:
    """What the child writes next; nothing at its end."""
    if not select.select([number], [], [], config.cluster.prepare_timeout_s)[0]:
        from roll_sft.runtime.watchdog import stuck_child

        raise stuck_child(pid, config, log=folder.parent / "logs" / "preparing.log")
    return os.read(number, 1 << 16)


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.terminate()
    try:
        child.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def prepare_into(config: RunConfig, folder: Path) -> None:
    """Prepare `config` into `folder`, in this process."""
    gc.disable()  # a search through what is being imported finds nothing
    from roll_sft.job.prepare import prepare

    gc.freeze()
    gc.enable()
    spread = None
    if cluster_address(config) is not None:
        from roll_sft.runtime.preparation import spread_over_cluster

        spread = spread_over_cluster(config)
    write_prepared(prepare(config, spread=spread), folder)


def main(arguments: list[str]) -> int:
    """The child; returns its exit code."""
    folder, writer = Path(arguments[0]), int(arguments[1])
    with os.fdopen(writer, "wb") as answer:
        try:
            set_up_logging()
            (console,) = logging.getLogger("roll_sft").handlers
            console.addFilter(lambda _line: os.write(answer.fileno(), b"\n") > 0)
            config, known = pickle.loads(sys.stdin.buffer.read())
            refer(known)
            prepare_into(config, folder)
        except RollSftError as error:
            pickle.dump(error, answer)
        except KeyboardInterrupt:
            return -signal.SIGINT
        except Exception as error:  # noqa: BLE001 -- a process ends here, with an exit code
            return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
