"""Writing while training goes on: a copy in host memory, then a thread.

A thread and not a process: it ends with its rank, and Megatron-Core's forked writers wait for each
other for ever when a rank is killed. Promise: what is written is the state at the call of `begin`,
whatever happens to the tensors afterwards; an error of the thread is raised by the next call.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from roll_sft.checkpoint.tensors import Piece


class Saver:
    """One write at a time. Keeps the memory of its copies for the next save."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._write: Future[None] | None = None

    def begin(self, pieces: Sequence[Piece], write: Callable[[Sequence[Piece]], None]) -> None:
        """Copy `pieces`, once the write before is done, and `write` the copies in a thread."""
        self.finish()
        self._write = self._thread.submit(write, self._copies(pieces))

    def is_done(self) -> bool:
        """Whether nothing is being written; raises what went wrong."""
        if self._write is not None and not self._write.done():
            return False
        self.finish()
        return True

    def finish(self) -> None:
        """Wait for the write; raises what went wrong with it."""
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def _copies(self, pieces: Sequence[Piece]) -> list[Piece]:
        """`pieces` in host memory of their own: on the CPU, `.to("cpu")` would not copy."""
        is_cuda = any(piece.tensor.is_cuda for piece in pieces)
        shapes = [(piece.tensor.shape, piece.tensor.dtype) for piece in pieces]
        if shapes != [(buffer.shape, buffer.dtype) for buffer in self._buffers]:
            # From a GPU, copies run at full speed into pinned memory alone.
            self._buffers = [
                torch.empty(shape, dtype=dtype, device="cpu", pin_memory=is_cuda)
                for shape, dtype in shapes
            ]
        with torch.no_grad():
            for piece, buffer in zip(pieces, self._buffers, strict=True):
                buffer.copy_(piece.tensor, non_blocking=True)
        if is_cuda:
            torch.cuda.synchronize()
        return [
            replace(piece, tensor=buffer)
            for piece, buffer in zip(pieces, self._buffers, strict=True)
        ]
