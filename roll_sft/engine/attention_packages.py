"""Kernels of packed attention that are installed apart from torch, called as they document it.

Legend and arguments as in `engine/attention_kernels.py`. Written against Transformer Engine 2.4,
flash-attn 2.7, and flash-attention 3 as torch 2.11 to 2.13 call it. Each imports its package when
it is called first, so a package that does not fit the machine fails in the trial at set-up.
"""

import functools
from typing import Any

import torch

from roll_sft.engine.attention_kernels import varlen
from roll_sft.engine.micro_batch import Segments


def te(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """Transformer Engine's dot product attention in its THD format."""
    attention = _te_attention(query.shape[1], key.shape[1], query.shape[2])
    names = "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"
    bounds = dict(zip(names, segments.bounds(), strict=True))
    output: torch.Tensor = attention(query, key, value, **bounds)
    return output.view_as(query)


def fa3(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """flash-attention 3, which torch 2.11 puts under its own operators for flash attention.

    Needs the package's module `flash_attn_interface` and compute capability 9.0.
    """
    use_fa3()
    return varlen(query, key, value, segments)


def use_fa3() -> None:
    """Let torch's operators run flash-attention 3, until `attention_kernels.use_own_kernels`."""
    from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

    if current_flash_attention_impl() != "FA3":
        activate_flash_attention_impl("FA3")


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """flash-attn; from 2.1 on its causal triangle is aligned to the bottom right."""
    from flash_attn import flash_attn_varlen_func

    output: torch.Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        *segments.bounds(),
        causal=True,
        # Its backward adds in any order otherwise; torch's own switch does not reach it.
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output


# In the order in which `auto` tries them.
PACKAGES = {"te": te, "fa3": fa3, "flash": flash}


@functools.cache
def _te_attention(num_heads: int, num_groups: int, head_dim: int) -> Any:
    """Transformer Engine's module, which holds no parameters, so all layers share it."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        num_heads,
        head_dim,
        num_gqa_groups=num_groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
    )
