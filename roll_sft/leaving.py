"""How a process of ours ends: at once, when it has nothing left to do.

With torch, Ray and Megatron-Core loaded there are millions of objects, and the interpreter looks
through all of them for garbage, twice, as the last thing it does: one to two seconds after a run's
last line. What it would find is memory, which ends with the process anyway.
"""

import atexit
import gc


def leave_quickly() -> None:
    """Spare this process that search; the rest of its end, and its exit code, stay as they are.

    First come threads, then all that is registered at exit later than this (Ray, MLflow), each with
    the collector as it was; then what is alive is put out of the collector's sight.
    """
    atexit.unregister(gc.freeze)  # once, however often a door is used
    atexit.register(gc.freeze)
