"""The kernels of packed attention, and the choice between them.

Legend as in `engine/attention.py`. Each kernel takes query [T, H, E], key and value [K, G, E] and
the segments, and returns [T, H, E] in the query's dtype. They are interchangeable: causal with the
triangle at the bottom right, grouped heads, no dropout, scale 1 / sqrt(E).

`sdpa` runs everywhere and is the reference of the others. They need CUDA and half precision, and
are written against the documentation of flash-attn 2.7 and Transformer Engine 2.4, and against the
operators of torch 2.10 to 2.13.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from roll_sft.base.errors import ConfigError, first_line
from roll_sft.engine.micro_batch import Segments

LOG = logging.getLogger(__name__)
INSTALL = {
    "te": "Transformer Engine; install roll_sft[cuda]",
    "flash": "flash-attn; install roll_sft[cuda]",
    "varlen": "torch 2.10 or newer",
}
# Raised by a package that does not fit the machine: at import (another CUDA, another torch, a
# folder of the same name), or at the first call (an old card, a head size without a kernel).
NOT_FIT = (
    ImportError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
)
TRIAL_TOLERANCE = 0.05  # of the largest value; bf16 keeps 8 bits


class Kernel(Protocol):
    """Attention over segments."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, /
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention heads of one tensor rank."""

    num_heads: int
    num_groups: int  # of keys and values
    head_dim: int


def choose_kernel(
    backend: str, *, device: torch.device, dtype: torch.dtype, heads: Heads
) -> Kernel:
    """The kernel of `model.attention_backend`; `auto` takes the fastest that works.

    Each candidate computes a small pack with `heads`, forward and backward, and is compared with
    `sdpa`: a failing import or an old card shows here, not in the first step. Raises `ConfigError`
    for a backend that was asked for by name and does not work.
    """
    kernels: dict[str, Kernel] = {"te": te, "flash": flash, "varlen": varlen, "sdpa": sdpa}
    if backend == "sdpa" or (
        backend == "auto" and (device.type != "cuda" or dtype == torch.float32)
    ):
        return sdpa
    reasons: list[str] = []
    for name in kernels if backend == "auto" else [backend]:
        reason = None if name == "sdpa" else why_not(kernels[name], device, dtype, heads)
        if reason is None:
            passed_over = "".join(f"; not {each}" for each in reasons)
            LOG.info("model.attention_backend: %s%s", name, passed_over)
            return kernels[name]
        reasons.append(f"{name} ({reason})")
    raise ConfigError(
        f"model.attention_backend: {backend!r} does not work here: {reason}; it needs"
        f" {INSTALL[backend]}, or choose auto"
    )


def why_not(kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: Heads) -> str | None:
    """One line on why `kernel` cannot be used for `heads`, or None if it can."""
    try:
        found, wanted = (_trial(each, device, dtype, heads) for each in (kernel, sdpa))
    except NOT_FIT as error:
        return f"{type(error).__name__}: {first_line(error)}"
    for ours, right in zip(found, wanted, strict=True):
        difference = float((ours - right).abs().max() / right.abs().max())
        if not difference <= TRIAL_TOLERANCE:  # a NaN is no match
            return f"its output or gradient differs from torch's by {difference:.2g}"
    return None


def _trial(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: Heads
) -> list[torch.Tensor]:
    """Output [64, H, E] and the gradients of query, key and value, all fp32."""
    # A whole sample, and the second chunk of a longer one, as context parallelism makes them.
    query_bounds, key_bounds = (
        torch.tensor(bounds, dtype=torch.int32, device=device)
        for bounds in ([0, 24, 64], [0, 24, 128])
    )
    segments = Segments((24, 40), (24, 104), query_bounds, key_bounds)
    generator = torch.Generator().manual_seed(0)
    shapes = (64, heads.num_heads), (128, heads.num_groups), (128, heads.num_groups)
    query, key, value = (
        torch.randn(*shape, heads.head_dim, generator=generator).to(device, dtype).requires_grad_()
        for shape in shapes
    )
    output = kernel(query, key, value, segments)
    output.float().square().sum().backward()
    results = (output.detach(), query.grad, key.grad, value.grad)
    return [tensor.float() for tensor in results if tensor is not None]


def sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """torch's scaled dot product, one segment at a time."""
    lengths = list(segments.query_lengths), list(segments.key_lengths)
    parts = zip(
        query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True
    )
    return torch.cat([_causal(*part) for part in parts])


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """torch's own flash attention, which `torch.nn.attention.varlen` wraps.

    The wrapper is a custom operator, whose Python costs the host more than the kernel costs the
    GPU where the model is small.
    """
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, *_bounds(segments), 0.0, True, return_debug_mask=False
    )[0]
    return output


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """flash-attn; from 2.1 on its causal triangle is aligned to the bottom right."""
    from flash_attn import flash_attn_varlen_func

    output: torch.Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        *_bounds(segments),
        causal=True,
        # Its backward adds in any order otherwise; torch's own switch does not reach it.
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output


def te(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """Transformer Engine's dot product attention in its THD format."""
    attention = _te_attention(query.shape[1], key.shape[1], query.shape[2])
    names = "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"
    bounds = dict(zip(names, _bounds(segments), strict=True))
    output: torch.Tensor = attention(query, key, value, **bounds)
    return output.view_as(query)


def _bounds(segments: Segments) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Bounds of queries and keys, int32 [N + 1], and the longest of each, in each API's order."""
    return (
        segments.query_bounds,
        segments.key_bounds,
        max(segments.query_lengths),
        max(segments.key_lengths),
    )


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


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of the last `len(query)` positions of `key`: [t, H, E] over [k, G, E]."""
    num_queries, num_keys = query.shape[0], key.shape[0]
    mask = None
    if num_queries < num_keys:
        # is_causal aligns the triangle to the top left; a later chunk needs the bottom right.
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_queries)
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return output[0].transpose(0, 1)
