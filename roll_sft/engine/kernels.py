"""The kernels that compute segments of packed attention, and which one a run takes.

Legend as in `engine/attention.py`. Each kernel takes query [T, H, E], key and value [K, G, E] and
the segments, and returns [T, H, E] in the query's dtype. They are interchangeable: causal with the
triangle at the bottom right, grouped heads, no dropout, scale 1 / sqrt(E).

`sdpa` runs everywhere and is what the others are tested against where they can run: they need CUDA
and half precision, and are written against the documentation of flash-attn 2.7, Transformer Engine
2.4 and torch 2.10 to 2.13.
"""

import functools
import importlib.util
import inspect
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from roll_sft.errors import ConfigError

INSTALL = {
    "te": "Transformer Engine; install roll_sft[cuda]",
    "flash": "flash-attn; install roll_sft[cuda]",
    "varlen": "torch 2.10 or newer",
}


class Packing(Protocol):
    """What a kernel needs to know of the segments; see `attention.Segments`."""

    @property
    def query_lengths(self) -> tuple[int, ...]: ...
    @property
    def key_lengths(self) -> tuple[int, ...]: ...
    @property
    def query_bounds(self) -> torch.Tensor: ...
    @property
    def key_bounds(self) -> torch.Tensor: ...


class Kernel(Protocol):
    """Attention over segments."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Packing, /
    ) -> torch.Tensor: ...


def choose_kernel(backend: str, *, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel of `model.attention_backend`; `auto` takes the best that imports.

    Raises `ConfigError` for one that is asked for by name and is not installed.
    """
    kernels: dict[str, Kernel] = {"te": te, "flash": flash, "varlen": varlen, "sdpa": sdpa}
    if backend != "auto":
        if not _is_available(backend):
            raise ConfigError(
                f"model.attention_backend: {backend!r} needs {INSTALL[backend]}, or choose auto"
            )
        return kernels[backend]
    if device.type != "cuda" or dtype == torch.float32:
        return sdpa
    return kernels[next(name for name in kernels if _is_available(name))]


def sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Packing
) -> torch.Tensor:
    """torch's scaled dot product, one segment at a time."""
    lengths = list(segments.query_lengths), list(segments.key_lengths)
    parts = zip(
        query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True
    )
    return torch.cat([_causal(*part) for part in parts])


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Packing
) -> torch.Tensor:
    """`torch.nn.attention.varlen`; its arguments changed between torch 2.10 and 2.12."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        repeats = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    output = varlen_attn(
        query,
        key,
        value,
        segments.query_bounds,
        segments.key_bounds,
        max(segments.query_lengths),
        max(segments.key_lengths),
        **options,
    )
    assert isinstance(output, torch.Tensor), "no auxiliary output was asked for"
    return output


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Packing
) -> torch.Tensor:
    """flash-attn; from 2.1 on its causal triangle is aligned to the bottom right."""
    from flash_attn import flash_attn_varlen_func

    output: torch.Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=segments.query_bounds,
        cu_seqlens_k=segments.key_bounds,
        max_seqlen_q=max(segments.query_lengths),
        max_seqlen_k=max(segments.key_lengths),
        causal=True,
    )
    return output


def te(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Packing
) -> torch.Tensor:
    """Transformer Engine's dot product attention in its THD format."""
    attention = _te_attention(query.shape[1], key.shape[1], query.shape[2])
    output: torch.Tensor = attention(
        query,
        key,
        value,
        cu_seqlens_q=segments.query_bounds,
        cu_seqlens_kv=segments.key_bounds,
        max_seqlen_q=max(segments.query_lengths),
        max_seqlen_kv=max(segments.key_lengths),
    )
    return output.view_as(query)


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


def _is_available(backend: str) -> bool:
    modules = {
        "te": "transformer_engine",
        "flash": "flash_attn",
        "varlen": "torch.nn.attention.varlen",
    }
    return backend not in modules or importlib.util.find_spec(modules[backend]) is not None
