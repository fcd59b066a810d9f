"""Packed (THD) attention: rotation by position and context parallelism around a kernel.

Legend: T tokens of this context rank, K keys that the segments list (`micro_batch.Segments`),
H query heads and G key/value groups of this tensor rank, E head dimension.

Megatron's local core attention takes neither packed sequences nor context parallelism; this one
takes both. Every kernel for packed sequences computes segments, and the kernel is the only
difference between backends. Under context parallelism keys and values are gathered (their gradient
is reduce-scattered) and queries stay; rank r holds chunks r and 2 x CP - 1 - r of each sample, the
same share of its triangle on every rank.

Queries and keys are rotated here, not in Megatron's attention, which cuts the pack at its bounds:
they lie on the device, and reading them waits for all queued work, twice a layer. Positions need no
reading, and the cosines and sines of a pack are computed once for all layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import MegatronModule

from roll_sft.engine.attention_kernels import Kernel
from roll_sft.engine.fused import run_compiled
from roll_sft.engine.layers import LayerConfig
from roll_sft.engine.micro_batch import Segments


@dataclass
class PackDescription(PackedSeqParams):
    """Megatron's description of a pack, with the fields of ours that our core attention reads."""

    segments: Segments | None = None
    angles: torch.Tensor | None = None  # float32 [T, 1, E]: cosines, then sines
    token_keys: torch.Tensor | None = None  # int32 [T], for dropout
    cache: Any = None  # the `KeyValueCache`, where answers are generated


def describe_pack(
    segments: Segments,
    positions_T: torch.Tensor,
    *,
    frequencies: torch.Tensor,
    token_keys: torch.Tensor | None = None,
) -> PackDescription:
    """The `packed_seq_params` of the model's forward.

    `positions_T` int64 [1, T], of each token in its sample; `frequencies` float32 [E / 2], radians
    a position. All tensors on one device.
    """
    return PackDescription(
        qkv_format="thd",
        cu_seqlens_q=segments.query_bounds,
        cu_seqlens_kv=segments.key_bounds,
        max_seqlen_q=max(segments.query_lengths),
        max_seqlen_kv=max(segments.key_lengths),
        segments=segments,
        angles=rotary_angles(positions_T[0], frequencies),
        token_keys=token_keys,
    )


class PackedAttention(MegatronModule):
    """Causal attention inside each sample of a pack, for Megatron's `core_attention` slot."""

    style: Any = None  # the kernel's `Style`, if it is not a plain decoder's

    def __init__(self, config: LayerConfig, *, kernel: Kernel, **_: Any) -> None:
        super().__init__(config=config)
        self.kernel = kernel
        self.context_group = parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackDescription,
        **_: Any,
    ) -> torch.Tensor:
        """`query` [T, H, E], `key` and `value` [T, G, E] -> [T, H * E], same dtype, device."""
        segments, angles = packed_seq_params.segments, packed_seq_params.angles
        assert segments is not None, "describe_pack gives the segments"
        assert angles is not None, "describe_pack gives the angles"
        query, key = self.rotated(query, key, angles)
        if packed_seq_params.cache is not None:
            return packed_seq_params.cache.attend(self, query, key, value, segments)
        if segments.key_index is not None:
            key, value = (
                gather_from_sequence_parallel_region(states.contiguous(), group=self.context_group)[
                    segments.key_index
                ]
                for states in (key, value)
            )
        return self.attend(query, key, value, segments).flatten(1)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """The kernel's [T, H, E]."""
        return self.kernel(query, key, value, segments)

    def rotated(
        self, query: torch.Tensor, key: torch.Tensor, angles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`query` and `key` by `angles` float32 [T, 1, E]."""
        return rotate(query, key, angles, is_compiled=self.config.is_compiled)


def rotary_angles(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Cosines and sines of `positions` int64 [T] x `frequencies` float32 [E / 2], [T, 1, E]."""
    angles = torch.outer(positions.float(), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)[:, None]


def rotate(
    query: torch.Tensor, key: torch.Tensor, angles: torch.Tensor, *, is_compiled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query` [T, H, E] and `key` [T, G, E] by `angles` float32 [T, 1, E]; same dtype."""
    if is_compiled:
        rotated: tuple[torch.Tensor, torch.Tensor] = run_compiled(
            rotated_in_fp32, [query, key, angles]
        )
        return rotated
    cos, sin = angles.to(query.dtype).chunk(2, dim=-1)
    halves = [states.chunk(2, dim=-1) for states in (query, key)]
    query, key = (torch.cat(_rotated(first, second, cos, sin), dim=-1) for first, second in halves)
    return query, key


def rotated_in_fp32(
    query: torch.Tensor, key: torch.Tensor, angles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotate` as one function, computed in fp32."""
    cos, sin = angles.chunk(2, dim=-1)
    rotated = []
    for states in (query, key):
        # The halves are converted, not the whole: a tensor cut or joined in fp32 would be written.
        first, second = states.chunk(2, dim=-1)
        halves = _rotated(first.float(), second.float(), cos, sin)
        rotated.append(torch.cat([half.to(states.dtype) for half in halves], dim=-1))
    return rotated[0], rotated[1]


def _rotated(
    first: torch.Tensor, second: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The halves [T, H, E / 2] by the cosines and sines of their tokens, [T, 1, E / 2]."""
    return first * cos - second * sin, second * cos + first * sin
