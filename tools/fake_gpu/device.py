"""Lets fake tensors live on one H100 that does not exist: `torch.cuda` and `torch.distributed`.

Replaces functions of this process for good: those that ask a driver, which there is none of, and
those whose answer is a value, which fake tensors have none of. Groups are torch's `fake` ones,
whose collectives return at once. Everything else runs as it is.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from tools.fake_gpu.meter import Meter

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    L2_cache_size=50 << 20,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    gcnArchName="",
)


class Stream:
    """Stands for streams and events; a wait of the host is recorded."""

    meter: Meter
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def record_event(self, *_: Any) -> "Stream":
        return self

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Record a wait."""
        self.meter.waits.add("synchronize")


def install(meter: Meter, read: Callable[[torch.Tensor], list[Any]]) -> None:
    """Replace the functions; `meter` records, and `read` answers `tolist` of a fake tensor."""
    Stream.meter = meter
    cuda: Any = torch.cuda
    cuda._initialized = True  # else torch asks the driver to begin
    cuda._get_device_properties = lambda *_: H100
    cuda.synchronize = lambda *_: meter.waits.add("synchronize")
    cuda.empty_cache = cuda.manual_seed = lambda *_: None
    cuda.Stream = cuda.Event = cuda.current_stream = cuda.default_stream = Stream
    cuda.stream = lambda stream: stream or Stream()
    cuda.max_memory_allocated = lambda *_: meter.live.peak
    cuda.memory_allocated = lambda *_: meter.live.now
    cuda.reset_peak_memory_stats = lambda *_: None  # the meter's peak begins with a step
    cuda.get_rng_state = cuda.random.get_rng_state = _random_state
    cuda.set_rng_state = cuda.random.set_rng_state = lambda *_, **__: None
    random: Any = megatron_random
    random._get_cuda_rng_state, random._set_cuda_rng_state = _random_state, lambda *_, **__: None
    storage: Any = torch.UntypedStorage
    storage.resize_ = lambda held, num_bytes: meter.resize(held, num_bytes)
    storage.copy_ = lambda held, source, *rest: meter.copy(held, source, *rest)
    tensor: Any = torch.Tensor
    tensor.pin_memory = _pinned
    fake: Any = FakeTensor
    fake.tolist = read
    module: Any = torch.nn.Module
    module._apply = _apply


def fake_mode() -> FakeTensorMode:
    """Fake tensors, which also take what lies on the host and is real, such as a micro-batch."""

    class OnDevice(FakeTensorMode):
        # As if there were no device: else a tensor made of numbers is made there, by a kernel.
        avoid_device_init = True  # type: ignore[assignment]

    return OnDevice(allow_non_fake_inputs=True)


def fake_groups() -> None:
    """Make every process group a fake one."""
    begin, make = dist.init_process_group, dist.new_group

    def init_process_group(_: str, *, rank: int, world_size: int, **__: Any) -> None:
        begin("fake", store=FakeStore(), rank=rank, world_size=world_size)

    def new_group(ranks: Any = None, *_: Any, **__: Any) -> Any:
        return make(ranks, backend="fake")

    def all_gather_object(found: list[Any], value: Any, group: Any = None) -> None:
        found[:] = [value] * len(found)

    for holder in (dist, dist.distributed_c10d):
        holder.init_process_group = init_process_group
        holder.new_group = new_group
        holder.all_gather_object = all_gather_object


def _random_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.zeros(16, dtype=torch.uint8)


def _pinned(tensor: Any, *_: Any) -> Any:
    tensor.is_fake_pinned = True
    return tensor


def _apply(
    module: Any, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> Any:
    """`torch.nn.Module._apply`, which gives a fake parameter on another device up for a new one.

    The marks of the old one, by which Megatron knows what it is, go with it.
    """
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            moved = function(parameter)
        if moved is parameter:
            continue
        made = torch.nn.Parameter(moved, parameter.requires_grad)
        marks = {key: value for key, value in vars(parameter).items() if key not in vars(made)}
        vars(made).update(marks)
        module._parameters[name] = made
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module
