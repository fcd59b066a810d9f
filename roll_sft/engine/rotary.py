"""Rotary position embedding of a pack: one gather of angles by position, for all samples at once.

Megatron-Core's own way cuts the pack at its bounds, which lie on the device, and asks for their
values twice a layer, for queries and for keys: each time the host waits for all that is queued.
Positions say the same without a question, under context parallelism too, where a rank's tokens are
chunks of each sample. Cosines and sines are taken once for each position and not in every layer;
they are the same numbers, so results are equal to the last bit.

Legend: T tokens of this context rank, H heads of this tensor rank, E head dimension, L tokens of
the longest sample.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig, attention

from roll_sft.engine import compiling


class RotaryTable(RotaryEmbedding):
    """In place of the model's angles: the cosines and the sines of each position, [L, 1, 1, E]."""

    def __init__(self, inv_freq: torch.Tensor) -> None:
        """`inv_freq` is float32 [E / 2], on the device where the table is to be."""
        super().__init__(2 * len(inv_freq), rotary_percent=1.0, use_cpu_initialization=True)
        self.inv_freq = inv_freq

    def get_emb(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """float32 [L, 1, 1, E]; Megatron-Core keeps the latest."""
        return torch.cat(self.get_cos_sin(max_seq_len, offset), dim=-1)[:, None, None]


def install() -> None:
    """Make Megatron's attention in this process rotate packs by position."""
    setattr(attention, "apply_rotary_pos_emb", rotate)  # noqa: B010 -- a name of another module


def rotate(
    states: torch.Tensor,
    table: torch.Tensor,
    config: TransformerConfig,
    cu_seqlens: torch.Tensor | None = None,
    mscale: float = 1.0,
    **_: Any,
) -> torch.Tensor:
    """`states` [T, H, E] by `table` (of `RotaryTable`) at positions int64 [T].

    The positions come where Megatron has the bounds of samples, which is the one thing that its
    attention hands over: `attention.describe_pack` puts them there.
    """
    positions = cu_seqlens
    assert positions is not None, "the engine describes every pack"
    assert mscale == 1.0, f"an attention scale of {mscale}, and no family has one"
    if compiling.is_on(config):
        rotated: torch.Tensor = compiling.run(rotated_states, [states, table, positions])
        return rotated
    angles = table[positions, 0].to(states.dtype)
    first, second = states.chunk(2, dim=-1)
    return torch.cat(_rotated(first, second, angles), dim=-1)


def rotated_states(
    states: torch.Tensor, table: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """`rotate` as one function, computed in fp32."""
    # Halves are converted, not the whole: a tensor that is cut or joined in fp32 would be written.
    first, second = states.chunk(2, dim=-1)
    halves = _rotated(first.float(), second.float(), table[positions, 0])
    return torch.cat([half.to(states.dtype) for half in halves], dim=-1)


def _rotated(
    first: torch.Tensor, second: torch.Tensor, angles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The halves [T, H, E / 2] by the cosines and sines of their tokens, [T, 1, E]."""
    cos, sin = angles.chunk(2, dim=-1)
    return first * cos - second * sin, second * cos + first * sin
