"""`Meter`: what a step does on the device, counted operation by operation.

Each operation of torch's that is no view counts as one kernel, which reads its arguments and writes
its results once. Live bytes are those of the storages that tensors hold, rounded as torch's
allocator rounds them; the scratch memory inside a kernel is not seen.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tools.fake_gpu.live import LiveBytes
from tools.fake_gpu.waits import Waits, caller

_RESIZE, _COPY = torch.UntypedStorage.resize_, torch.UntypedStorage.copy_
# Operations that launch nothing: they allocate, or describe the same memory anew.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}
FREE |= {"_unsafe_view", "_reshape_alias", "device", "set_", "is_pinned"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmm_"}
# Collectives for which torch has no implementation on fake tensors; each returns a handle alone.
COALESCED = {"reduce_scatter_tensor_coalesced_", "allgather_into_tensor_coalesced_"}
COALESCED |= {"allreduce_coalesced_"}


@dataclass(slots=True)
class Counts:
    """Kernels and the bytes that they read and write; collectives and the bytes on the wire."""

    kernels: int = 0
    kernel_bytes: int = 0
    collectives: int = 0
    collective_bytes: int = 0
    largest_collective: int = 0  # bytes
    by_name: dict[str, list[int]] = field(default_factory=dict)  # kernels, bytes

    def add(self, name: str, num_bytes: int, *, is_collective: bool) -> None:
        """One operation."""
        if is_collective:
            self.collectives += 1
            self.collective_bytes += num_bytes
            self.largest_collective = max(self.largest_collective, num_bytes)
        else:
            self.kernels += 1
            self.kernel_bytes += num_bytes
        of_name = self.by_name.setdefault(name, [0, 0])
        of_name[0] += 1
        of_name[1] += num_bytes


class Meter(TorchDispatchMode):
    """Counts while it is entered, inside of a `FakeTensorMode`."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits
        self.counts = Counts()
        self.misplaced: set[str] = set()  # operations between tensors of host and device
        self.wide: set[str] = set()  # products of fp32 matrices
        self.number = 0.0  # what a float of the device is answered with
        self.live = LiveBytes()
        self._is_inside_kernel = False

    def reset_counts(self) -> None:
        """Begin to count anew; live bytes go on."""
        self.counts, self.misplaced, self.wide = Counts(), set(), set()
        self.waits.clear()

    @contextlib.contextmanager
    def one_kernel(self, name: str, arguments: Any) -> Iterator[list[Any]]:
        """Count the block as one kernel of `arguments`; append its results to what is yielded."""
        results: list[Any] = []
        was_inside, self._is_inside_kernel = self._is_inside_kernel, True
        try:
            yield results
        finally:
            self._is_inside_kernel = was_inside
        if not was_inside:
            leaves = [*tree_leaves(arguments), *tree_leaves(results)]
            self._check(name, (), {}, leaves)
            self._count(name, leaves)
            self._track(results, name)

    def resize(self, storage: Any, num_bytes: int) -> Any:
        """`storage.resize_`, by which Megatron-Core frees what it will compute again."""
        _RESIZE(storage, num_bytes)
        self.live.resized(storage)
        return storage

    def copy(self, storage: Any, source: Any, *arguments: Any) -> Any:
        """`storage.copy_`, which is one kernel."""
        if not self.live.resized(storage):
            return _COPY(storage, source, *arguments)
        self.counts.add("storage copy", 2 * source.nbytes(), is_collective=False)
        return storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, and count it."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return self._value(func, args[0])
        if torch.Tag.dynamic_output_shape in func.tags and not _is_plain_index(name, args):
            self.waits.add(name)
        results = FakeWork().boxed() if name in COALESCED else func(*args, **kwargs)
        if self._is_inside_kernel:
            return results
        self._track(results, name)
        if func.is_view or name in FREE or torch.Tag.inplace_view in func.tags:
            return results
        leaves = [*tree_leaves((args, kwargs)), *tree_leaves(results)]
        self._check(name, args, kwargs, leaves)
        self._count(str(func), leaves, is_collective=func.namespace == "c10d")
        return results

    def _value(self, func: Any, tensor: torch.Tensor) -> bool | int | float:
        if tensor.is_cuda:
            self.waits.add("item")
        else:
            with contextlib.suppress(DataDependentOutputException):
                return func(tensor)
        if tensor.dtype == torch.bool:
            return True
        return self.number if tensor.is_floating_point() else 1

    def _count(self, name: str, leaves: list[Any], *, is_collective: bool = False) -> None:
        tensors = {id(each): each for each in leaves if isinstance(each, torch.Tensor)}
        if any(each.is_cuda for each in tensors.values()):
            num_bytes = sum(each.numel() * each.element_size() for each in tensors.values())
            self.counts.add(name, num_bytes, is_collective=is_collective)

    def _check(self, name: str, args: Any, kwargs: dict[str, Any], leaves: list[Any]) -> None:
        tensors = [each for each in leaves if isinstance(each, torch.Tensor)]
        factors = [each for each in args if isinstance(each, torch.Tensor)][-2:]
        if name in PRODUCTS and any(each.dtype == torch.float32 for each in factors):
            self.wide.add(f"{name} of fp32 in {caller()}")
        if len({each.device.type for each in tensors}) < 2:
            return
        if name not in ("_to_copy", "copy_"):
            # A number on the host is an argument of the kernel.
            if len({each.device.type for each in tensors if each.is_cuda or each.dim()}) < 2:
                return
            self.misplaced.add(f"{name} of tensors on host and device in {caller()}")
            return
        source = args[0] if name == "_to_copy" else args[1]
        is_queued = kwargs.get("non_blocking") or (name == "copy_" and True in args[2:])
        if not is_queued or not (source.is_cuda or getattr(source, "is_fake_pinned", False)):
            self.waits.add("copy to the host" if source.is_cuda else "copy to the device")

    def _track(self, results: Any, operation: str) -> None:
        for each in tree_leaves(results):
            if isinstance(each, torch.Tensor):
                self.live.add(each, operation)


def _is_plain_index(name: str, args: Any) -> bool:
    """Whether the result's size is that of an index, not the number of ones in a mask."""
    return name == "index" and not any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )
