"""A module run as a process that ends with the one that began it, however that ends.

python -m roll_sft.base.child MODULE ARGUMENTS
"""

import ctypes
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2), Linux: at the end of the thread that began it

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
