"""Packed (THD) core attention with context parallelism, on torch's scaled dot product.

Legend: T tokens of this context rank, P tokens of the whole pack, H query heads and G key/value
groups of this tensor rank, E head dimension.

Megatron's local core attention takes neither packed sequences nor context parallelism; this one
takes both.

Context parallelism uses the zig-zag split: of 2 x CP chunks of each sample, context rank r holds
chunks r and 2 x CP - 1 - r, so every rank does the same share of a causal triangle. Keys and values
are gathered (their gradient is reduce-scattered); queries stay where they are.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig

from roll_sft.data.batch import zigzag_inverse


class PackedAttention(MegatronModule):
    """Causal attention inside each sample of a pack; Megatron's `core_attention` slot."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config=config)
        self.context_group = parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> torch.Tensor:
        """`query` [T, H, E], `key` and `value` [T, G, E] -> [T, H * E], same dtype and device."""
        boundaries = packed_seq_params.cu_seqlens_q.tolist()
        size, rank = self.context_group.size(), self.context_group.rank()
        if size > 1:
            back = zigzag_inverse(packed_seq_params.cu_seqlens_q, context_size=size)
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self.context_group)[back]
                for x in (key, value)
            )
        outputs, taken = [], 0
        for start, end in itertools.pairwise(boundaries):
            for first, last in _query_chunks(end - start, size, rank):
                count = last - first
                outputs.append(
                    _attend(
                        query[taken : taken + count],
                        key[start : start + last],
                        value[start : start + last],
                    )
                )
                taken += count
        return torch.cat(outputs).flatten(1)


def _query_chunks(length: int, size: int, rank: int) -> list[tuple[int, int]]:
    """[first, last) of the query chunks that context `rank` holds of a sample of `length`."""
    if size == 1:
        return [(0, length)]
    chunk = length // (2 * size)
    return [(i * chunk, (i + 1) * chunk) for i in (rank, 2 * size - 1 - rank)]


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last `len(query)` positions of `key`: [t, H, E] over [P, G, E]."""
    num_queries, num_keys = query.shape[0], key.shape[0]
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    mask = None
    if num_queries < num_keys:
        # is_causal aligns the triangle to the top left; a later chunk needs it at the bottom right.
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_queries)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return output[0].transpose(0, 1)
