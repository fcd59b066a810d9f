"""Masked cross-entropy over supervised rows only, vocabulary-parallel.

Legend: T tokens of this context rank (T / TP of them on each rank under sequence parallelism),
R supervised rows, V padded vocabulary, D hidden size.

The head runs on the rows that carry a label and on no others. Rows are known on the host before the
forward, so selecting them needs no synchronisation. Two mistakes leave the loss right and only the
gradient wrong, so tests compare gradients: without sequence parallelism the hidden states must
enter through `copy_to_tensor_model_parallel_region`, and with it the gather must reduce-scatter its
gradient.

Under sequence parallelism each shard's rows are gathered, not all hidden states. The gather needs
equal sizes, so short shards are filled up and the filling is dropped behind it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from roll_sft.engine import compiling
from roll_sft.engine.head import cross_entropy_of_rows

# GPTModel.forward takes an output processor from megatron-core 0.19 on.
HAS_OUTPUT_PROCESSOR = "output_processor" in inspect.signature(GPTModel.forward).parameters


@dataclass(frozen=True, slots=True)
class SupervisedRows:
    """What the head needs of one micro-batch on one rank; tensor ranks agree on all but `index`."""

    index: torch.Tensor  # int64: positions in this rank's (shard of) hidden states, with filling
    kept: torch.Tensor | None  # int64 [R]: which of the entered rows are no filling; None = all
    labels: torch.Tensor  # int64 [R], in the order of the tokens
    vocab_size: int  # without padding
    is_sharded: bool  # whether each tensor rank has a part of the sequence

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "SupervisedRows":
        """The same with tensors where `move` brings them."""
        return replace(
            self,
            index=move(self.index),
            kept=None if self.kept is None else move(self.kept),
            labels=move(self.labels),
        )


def supervised_rows(
    rows: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_tokens: int,
    vocab_size: int,
    sequence_shards: int,
    shard_rank: int,
) -> SupervisedRows:
    """Rows int64 [R] (ascending) and their labels int64 [R] -> what this rank's head takes.

    Without sequence parallelism `sequence_shards` is 1. A shard enters as many rows as the fullest
    one and at least one, since collectives of nothing are not to be relied on; the filling repeats
    its row 0.
    """
    shard_tokens = num_tokens // sequence_shards
    bounds = torch.arange(sequence_shards + 1) * shard_tokens
    ends: list[int] = torch.searchsorted(rows, bounds).tolist()
    counts = [end - start for start, end in pairwise(ends)]
    fullest = max(1, *counts)
    mine = rows[ends[shard_rank] : ends[shard_rank + 1]] - shard_rank * shard_tokens
    kept = None
    if fullest * sequence_shards > len(rows):
        places = [torch.arange(n) + shard * fullest for shard, n in enumerate(counts)]
        kept = torch.cat(places)
    return SupervisedRows(
        index=F.pad(mine, (0, fullest - len(mine))),
        kept=kept,
        labels=labels,
        vocab_size=vocab_size,
        is_sharded=sequence_shards > 1,
    )


def supervised_losses(
    *,
    hidden_states: torch.Tensor,
    output_layer: torch.nn.Module,
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
    weight = output_layer.weight if output_weight is None else output_weight
    assert isinstance(weight, torch.Tensor), f"the head's weight is a {type(weight).__name__}"
    return cross_entropy_of_rows(
        rows,
        weight,
        context.labels,
        vocab_size=context.vocab_size,
        is_compiled=compiling.is_on(output_layer.config),
    )


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


def loss_arguments(rows: SupervisedRows) -> dict[str, Any]:
    """Keyword arguments of the model's forward that make it return `supervised_losses`."""
    if HAS_OUTPUT_PROCESSOR:
        return {"output_processor": supervised_losses, "output_processor_context": rows}
    return {"labels": rows}
