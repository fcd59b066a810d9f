"""Keeps Python's search for garbage away from what never becomes garbage.

With torch, Ray and Megatron-Core loaded there are millions of objects that live as long as the
process. The collector looks through them again and again: while they are imported (a sixth of that
time), in the middle of training steps, where one rank's pause is everybody's, and at the very end.
Garbage that is made later is found as ever.
"""

import atexit
import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def imports_kept() -> Iterator[None]:
    """Import what is heavy without a search, and never search what is there afterwards."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


def leave_quickly() -> None:
    """Spare this process the last search; the rest of its end, and its exit code, stay as they are.

    First come threads, then all that is registered at exit later than this (Ray, MLflow), each with
    the collector as it was; then what is alive is put out of the collector's sight.
    """
    atexit.unregister(gc.freeze)  # once, however often a door is used
    atexit.register(gc.freeze)
