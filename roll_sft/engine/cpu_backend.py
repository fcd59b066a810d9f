"""Lets Megatron-Core run without CUDA, on gloo; imported only when no GPU is used.

Megatron-Core asks for CUDA in a few places: factory calls with `device="cuda"`, streams, the random
state, and a test of parameter types; the engine asks for the peak memory. `install` replaces these
calls by their CPU meaning for the whole process, once. Of Megatron-Core it replaces two functions,
which read and write the CUDA random state below torch's public ones. All else runs as it is.

Megatron-Core makes some forty groups. gloo gives each a device whose thread wakes a hundred times a
second: a quarter of a core for four idle ranks. Here all groups share one device.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
PROCESS_STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what to write to CLEAR_REFS so that the peak begins anew; see proc(5)


def install() -> None:
    """Replace the CUDA calls of this process. Not reversible; safe to call again."""
    cuda: Any = torch.cuda
    if getattr(cuda.current_device, "roll_sft_stand_in", False):
        return
    cuda.current_device = _current_device
    cuda.synchronize = _nothing
    cuda.empty_cache = _nothing
    # torch.manual_seed also writes out the stack of its caller, once for each kind of device.
    cuda.manual_seed = torch.default_generator.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = _get_rng_state
    cuda.set_rng_state = cuda.random.set_rng_state = _set_rng_state
    cuda.current_stream = NullStream
    cuda.Stream = cuda.Event = NullStream
    cuda.stream = _same
    cuda.max_memory_allocated = _peak_resident_bytes
    cuda.reset_peak_memory_stats = _reset_peak
    distributed: Any = dist
    distributed.all_to_all_single = functools.partial(_all_to_all, dist.all_to_all_single)
    torch.Tensor.cuda = _same  # type: ignore[assignment]
    torch.nn.Module.cuda = _same  # type: ignore[assignment,method-assign]

    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state
    CudaToCpu().__enter__()
    _finish_before_waking()
    _share_gloo_device()


def _all_to_all(exchange: Callable[..., Any], *tensors: torch.Tensor, **options: Any) -> Any:
    """`exchange` with sizes as numbers: where experts exchange tokens, Megatron brings them to the
    host from CUDA alone."""
    for name in ("output_split_sizes", "input_split_sizes"):
        if isinstance(options.get(name), torch.Tensor):
            options[name] = options[name].tolist()
    return exchange(*tensors, **options)


def _finish_before_waking() -> None:
    """Let a thread that gloo wakes wait until the one that woke it has written its message.

    A sender holds its pair's lock while it writes. The peer that this wakes takes its core, and its
    own loop, which needs the lock, asks for it again and again. With four ranks on two cores this
    was a third of the time. Threads made after this call inherit the policy; see sched(7).
    """
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _share_gloo_device() -> None:
    """Make gloo groups of this process use one device, found as gloo finds each group's own."""
    gloo: Any = dist.distributed_c10d.ProcessGroupGloo
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")
    devices = [
        gloo.create_device(interface=name) if name else gloo.create_default_device()
        for name in interfaces
    ]

    class ProcessGroupGloo(gloo):  # torch asks for this class by its name
        def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
            options = gloo._Options()
            options._devices, options._timeout = devices, timeout
            super().__init__(store, rank, size, options)

    setattr(dist.distributed_c10d, "ProcessGroupGloo", ProcessGroupGloo)  # noqa: B010 -- its name


class CudaToCpu(TorchFunctionMode):
    """Factory calls that name a CUDA device get the CPU; `tensor.type()` answers as on CUDA."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and (isinstance(device, int) or torch.device(device).type == "cuda"):
            kwargs["device"] = CPU
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # DistributedOptimizer accepts only "torch.cuda.*Tensor" parameter types.
            return func(args[0]).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


class NullStream:
    """Stands for streams and events: work on a CPU is already in order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "NullStream":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def record_event(self, *_: Any) -> "NullStream":
        return NullStream()

    def synchronize(self) -> None: ...

    def elapsed_time(self, *_: Any) -> float:
        return 0.0


def _current_device() -> torch.device:
    return CPU


_current_device.roll_sft_stand_in = True  # type: ignore[attr-defined]


def _nothing(*_: Any, **__: Any) -> None: ...


def _same(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _peak_resident_bytes(*_device: Any) -> int:
    """The most memory of its own that this process has held since `_reset_peak`.

    Pages of mapped files, such as the token cache, are the system's and go when others need them.
    The kernel keeps one peak, of all resident pages; those of files change little within a step.
    """
    kib = {"VmHWM": 0, "RssFile": 0, "RssShmem": 0}
    for line in PROCESS_STATUS.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in kib:
            kib[name] = int(value.split()[0])
    return (kib["VmHWM"] - kib["RssFile"] - kib["RssShmem"]) * 1024


def _reset_peak(*_: Any) -> None:
    with contextlib.suppress(OSError):  # a kernel without the file: the peak is that of the process
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)
