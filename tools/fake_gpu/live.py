"""`LiveBytes`: the device memory that tensors hold, now and at its peak, and who made them."""

import weakref
from collections import Counter
from typing import Any

import torch

from tools.fake_gpu.waits import caller

BLOCK_BYTES = 512  # torch's caching allocator gives whole blocks


class LiveBytes:
    """Adds up the storages of the tensors that it is shown, until each storage dies."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.at_peak: Counter[tuple[str, str]] = Counter()  # by operation and calling function
        self._by_maker: Counter[tuple[str, str]] = Counter()
        self._storages: dict[int, Any] = {}
        self._held: dict[int, tuple[int, tuple[str, str]]] = {}  # bytes, and who made the storage

    def begin_peak(self) -> None:
        """Begin the peak anew."""
        self.peak, self.at_peak = self.now, self._by_maker.copy()

    def add(self, tensor: torch.Tensor, operation: str) -> None:
        """Count the storage of `tensor`, the result of `operation`, if it is on the device."""
        if not tensor.is_cuda or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, lambda _: self._remove(key))
        self._held[key] = 0, (operation, caller())
        self.resized(storage)

    def resized(self, storage: Any) -> bool:
        """Count `storage` at its present size; whether it is one that was shown."""
        if storage._cdata not in self._held:
            return False
        self._hold(storage._cdata, -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES)
        return True

    def _hold(self, key: int, num_bytes: int) -> None:
        before, maker = self._held[key]
        self._held[key] = num_bytes, maker
        self.now += num_bytes - before
        self._by_maker[maker] += num_bytes - before
        if self.now > self.peak:
            self.begin_peak()

    def _remove(self, key: int) -> None:
        self._hold(key, 0)
        del self._storages[key], self._held[key]
