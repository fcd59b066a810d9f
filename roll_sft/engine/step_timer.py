"""How long a rank computes in a step: from its first micro-batch to the reduction of gradients.

Until then data ranks do not wait for each other, so a slow one shows; ranks of one replica of the
model do, and show the time of their slowest. Promise: nothing waits for a measurement. On a GPU
events are put into the stream, and are read after the step, which has waited for its loss.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from roll_sft.engine.engine import Engine


class _Timer:
    """Stands in for Megatron's function that reduces the gradients at the end of a step."""

    def __init__(self, engine: "Engine", reduce: Callable[..., object]) -> None:
        self._reduce, self._beat = reduce, engine.on_micro_batch
        self._is_cuda = next(engine.chunks[0].parameters()).is_cuda
        self._begun: Any = None
        self._spans = list[tuple[Any, Any]]()
        engine.on_micro_batch = self._on_micro_batch

    def __call__(self, *args: Any, **options: Any) -> object:
        if self._begun is not None:
            self._spans.append((self._begun, self._now()))
            self._begun = None
        return self._reduce(*args, **options)

    def take(self) -> list[float]:
        """The seconds of the steps since the last call."""
        spans, self._spans = self._spans, []
        if self._is_cuda:
            return [begun.elapsed_time(ended) / 1e3 for begun, ended in spans]
        return [ended - begun for begun, ended in spans]

    def _on_micro_batch(self) -> None:
        if self._begun is None and torch.is_grad_enabled():  # an evaluation has no gradients
            self._begun = self._now()
        self._beat()

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def times(engine: "Engine", _argument: None) -> tuple[str, list[float]]:
    """This rank's device, and the seconds of each step since the last call.

    The first call begins to measure.
    """
    config: Any = engine.chunks[0].config
    if not isinstance(config.finalize_model_grads_func, _Timer):
        config.finalize_model_grads_func = _Timer(engine, config.finalize_model_grads_func)
    timer: _Timer = config.finalize_model_grads_func
    if not timer._is_cuda:
        return "CPU", timer.take()
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{properties.name}, GPU-{properties.uuid}", timer.take()
