"""A module run as a background process: of low priority, and ended with the process that began it.

python -m roll_sft.convert.in_background MODULE ARGUMENTS
"""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2), Linux: at the end of the thread that began it
_NICENESS = 15

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.nice(_NICENESS)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
