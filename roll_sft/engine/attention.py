"""Packed (THD) core attention with context parallelism, on a choice of kernels.

Legend: T tokens of this context rank, P tokens of the whole pack, K keys that the segments list, N
segments, H query heads and G key/value groups of this tensor rank, E head dimension.

Megatron's local core attention takes neither packed sequences nor context parallelism; this one
takes both. A *segment* is a run of queries with the keys before and among them: a sample without
context parallelism, and each of a rank's two zig-zag chunks of a sample with it. The last query of
a segment sees all its keys (a causal triangle aligned to the bottom right), so every kernel for
packed sequences computes segments, and which one does is the only difference between backends.

Under context parallelism keys and values are gathered (their gradient is reduce-scattered) and
queries stay where they are; rank r holds chunks r and 2 x CP - 1 - r of each sample, the same share
of its triangle on every rank.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig

from roll_sft.data.steps.batch import zigzag_inverse
from roll_sft.engine.attention_kernels import Kernel


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of one pack on one context rank; made on the host, once for all layers."""

    query_lengths: tuple[int, ...]  # N
    key_lengths: tuple[int, ...]  # N
    query_bounds: torch.Tensor  # int32 [N + 1]
    key_bounds: torch.Tensor  # int32 [N + 1]
    key_index: torch.Tensor | None  # int64 [K] into the gathered keys; None: keys as they lie

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Segments":
        """The same with tensors where `move` brings them."""
        return replace(
            self,
            query_bounds=move(self.query_bounds),
            key_bounds=move(self.key_bounds),
            key_index=None if self.key_index is None else move(self.key_index),
        )


@dataclass
class PackedSegments(PackedSeqParams):
    """Megatron's description of a pack, with its segments."""

    segments: Segments | None = None


def describe_pack(
    segments: Segments, positions_T: torch.Tensor, *, max_seqlen: int
) -> PackedSegments:
    """What the model's forward takes of a pack, as `packed_seq_params`; its longest sample has
    `max_seqlen` tokens. `positions_T` is int64 [1, T], for `rotary`.
    """
    return PackedSegments(
        qkv_format="thd",
        segments=segments,
        cu_seqlens_q=positions_T[0],
        cu_seqlens_kv=positions_T[0],
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )


def segments_of(cu_seqlens: torch.Tensor, *, context_size: int, context_rank: int) -> Segments:
    """`cu_seqlens` int32 [S + 1] of the whole pack -> this rank's segments; all on the CPU.

    The index of keys undoes the zig-zag order of the gather and lists every segment's keys.
    """
    bounds = cu_seqlens.tolist()
    queries, keys, starts = [], [], []
    for start, end in itertools.pairwise(bounds):
        for first, last in _chunks(end - start, context_size, context_rank):
            queries.append(last - first)
            keys.append(last)
            starts.append(start)
    index = None
    if context_size > 1:
        places = [torch.arange(s, s + n) for s, n in zip(starts, keys, strict=True)]
        index = zigzag_inverse(cu_seqlens, context_size=context_size)[torch.cat(places)]
    return Segments(
        query_lengths=tuple(queries),
        key_lengths=tuple(keys),
        query_bounds=_bounds(queries),
        key_bounds=_bounds(keys),
        key_index=index,
    )


def packed_attention(kernel: Kernel) -> type[MegatronModule]:
    """The module for Megatron's `core_attention` slot, with `kernel` inside."""

    class PackedAttention(MegatronModule):
        """Causal attention inside each sample of a pack."""

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
            packed_seq_params: PackedSegments,
            **_: Any,
        ) -> torch.Tensor:
            """`query` [T, H, E], `key` and `value` [T, G, E] -> [T, H * E], same dtype, device."""
            segments = packed_seq_params.segments
            assert segments is not None, "the engine describes every pack by its segments"
            if segments.key_index is not None:
                key, value = (
                    gather_from_sequence_parallel_region(
                        states.contiguous(), group=self.context_group
                    )[segments.key_index]
                    for states in (key, value)
                )
            return kernel(query, key, value, segments).flatten(1)

    return PackedAttention


def _chunks(length: int, size: int, rank: int) -> list[tuple[int, int]]:
    """[first, last) of the query chunks that context `rank` holds of a sample of `length`."""
    if size == 1:
        return [(0, length)]
    chunk = length // (2 * size)
    return [(i * chunk, (i + 1) * chunk) for i in (rank, 2 * size - 1 - rank)]


def _bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
