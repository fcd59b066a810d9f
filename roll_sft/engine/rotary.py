"""Rotary position embedding of a pack: one gather of angles by position, for all samples at once.

Megatron-Core's own way cuts the pack at its bounds, which lie on the device, and asks for their
values twice a layer, for queries and for keys: each time the host waits for all that is queued.
Positions say the same without a question, under context parallelism too, where a rank's tokens are
chunks of each sample. The angles are the same numbers, so results are equal to the last bit.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import attention

_of_megatron = rope_utils.apply_rotary_pos_emb


def install() -> None:
    """Make Megatron's attention in this process rotate packs by position."""
    setattr(attention, "apply_rotary_pos_emb", rotate)  # noqa: B010 -- a name of another module


def rotate(
    states: torch.Tensor,
    angles: torch.Tensor,
    config: Any,
    cu_seqlens: torch.Tensor | None = None,
    mscale: float = 1.0,
    **options: Any,
) -> torch.Tensor:
    """`states` [T, H, E] by `angles` [longest sample, 1, 1, E] at positions int64 [T].

    The positions come where Megatron has the bounds of samples, which is the one thing that its
    attention hands over: `attention.describe_pack` puts them there.
    """
    if cu_seqlens is None:
        return _of_megatron(states, angles, config, mscale=mscale, **options)
    rotated: torch.Tensor = rope_utils._apply_rotary_pos_emb_bshd(
        states.unsqueeze(1),
        angles[cu_seqlens],
        rotary_interleaved=config.rotary_interleaved,
        mscale=mscale,
    )
    return rotated.squeeze(1)
