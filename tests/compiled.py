"""The compiled functions, what they are equal to, and how far from it; without pytest."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from roll_sft.engine.attention import rotary_angles, rotate, rotated_in_fp32
from roll_sft.engine.layers import normed_rows, swiglu

# Those of the model of the run below, which finds on disk what was compiled here.
HIDDEN, HEADS, HEAD_DIM, FFN, EPSILON = 64, 4, 16, 160, 3e-5
BOUNDS = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (5e-3, 1e-2)}


def plain_swiglu(pairs: torch.Tensor) -> torch.Tensor:
    gates, gated = pairs.chunk(2, -1)
    return F.silu(gates) * gated


def plain_norm(rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return F.rms_norm(rows, (HIDDEN,), weight, epsilon)


def plain_rotation(
    query: torch.Tensor, key: torch.Tensor, angles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return rotate(query, key, angles, is_compiled=False)


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "swiglu": (swiglu, plain_swiglu),
    "norm": (normed_rows, plain_norm),
    "rotation": (rotated_in_fp32, plain_rotation),
}


def arguments(name: str, length: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[Any]]:
    """The rows and the rest, on the CPU."""
    torch.manual_seed(length)
    if name == "rotation":
        query, key = (torch.randn(length, heads, HEAD_DIM).to(dtype) for heads in (HEADS, 2))
        frequencies = 10_000.0 ** (-torch.arange(HEAD_DIM // 2) / 8)
        angles = rotary_angles(torch.randint(0, length + 3, (length,)), frequencies)
        return [query, key, angles], []
    if name == "norm":
        return [torch.randn(length, HIDDEN).to(dtype)], [torch.randn(HIDDEN).to(dtype), EPSILON]
    return [torch.randn(length, 2 * FFN).to(dtype)], []


def outcome(
    function: Callable[..., Any], rows: list[torch.Tensor], rest: list[Any]
) -> list[torch.Tensor]:
    """The value, and the gradients of what is trained by a sum that tells its parts apart.

    Of two values, both as one [L].
    """
    # Queries and keys are trained, by angles that are not; else the rows, and the weight.
    trained = [each.clone().requires_grad_() for each in rows[: max(1, len(rows) - 1)]]
    rows = [*trained, *rows[len(trained) :]]
    if rest:
        trained.append(rest[0].clone().requires_grad_())
        rest = [trained[-1], *rest[1:]]
    value = flat(function(rows, *rest))
    weights = torch.linspace(0.5, 1.5, value.numel()).view_as(value).to(value)
    (value * weights).sum().backward()
    return [value.detach(), *(each.grad for each in trained if each.grad is not None)]


def flat(value: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """One tensor; of several, all their numbers in one row."""
    if isinstance(value, tuple):
        return torch.cat([each.flatten() for each in value])
    return value


def distance(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((ours.float() - wanted.float()).norm() / wanted.float().norm())
