"""The output layer and its cross-entropy in one, in chunks of rows: logits never exist at once.

Legend: R rows, D hidden size, V padded vocabulary of the model, W = V / TP columns of this rank.

A chunk's logits become its probabilities and those its gradient, in one buffer; the gradients of
the hidden states and of the weight are formed there and then, in the forward, so that nothing of
size [R, W] outlives a chunk and nothing is computed twice. What is kept for the backward is one
gradient of the size of the rows and one, in fp32, of the size of the weight. That needs the loss to
be a plain sum of rows: `backward` accepts one factor for all of them and no other.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from roll_sft.engine.chunks import chunk_rows


def cross_entropy_of_rows(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, vocab_size: int
) -> torch.Tensor:
    """Cross-entropy in nats of each row, float32 [R], differentiable in `hidden` and `weight`.

    `hidden` [R, D] is equal on all tensor ranks, and its gradient is this rank's part of a sum over
    them (enter through Megatron's copy or gather). `weight` [W, D] holds the rank's words, `labels`
    int64 [R] count over all. Words from `vocab_size` on are padding and take no part: left in, they
    would shift the loss by 1e-4.
    """
    if torch.is_grad_enabled():
        losses: torch.Tensor = _HeadLoss.apply(hidden, weight, labels, vocab_size)
        return losses
    return _forward(hidden, weight, labels, vocab_size=vocab_size, gradients=None)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocab_size: int
    ) -> torch.Tensor:
        gradients = (
            torch.empty_like(hidden),
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device),
        )
        losses = _forward(hidden, weight, labels, vocab_size=vocab_size, gradients=gradients)
        ctx.save_for_backward(*gradients)
        ctx.weight_dtype = weight.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        (grad_losses,) = grad_outputs
        assert grad_losses.stride() == (0,) or grad_losses.numel() < 2, (
            "the loss must be a sum over rows: their gradients are formed with one factor for all"
        )
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grad_losses[:1].sum()  # 0 where there are no rows
        # In place: a copy of the weight's gradient may be a gigabyte, and a graph is walked once.
        return grad_hidden.mul_(factor), grad_weight.mul_(factor).to(ctx.weight_dtype), None, None


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int,
    gradients: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """The losses; adds the gradients of their sum to `gradients` (of hidden and of weight)."""
    width = weight.shape[0]
    first = parallel_state.get_tensor_model_parallel_rank() * width
    num_real = max(0, min(width, vocab_size - first))
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    size = chunk_rows(len(hidden), width)
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        logits = (hidden[rows] @ weight.t()).float()
        logits[:, num_real:] = torch.finfo(torch.float32).min
        local = labels[rows, None] - first
        is_here = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1)
        losses[rows] = _softmax_(logits, local, is_here)
        if gradients is not None:
            # Of cross-entropy by the logits: the probabilities, less one at the label.
            logits.scatter_add_(1, local, -is_here.float())
            gradient = logits.to(hidden.dtype)
            torch.mm(gradient, weight, out=gradients[0][rows])
            if hidden.dtype == torch.float32:
                gradients[1].addmm_(gradient.t(), hidden[rows])
            else:
                gradients[1].add_(gradient.t() @ hidden[rows])
            del gradient
        del logits  # before the next chunk takes as much
    return losses


def _softmax_(logits: torch.Tensor, local: torch.Tensor, is_here: torch.Tensor) -> torch.Tensor:
    """Turn fp32 `logits` [r, W] into probabilities in place; return the losses [r].

    `local` int64 [r, 1] is the label's column where it `is_here`. Two small all-reduces over the
    tensor ranks, of r and of 2 r numbers.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    is_split = parallel_state.get_tensor_model_parallel_world_size() > 1
    largest = logits.amax(dim=1, keepdim=True)
    if is_split:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    logits.sub_(largest)
    picked = logits.gather(1, local) * is_here
    sums = torch.cat([logits.exp_().sum(dim=1, keepdim=True), picked], dim=1)
    if is_split:
        dist.all_reduce(sums, group=group)
    total = sums[:, :1]
    logits.div_(total)
    return (total.log() - sums[:, 1:])[:, 0]
