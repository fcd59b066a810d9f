"""The output layer and its masked cross-entropy, over supervised rows only, vocabulary-parallel.

Legend: T tokens of this context rank (T / TP of them on each rank under sequence parallelism),
R supervised rows, r rows of a chunk, D hidden size, V padded vocabulary, W = V / TP columns of this
rank.

The head runs on the rows that carry a label and on no others. The host knows them before the
forward, so selecting them needs no synchronisation. Under sequence parallelism each shard's rows
are gathered, not all hidden states. Two mistakes leave the loss right and only the gradient wrong,
so tests compare gradients: without sequence parallelism the hidden states must enter through
`copy_to_tensor_model_parallel_region`, and with it the gather must reduce-scatter its gradient.

Logits never exist at once: the head takes rows in chunks. A chunk's logits become its probabilities
and those its gradient, in one buffer, and the gradients of the hidden states and of the weight are
formed there and then, in the forward. So nothing of size [R, W] outlives a chunk and nothing is
computed twice. The backward needs one gradient of the size of the rows and one, in fp32, of the
size of the weight. That requires the loss to be a plain sum of rows: `backward` accepts one factor
for all of them and no other.

Where linear layers add their gradients to the fp32 buffer at once (`fused.add_in_products`), so
does the head: each chunk adds to `weight.main_grad`, and no other tensor of the weight's size
exists. The factor must then be 1, as it is in Megatron's schedules with a loss per token.
"""

import functools
import inspect
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from roll_sft.base.metrics import chunk_rows
from roll_sft.engine.fused import add_product, run_compiled
from roll_sft.engine.micro_batch import SupervisedRows

# GPTModel.forward takes an output processor from megatron-core 0.19 on.
HAS_OUTPUT_PROCESSOR = "output_processor" in inspect.signature(GPTModel.forward).parameters


def loss_arguments(rows: SupervisedRows) -> dict[str, Any]:
    """Keyword arguments of the model's forward that make it return `supervised_losses`."""
    if HAS_OUTPUT_PROCESSOR:
        return {"output_processor": supervised_losses, "output_processor_context": rows}
    return {"labels": rows}


class SupervisedGPTModel(GPTModel):
    """`GPTModel` before 0.19: `labels=SupervisedRows` reaches the head through `_postprocess`."""

    def _postprocess(self, hidden_states: Any, labels: Any = None, **rest: Any) -> Any:
        if not self.post_process or not isinstance(labels, SupervisedRows):
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **rest)
        tied = self.share_embeddings_and_output_weights
        return supervised_losses(
            hidden_states=hidden_states,
            output_layer=self.output_layer,
            output_weight=self.shared_embedding_or_output_weight() if tied else None,
            context=labels,
        )


def supervised_losses(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    context: SupervisedRows,
    **_: Any,
) -> torch.Tensor:
    """Each row's cross-entropy in nats, float32 [R], in the order of the tokens.

    `hidden_states` is [T or T / TP, 1, D]. The signature is that of Megatron-Core's
    `output_processor`, which hands over the head with a tied weight already resolved.
    """
    rows = hidden_states.flatten(0, 1)[context.index]
    if context.is_sharded:
        rows = gather_from_sequence_parallel_region(rows, tensor_parallel_output_grad=True)
    else:
        rows = copy_to_tensor_model_parallel_region(rows)
    if context.kept is not None:
        rows = rows[context.kept]
    # The head is computed here, not by its module, before whose call DistributedDataParallel waits
    # until the updated weight is gathered (`engine/overlap.py`).
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())
    weight = output_layer.weight if output_weight is None else output_weight
    assert isinstance(weight, torch.Tensor), f"the head's weight is a {type(weight).__name__}"
    config = output_layer.config
    if context.factors is not None:
        from roll_sft.engine.recipes.objective import objective_of_rows

        return objective_of_rows(rows, weight, context, config=config)
    if config.variation is not None or context.hits is not None:
        softmax = _softmax_of(weight, vocab_size=context.vocab_size, is_compiled=config.is_compiled)
        if config.variation is not None:
            from roll_sft.engine.variations.logits import changed_softmax

            softmax = changed_softmax(softmax, config)
        if context.hits is not None:
            from roll_sft.engine.validation import Counted

            softmax = Counted(softmax, context, weight.shape[0])
        adds = config.gradient_accumulation_fusion
        return _losses(rows, weight, context.labels, softmax, adds)
    return cross_entropy_of_rows(
        rows,
        weight,
        context.labels,
        vocab_size=context.vocab_size,
        is_compiled=config.is_compiled,
        adds_to_buffer=config.gradient_accumulation_fusion,
    )


def cross_entropy_of_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int,
    is_compiled: bool = False,
    adds_to_buffer: bool = False,
) -> torch.Tensor:
    """Cross-entropy in nats of each row, float32 [R], differentiable in `hidden` and `weight`.

    `hidden` [R, D] is equal on all tensor ranks, and its gradient is this rank's part of a sum over
    them (enter through Megatron's copy or gather). `weight` [W, D] holds the rank's columns of the
    vocabulary, `labels` int64 [R] are ids of the whole. Ids from `vocab_size` on are padding and
    take no part: left in, they would shift the loss by 1e-4.

    With `adds_to_buffer` the forward adds the weight's gradient to `weight.main_grad` (float32
    [W, D], of DistributedDataParallel), and the backward must be of the plain sum of all rows.
    """
    softmax = _softmax_of(weight, vocab_size=vocab_size, is_compiled=is_compiled)
    return _losses(hidden, weight, labels, softmax, adds_to_buffer)


def _losses(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softmax: Any, adds: bool
) -> torch.Tensor:
    if torch.is_grad_enabled():
        losses: torch.Tensor = HeadLoss.apply(hidden, weight, labels, softmax, adds)
        return losses
    return _forward(hidden, weight, labels, softmax=softmax, gradients=None)


class HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: Any,
        labels: torch.Tensor,
        softmax: Any,
        adds_to_buffer: bool,
    ) -> torch.Tensor:
        grad_hidden = torch.empty_like(hidden)
        if not ctx.needs_input_grad[1] or adds_to_buffer:
            grad_weight = weight.main_grad if ctx.needs_input_grad[1] else None  # if frozen
            ctx.save_for_backward(grad_hidden)
        else:
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight = weight
        return _forward(
            hidden, weight, labels, softmax=softmax, gradients=(grad_hidden, grad_weight)
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        (grad_losses,) = grad_outputs
        assert grad_losses.stride() == (0,) or grad_losses.numel() < 2, (
            "the loss must be a sum over rows: their gradients are formed with one factor for all"
        )
        grad_hidden, *grad_weight = ctx.saved_tensors
        if ctx.needs_input_grad[1] and not grad_weight:
            # On a GPU this would wait for the device.
            assert grad_losses.is_cuda or (grad_losses == 1).all(), (
                "the loss must be the plain sum of rows: the weight's gradient has been added"
            )
            return grad_hidden, _added(ctx.weight), None, None, None
        factor = grad_losses[:1].sum()  # 0 where there are no rows
        # In place: a copy of the weight's gradient may be a gigabyte, and a graph runs once.
        grad_hidden.mul_(factor)
        of_weight = grad_weight[0].mul_(factor).to(ctx.weight.dtype) if grad_weight else None
        return grad_hidden, of_weight, None, None, None


def _added(weight: Any) -> torch.Tensor | None:
    """What autograd gets in place of a gradient that is in `weight.main_grad` already.

    DistributedDataParallel learns that the gradient is complete where autograd accumulates it, so
    there must be one. It holds no numbers: Megatron's own stand-in has the size of the weight.
    """
    if getattr(weight, "zero_out_wgrad", False):
        return None  # the embedding's gradient of the same weight follows, and is to be added
    weight.grad_added_to_main_grad = True
    empty = torch.sparse_coo
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device, layout=empty)


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    softmax: Any,
    gradients: tuple[torch.Tensor, torch.Tensor | None] | None,
) -> torch.Tensor:
    """The losses; adds the gradients of their sum to `gradients` (of hidden and of weight).

    That of a frozen weight is None.
    """
    width = weight.shape[0]
    first = parallel_state.get_tensor_model_parallel_rank() * width
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    size = chunk_rows(len(hidden), width, on_gpu=hidden.is_cuda)
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        local = labels[rows, None] - first
        is_here = (local >= 0) & (local < width)
        # Do not bind the logits to a name: the softmax frees them.
        losses[rows], gradient = softmax(
            hidden[rows] @ weight.t(),
            local.clamp(0, width - 1),
            is_here,
            needs_gradient=gradients is not None,
        )
        if gradients is not None:
            torch.mm(gradient, weight, out=gradients[0][rows])
            if gradients[1] is not None:
                add_product(gradients[1], gradient.t(), hidden[rows])
        del gradient  # before the next chunk takes as much
    return losses


def _softmax_of(weight: torch.Tensor, *, vocab_size: int, is_compiled: bool) -> Any:
    """The softmax of a chunk: logits [r, W], `local` int64 and `is_here` [r, 1] -> losses [r].

    With `needs_gradient` also the losses' gradient by the logits, [r, W] in their dtype. `local` is
    the column of the label if it is one of this rank's (`is_here`).
    """
    width = weight.shape[0]
    first = parallel_state.get_tensor_model_parallel_rank() * width
    num_real = max(0, min(width, vocab_size - first))
    return functools.partial(_compiled_softmax if is_compiled else _softmax, num_real=num_real)


def _softmax(
    logits: torch.Tensor,
    local: torch.Tensor,
    is_here: torch.Tensor,
    *,
    num_real: int,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The softmax op by op, in one fp32 buffer."""
    dtype = logits.dtype
    logits = logits.float()
    logits[:, num_real:] = torch.finfo(torch.float32).min
    largest = over_tensor_ranks(logits.amax(dim=1, keepdim=True), dist.ReduceOp.MAX)
    logits.sub_(largest)
    picked = logits.gather(1, local) * is_here
    sums = torch.cat([logits.exp_().sum(dim=1, keepdim=True), picked], dim=1)
    sums = over_tensor_ranks(sums, dist.ReduceOp.SUM)
    total = sums[:, :1]
    losses = (total.log() - sums[:, 1:])[:, 0]
    if not needs_gradient:
        return losses, None
    # The gradient of cross-entropy by the logits: the probabilities, less one at the label.
    logits.div_(total)
    logits.scatter_add_(1, local, -is_here.float())
    return losses, logits.to(dtype)


def _compiled_softmax(
    logits: torch.Tensor,
    local: torch.Tensor,
    is_here: torch.Tensor,
    *,
    num_real: int,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The softmax that reads the logits once for the sums and once for the gradient."""
    of_rank, total = run_compiled(exponential_sums, [logits], num_real)
    largest = over_tensor_ranks(of_rank.clone(), dist.ReduceOp.MAX)
    picked = (logits.gather(1, local).float() - largest) * is_here
    sums = torch.cat([total * (of_rank - largest).exp(), picked], dim=1)
    sums = over_tensor_ranks(sums, dist.ReduceOp.SUM)
    total = sums[:, :1].contiguous()
    losses = (total.log() - sums[:, 1:])[:, 0]
    if not needs_gradient:
        return losses, None
    per_row = [largest, total, torch.where(is_here, local, -1)]
    return losses, run_compiled(logit_gradient, [logits, *per_row], num_real)


def exponential_sums(logits: torch.Tensor, num_real: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(largest, sum of exponentials relative to it) of the first `num_real` columns of [r, W].

    Both float32 [r, 1].
    """
    values = logits.float()
    if num_real < logits.shape[1]:
        values = values.masked_fill(columns_of(logits) >= num_real, torch.finfo(torch.float32).min)
    largest = values.amax(dim=1, keepdim=True)
    return largest, (values - largest).exp().sum(dim=1, keepdim=True)


def logit_gradient(
    logits: torch.Tensor,
    largest: torch.Tensor,
    total: torch.Tensor,
    local: torch.Tensor,
    num_real: int,
) -> torch.Tensor:
    """The probabilities [r, W], less one at column `local` int64 [r, 1] (-1: in no column)."""
    columns = columns_of(logits)
    gradient = (logits.float() - largest).exp() / total - (columns == local).float()
    if num_real < logits.shape[1]:
        gradient = gradient.masked_fill(columns >= num_real, 0.0)
    return gradient.to(logits.dtype)


def columns_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.arange(logits.shape[1], device=logits.device)


def over_tensor_ranks(values: torch.Tensor, operation: Any) -> torch.Tensor:
    """`values` [r, 1 or 2], reduced in place over the tensor ranks."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        group = parallel_state.get_tensor_model_parallel_group()
        dist.all_reduce(values, op=operation, group=group)
    return values
