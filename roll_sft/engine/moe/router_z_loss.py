"""The z-loss of routers, which keeps their logits small (ST-MoE, arXiv:2202.08906, equation 5).

The mean of logsumexp(logits)^2 over all pairs of a layer with experts and a real token of the
global batch, tokens without a label too, times `moe.z_loss_coef`. So no layout, packing or split
into micro-batches changes it. Megatron's own is a mean over a micro-batch, and its scale follows
the loss mask. Needs the number of tokens of the global batch, and no pass beside the training pass.

Legend: N tokens of this rank's part of the sequence, E experts.
"""

from typing import Any

import torch
import torch.distributed as dist


class _AddZLoss(torch.autograd.Function):
    """Logits as they are, whose gradient gets that of the z-loss times `slope`."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, is_real: torch.Tensor, slope: float
    ) -> torch.Tensor:
        ctx.save_for_backward(logits, is_real)
        ctx.slope = slope
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, is_real = ctx.saved_tensors
        wide = logits.float()
        sums = wide.logsumexp(dim=-1, keepdim=True)
        added = (wide - sums).exp() * (2 * ctx.slope * sums * is_real)
        return grads[0] + added.to(grads[0].dtype), None, None


class RouterZLoss:
    """The z-loss of all routers of this rank."""

    def __init__(self, coefficient: float, *, num_layers: int) -> None:
        """`num_layers` are those with experts, of the whole model."""
        self._coefficient, self._num_layers = coefficient, num_layers
        self._slope = 0.0
        self._pairs = 1.0
        self._total = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())

    def begin(self, tokens: torch.Tensor) -> None:
        """`tokens` of the global batch, float64 [2]: with a label, and real ones."""
        supervised, real = tokens.tolist()
        self._pairs = max(1.0, real * self._num_layers)
        # The loss is a sum until it is divided by the supervised tokens of the global batch.
        self._slope = self._coefficient * supervised / self._pairs
        self._total.zero_()

    def penalized(self, logits: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """`logits` [N, E] as they are; `padding_mask` bool of N numbers, True where padding is."""
        if not torch.is_grad_enabled():  # counting, evaluating, or computed again later
            return logits
        is_real = torch.ones_like(logits[:, :1], dtype=torch.float32)
        if padding_mask is not None:
            is_real = (~padding_mask).reshape(-1, 1).float()
        with torch.no_grad():
            squares = logits.float().logsumexp(dim=-1, keepdim=True).square()
            self._total += (squares * is_real).double().sum()
        added: torch.Tensor = _AddZLoss.apply(logits, is_real, self._slope)
        return added

    def mean(self) -> float:
        """Of the last global batch, without its coefficient; collective, after its gradients."""
        dist.all_reduce(self._total)  # tensor ranks have parts of the sequence, stages layers
        return float(self._total) / self._pairs
