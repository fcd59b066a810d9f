"""Hints on the memory of mapped files: which tensor is read next, and which one no more.

Read page by page as it is touched, a mapped file costs three times what it costs in one go; left
mapped, it counts as this process's memory until somebody else needs it. Hints only: where the
kernel knows none (they are Linux's, 5.14), everything works and is slower.
"""

import ctypes
import mmap

import torch

_POPULATE_READ = 22  # of Linux; Python's mmap module has no name for it
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def bring_in(tensor: torch.Tensor) -> torch.Tensor:
    """Map all of the contiguous `tensor`, which comes from a file, and return it."""
    _advise(tensor, _POPULATE_READ)
    return tensor


def let_go(tensor: torch.Tensor) -> None:
    """Unmap `tensor`, which comes from a file and was not written to; its numbers stay readable."""
    _advise(tensor, mmap.MADV_DONTNEED)


def _advise(tensor: torch.Tensor, advice: int) -> None:
    # Whole pages inside the tensor alone: its neighbours may be in use, or not come from a file.
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        _madvise(start, stop - start, advice)
