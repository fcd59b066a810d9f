"""Masked cross-entropy over supervised rows only, vocabulary-parallel.

Legend: T tokens of this context rank (T / TP of them on each rank under sequence parallelism),
R supervised rows, V padded vocabulary, D hidden size.

The head runs on the rows that carry a label and on no others. Rows are known on the host before the
forward, so selecting them needs no synchronisation. Two mistakes leave the loss right and only the
gradient wrong, so tests compare gradients: without sequence parallelism the hidden states must
enter through `copy_to_tensor_model_parallel_region`, and with it the gather must reduce-scatter its
gradient. Both are done by calling the model's own output layer on the selected rows.

Padded vocabulary rows are masked out of the softmax: left alone they shift the loss by 1e-4.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

# GPTModel.forward takes an output processor from megatron-core 0.19 on.
HAS_OUTPUT_PROCESSOR = "output_processor" in inspect.signature(GPTModel.forward).parameters


@dataclass(frozen=True, slots=True)
class SupervisedRows:
    """What the head needs of one micro-batch on one rank; tensor ranks agree on R."""

    index: torch.Tensor  # int64 [R]: positions in this rank's (shard of) hidden states
    labels: torch.Tensor  # int64 [R of all shards]: in the order the output layer returns rows
    weights: torch.Tensor  # float32 [R of all shards]: 1, or 0 for the filling of short shards
    vocab_size: int  # without padding

    def to(self, device: torch.device) -> "SupervisedRows":
        """The same rows on `device`."""
        return SupervisedRows(
            self.index.to(device), self.labels.to(device), self.weights.to(device), self.vocab_size
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

    Without sequence parallelism `sequence_shards` is 1. With it, each shard's rows are filled up to
    the fullest shard's count, at least one, since the gather needs equal sizes on every rank; the
    filling repeats row 0 with weight 0.
    """
    shard_tokens = num_tokens // sequence_shards
    per_shard = [
        (rows >= shard * shard_tokens) & (rows < (shard + 1) * shard_tokens)
        for shard in range(sequence_shards)
    ]
    counts = [int(mask.sum()) for mask in per_shard]
    fullest = max(1, *counts) if sequence_shards > 1 else max(1, counts[0])
    index = F.pad(
        rows[per_shard[shard_rank]] - shard_rank * shard_tokens, (0, fullest - counts[shard_rank])
    )
    all_labels = torch.cat(
        [F.pad(labels[mask], (0, fullest - n)) for mask, n in zip(per_shard, counts, strict=True)]
    )
    weights = torch.cat([F.pad(torch.ones(n), (0, fullest - n)) for n in counts])
    return SupervisedRows(index, all_labels, weights, vocab_size)


def supervised_losses(
    *,
    hidden_states: torch.Tensor,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    context: SupervisedRows,
    **_: Any,
) -> torch.Tensor:
    """Each row's cross-entropy in nats, float32 [R of all shards]; 0 for the filling.

    `hidden_states` is [T or T / TP, 1, D]. The signature is that of Megatron-Core's
    `output_processor`, which hands over the head with a tied weight already resolved.
    """
    logits, _bias = output_layer(hidden_states[context.index], weight=output_weight)
    per_row = vocab_parallel_cross_entropy(
        mask_padded_vocabulary(logits.float(), context.vocab_size), context.labels[:, None]
    )
    return per_row[:, 0] * context.weights


def mask_padded_vocabulary(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """`logits` [..., V / TP] of this tensor rank with the columns past `vocab_size` at the minimum.

    Slicing instead would break `vocab_parallel_cross_entropy`, which takes a rank's first word from
    the local width.
    """
    width = logits.shape[-1]
    start = parallel_state.get_tensor_model_parallel_rank() * width
    num_real = max(0, min(width, vocab_size - start))
    if num_real == width:
        return logits
    padded = torch.arange(width, device=logits.device) >= num_real
    return logits.masked_fill(padded, torch.finfo(logits.dtype).min)


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
