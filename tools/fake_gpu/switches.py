"""What makes a step cheaper on a GPU, each part left out by itself to count what it saves.

Left out is what stood there before the part: other code that computes the same numbers.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from roll_sft.engine import build, engine, loss, optimizer
from roll_sft.engine.fused import run_compiled
from roll_sft.engine.layers import SwiGLU, swiglu


@contextlib.contextmanager
def left_out(name: str) -> Iterator[None]:
    """Within the block, the engine does without `name`, one of `SWITCHES`."""
    with contextlib.ExitStack() as stack:
        for holder, function, before in SWITCHES[name]:
            stack.enter_context(patch.object(holder, function, before(getattr(holder, function))))
        yield


def _indexed(_: Any) -> Any:
    """SwiGLU that takes its rows by an index, whose backward fills and copies the activation."""

    def forward(_self: SwiGLU, pairs: torch.Tensor) -> torch.Tensor:
        activated: torch.Tensor = run_compiled(swiglu, [pairs[:, 0]])
        return activated[:, None]

    return forward


def _foreach(build_optimizer: Callable[..., Any]) -> Any:
    """torch's own choice of AdamW: one kernel for each operation, over all parameters."""

    def built(*arguments: Any) -> Any:
        made = build_optimizer(*arguments)
        for group in made.param_groups:
            group["fused"], group["foreach"] = False, True
        return made

    return built


def _one_by_one(_: Any) -> Any:
    """Megatron-Core's clipping without Transformer Engine and Apex."""

    def scaled(gradients: list[torch.Tensor], scale: float) -> None:
        for gradient in gradients:
            gradient.copy_(gradient * scale)

    return scaled


def _second_pass(_: Any) -> Any:
    """Linear layers form their gradients in the weight's dtype and add them in a second pass."""
    return lambda config, device: None


def _in_buffer(cross_entropy: Callable[..., Any], *, adds: bool) -> Any:
    """The head's gradient goes into the buffer of gradients at once, or through autograd."""

    def computed(*arguments: Any, adds_to_buffer: bool, **options: Any) -> Any:
        return cross_entropy(*arguments, adds_to_buffer=adds, **options)

    return computed


def _never(_: Any) -> Any:
    return lambda *_, **__: False


def _at_the_end(_: Any) -> Any:
    """Gradients are reduced behind the backward, and weights gathered behind the update."""
    return lambda parallel: (False, False)


SWITCHES: dict[str, tuple[tuple[Any, str, Callable[[Any], Any]], ...]] = {
    "SwiGLU by view": ((SwiGLU, "forward", _indexed),),
    "linear gradients added by products": (
        (engine, "add_in_products", _second_pass),
        (loss, "cross_entropy_of_rows", lambda found: _in_buffer(found, adds=True)),
    ),
    "head's gradient into the buffer": (
        (loss, "cross_entropy_of_rows", lambda found: _in_buffer(found, adds=False)),
    ),
    "compiled functions": ((engine, "choose_compile", _never),),
    "fused AdamW": ((engine, "build_optimizer", _foreach),),
    "clipping in one operation": ((torch, "_foreach_mul_", _one_by_one),),
    "exchanges beside the computation": (
        (build, "overlaps", _at_the_end),
        (optimizer, "overlaps", _at_the_end),
    ),
}
