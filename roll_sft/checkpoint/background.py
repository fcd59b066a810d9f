"""Checkpoints in the background: tensors are copied to host memory, then a thread writes them.

A thread ends with its rank. Megatron-Core's forked writers wait for each other for ever when a rank
is killed. Promises: the copies hold the state at the call of `begin`; the next call raises an error
of the thread.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from roll_sft.checkpoint.tensors import Piece


class BackgroundWriter:
    """Writes one checkpoint at a time. Keeps the memory of its copies for the next one."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._write: Future[None] | None = None

    def begin(self, pieces: Sequence[Piece], write: Callable[[Sequence[Piece]], None]) -> None:
        """Wait for the write before, copy `pieces`, and call `write(copies)` in the thread."""
        self.finish()
        self._write = self._thread.submit(write, self._copies(pieces))

    def is_done(self) -> bool:
        """Whether no write is under way; raises the error of the last one."""
        if self._write is not None and not self._write.done():
            return False
        self.finish()
        return True

    def finish(self) -> None:
        """Wait for the write; raises its error."""
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def _copies(self, pieces: Sequence[Piece]) -> list[Piece]:
        """`pieces` with tensors copied to host memory; on the CPU `.to("cpu")` would not copy."""
        is_cuda = any(piece.tensor.is_cuda for piece in pieces)
        shapes = [(piece.tensor.shape, piece.tensor.dtype) for piece in pieces]
        if shapes != [(buffer.shape, buffer.dtype) for buffer in self._buffers]:
            # Copies from a GPU reach full speed only into pinned memory.
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
