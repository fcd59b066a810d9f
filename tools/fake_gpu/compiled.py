"""Stands for torch.compile: one kernel forward and one backward for each compiled function."""

from collections.abc import Callable
from typing import Any

import torch

from tools.fake_gpu.meter import Meter

Function = Callable[..., Any]


class FakeCompiler:
    """Takes the place of the compiler in `roll_sft/engine/fused.py`.

    A function runs op by op, forward and backward, on the first arguments of each shape; after that
    its results are only allocated.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._results: dict[Any, Any] = {}  # shapes and dtypes, of a function and its arguments

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
        with self._meter.one_kernel(function.__name__, arguments) as results:
            key = function, *map(_description, arguments)
            if key not in self._results:
                found = function(*arguments)
                parts = found if isinstance(found, tuple) else (found,)
                self._results[key] = isinstance(found, tuple), [*map(_description, parts)]
            is_tuple, parts = self._results[key]
            results.extend(_empty(each) for each in parts)
        return tuple(results) if is_tuple else results[0]

    def backward(self, function: Function, arguments: Any, gradient: Any, needed: Any) -> list[Any]:
        """The gradients of those of `arguments` that are `needed`."""
        name = f"{function.__name__} backward"
        wanted = [each for each, is_needed in zip(arguments, needed, strict=True) if is_needed]
        with self._meter.one_kernel(name, (arguments, gradient)) as results:
            key = name, function, *map(_description, arguments), tuple(needed)
            if key not in self._results:
                with torch.enable_grad():
                    leaves = [
                        each.detach().requires_grad_() if is_needed else each
                        for each, is_needed in zip(arguments, needed, strict=True)
                    ]
                    outputs = function(*leaves)
                inputs = [each for each, is_needed in zip(leaves, needed, strict=True) if is_needed]
                torch.autograd.grad(outputs, inputs, gradient)
                self._results[key] = True
            results.extend(map(torch.empty_like, wanted))
        return list(results)


class _Kernel(torch.autograd.Function):
    """Keeps what enters the function; the backward computes the rest anew, as torch does."""

    @staticmethod
    def forward(ctx: Any, compiler: FakeCompiler, function: Function, *arguments: Any) -> Any:
        ctx.compiler, ctx.function = compiler, function
        ctx.save_for_backward(*(each for each in arguments if isinstance(each, torch.Tensor)))
        ctx.others = [None if isinstance(each, torch.Tensor) else each for each in arguments]
        ctx.is_tensor = [isinstance(each, torch.Tensor) for each in arguments]
        return compiler.forward(function, arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        saved = iter(ctx.saved_tensors)
        arguments = [
            next(saved) if is_tensor else each
            for each, is_tensor in zip(ctx.others, ctx.is_tensor, strict=True)
        ]
        needed = ctx.needs_input_grad[2:]
        found = iter(ctx.compiler.backward(ctx.function, arguments, gradients[0], needed))
        return None, None, *(next(found) if is_needed else None for is_needed in needed)


def _description(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    return argument


def _empty(description: Any) -> torch.Tensor:
    shape, strides, dtype, device = description
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)
