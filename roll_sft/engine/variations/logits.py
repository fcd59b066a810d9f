"""Logits that are divided or soft-capped before the softmax of `engine/loss.py`, and back.

Legend: r rows of a chunk, W columns of the vocabulary on this tensor rank.
"""

from typing import Any

import torch

from roll_sft.engine.fused import run_compiled
from roll_sft.engine.layers import LayerConfig


def changed_softmax(softmax: Any, config: LayerConfig) -> Any:
    """A softmax of a chunk, as `softmax_of` gives it, that takes the logits of the head itself.

    Both the change and its derivative are of single logits, so ranks exchange no more than before.
    """
    variation = config.variation
    divisor, cap = variation.logits_divisor, variation.logits_softcap
    if divisor == 1.0 and cap is None:
        return softmax

    def call(function: Any, rows: list[torch.Tensor]) -> Any:
        if config.is_compiled:
            return run_compiled(function, rows, divisor, cap)
        return function(*rows, divisor, cap)

    def of_changed(
        logits: torch.Tensor, *places: torch.Tensor, needs_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        changed = call(changed_logits, [logits])
        losses, gradient = softmax(changed, *places, needs_gradient=needs_gradient)
        if gradient is None:
            return losses, None
        return losses, call(unchanged_gradient, [gradient, logits])

    return of_changed


def changed_logits(logits: torch.Tensor, divisor: float, cap: float | None) -> torch.Tensor:
    """[r, W] -> float32 [r, W], a new tensor."""
    values = logits.float() / divisor
    return values if cap is None else cap * torch.tanh(values / cap)


def unchanged_gradient(
    gradient: torch.Tensor, logits: torch.Tensor, divisor: float, cap: float | None
) -> torch.Tensor:
    """The gradient by `logits` [r, W], in their dtype, of that by their `changed_logits`."""
    values = gradient / divisor
    if cap is not None:
        values = values * (1 - torch.tanh(logits.float() / divisor / cap).square())
    return values.to(logits.dtype)
