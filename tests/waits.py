"""Which calls wait for the device while a block runs, and whose they are: ours or Megatron's.

On a GPU torch itself says so (`set_sync_debug_mode`). On a CPU nothing waits, so calls are recorded
that would: those that bring a value of a tensor to the host, whose result has a size that depends
on values, or that make a tensor of a Python number. Whose a call is: of the innermost frame that is
not torch's, in the backward as in the forward.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What Python calls to read a tensor or to make one, and operations that look at values.
CALLS = {"item", "tolist", "numpy", "cpu", "tensor", "as_tensor"}
CALLS |= {"__bool__", "__float__", "__int__", "__index__"}
OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
OPERATIONS |= {"_unique2", "unique_dim", "unique_consecutive"}
# A step ends by reading its loss and its norm.
END_OF_STEP = {("engine/engine.py", "read"), ("engine/optimizer.py", "gradient_norm")}
PASSED_OVER = (str(Path(torch.__file__).parent), __file__, "roll_sft/engine/cpu_backend.py")
STANDARD_LIBRARY = str(Path(contextlib.__file__).parent) + "/"


@dataclass(frozen=True)
class Wait:
    what: str
    file: str
    function: str
    line: int

    @property
    def is_ours(self) -> bool:
        return "/megatron/" not in self.file

    @property
    def is_end_of_step(self) -> bool:
        return any(self.file.endswith(f) and self.function == name for f, name in END_OF_STEP)

    def __str__(self) -> str:
        file = self.file.partition("site-packages/")[2] or self.file
        return f"{self.what} in {self.function}, {file}:{self.line}"


@contextlib.contextmanager
def recorded(device: str) -> Iterator[list[Wait]]:
    """What waits while the block runs, in order."""
    waits: list[Wait] = []
    # On this thread, so that the stack of a wait in the backward is whole.
    recorder = _said_by_torch(waits) if device == "cuda" else _looked_for(waits)
    with torch.autograd.set_multithreading_enabled(False), _synchronizing(waits), recorder:
        yield waits


@contextlib.contextmanager
def _synchronizing(waits: list[Wait]) -> Iterator[None]:
    """Also calls of `torch.cuda.synchronize`, which torch's debug mode does not report."""
    original = torch.cuda.synchronize

    def synchronize(*arguments: Any, **options: Any) -> None:
        waits.append(_wait("synchronize"))
        original(*arguments, **options)

    with patch.object(torch.cuda, "synchronize", synchronize):
        yield


@contextlib.contextmanager
def _said_by_torch(waits: list[Wait]) -> Iterator[None]:
    def keep(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            waits.append(_wait("a synchronizing operation"))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = keep
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def _looked_for(waits: list[Wait]) -> Iterator[None]:
    # On a CPU the forward pass turns modes off, that of `_Calls` as well.
    seen = patch.object(torch._C, "DisableTorchFunction", contextlib.nullcontext)
    with seen, _Calls(waits), _Operations(waits):
        yield


class _Calls(TorchFunctionMode):
    def __init__(self, waits: list[Wait]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in CALLS:
            self._waits.append(_wait(name))
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, waits: list[Wait]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        by_counts = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in OPERATIONS or by_mask or by_counts:
            self._waits.append(_wait(name))
        return func(*args, **(kwargs or {}))


def _wait(what: str) -> Wait:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and _is_passed_over(frame.f_code.co_filename):
        frame = frame.f_back
    assert frame is not None, f"{what}: nobody called it"
    return Wait(what, frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno)


def _is_passed_over(file: str) -> bool:
    is_standard = file.startswith(STANDARD_LIBRARY) and "site-packages" not in file
    return is_standard or file.startswith("<") or any(part in file for part in PASSED_OVER)
