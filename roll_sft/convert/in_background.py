"""A module run as a background process: of low priority, and ended with the process that began it.

python -m roll_sft.convert.in_background PID MODULE ARGUMENTS    # PID is the parent's
"""

import os
import runpy
import signal
import sys

from roll_sft.base.child import end_with_parent

_NICENESS = 15

if __name__ == "__main__":
    end_with_parent(sys.argv[1], signal.SIGTERM)
    os.nice(_NICENESS)
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
