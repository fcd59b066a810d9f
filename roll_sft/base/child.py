"""A process that ends with the one that began it, however that ends.

python -m roll_sft.base.child PID MODULE ARGUMENTS    # runs a module so; PID is the parent's
"""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2), Linux


def end_with_parent(pid: str, number: signal.Signals) -> None:
    """Have this process get the signal `number` when the thread of `pid` that began it ends.

    At once, where that process has ended already: then the kernel would never send it.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != int(pid):
        os.kill(os.getpid(), number)


if __name__ == "__main__":
    end_with_parent(sys.argv[1], signal.SIGKILL)
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
