"""Stands for torch.compile: one kernel forward and one backward for each compiled function.

torch's own partitioner says what the forward keeps for the backward. What comes out of a kernel is
only allocated; the function runs op by op once for each shape, to learn its results.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import aot_function, min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from tools.fake_gpu.meter import Meter

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """What is known of a tensor that holds nothing."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Any) -> Any:
        """Of a tensor; any other value as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        return cls(value.shape, value.stride(), value.dtype, value.device)

    def empty(self) -> torch.Tensor:
        """A tensor of this layout, in the current mode."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


class FakeCompiler:
    """Takes the place of the compiler in `roll_sft/engine/fused.py`."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        # By function and layouts of its arguments: whether it gives a tuple, and its results.
        self._results: dict[Any, tuple[bool, list[Layout]]] = {}
        self._kept: dict[Any, list[int | Layout]] = {}

    def __call__(self, function: Function) -> Function:
        """`function`, compiled."""

        def call(*arguments: Any) -> Any:
            tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
            if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
                return _Kernel.apply(self, function, *arguments)
            return self.forward(function, arguments)

        return call

    def forward(self, function: Function, arguments: Any) -> Any:
        """The results of the compiled `function`."""
        key = function, *map(Layout.of, arguments)
        with self.meter.one_kernel(function.__name__, arguments) as results:
            if key not in self._results:
                found = function(*arguments)
                parts = found if isinstance(found, tuple) else (found,)
                self._results[key] = isinstance(found, tuple), [*map(Layout.of, parts)]
                del found, parts
            is_tuple, layouts = self._results[key]
            results.extend(layout.empty() for layout in layouts)
        return tuple(results) if is_tuple else results[0]

    def kept(self, function: Function, arguments: Any) -> list[torch.Tensor]:
        """What the forward keeps: some of `arguments`, and what it computes beside its results."""
        key = function, *map(Layout.of, arguments)
        if key not in self._kept:
            with _disable_current_modes():
                needs = [
                    isinstance(each, torch.Tensor) and each.requires_grad for each in arguments
                ]
                self._kept[key] = _kept_by_partitioner(function, key[1:], needs)
        return [
            arguments[each] if isinstance(each, int) else each.empty() for each in self._kept[key]
        ]


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compiler: FakeCompiler, function: Function, *arguments: Any) -> Any:
        ctx.compiler, ctx.function = compiler, function
        ctx.layouts = [*map(Layout.of, arguments)]
        ctx.save_for_backward(*compiler.kept(function, arguments))
        return compiler.forward(function, arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        needed = ctx.needs_input_grad[2:]
        name = f"{ctx.function.__name__} backward"
        with ctx.compiler.meter.one_kernel(name, (ctx.saved_tensors, gradients)) as results:
            found = [
                layout.empty() if is_needed else None
                for layout, is_needed in zip(ctx.layouts, needed, strict=True)
            ]
            results.extend(each for each in found if each is not None)
        return None, None, *found


def _kept_by_partitioner(
    function: Function, arguments: tuple[Any, ...], needs_gradient: list[bool]
) -> list[int | Layout]:
    """Places among `arguments`, and layouts of what else is kept."""
    places = [place for place, each in enumerate(arguments) if isinstance(each, Layout)]
    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def of_tensors(*tensors: torch.Tensor) -> Any:
        values = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        return function(*values)

    compiled = aot_function(
        of_tensors,
        fw_compiler=keep,
        bw_compiler=keep,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    with FakeTensorMode(), torch.enable_grad():
        tensors = [arguments[place].empty() for place in places]
        for place, tensor in zip(places, tensors, strict=True):
            tensor.requires_grad_(needs_gradient[place])
        outputs = compiled(*tensors)
    num_outputs = len(outputs) if isinstance(outputs, tuple | list) else 1
    (returned,) = next(node for node in graphs[0].graph.nodes if node.op == "output").args
    inputs = [node for node in graphs[0].graph.nodes if node.op == "placeholder"]
    return [
        places[inputs.index(node)] if node in inputs else Layout.of(node.meta["val"])
        for node in returned[num_outputs:]
    ]
