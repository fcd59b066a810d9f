"""The kernels of packed attention with a scale, a window or a soft-cap; legend as in `attention`.

Each has the name of a kernel of `attention_kernels` or `attention_packages` and takes a `Style`
besides. A kernel that cannot express a style raises `ValueError`, which the trial before the first
step reports. `sdpa` is exact for all of them: blocks of queries see the keys of their window alone,
so a window costs neither a mask of the whole sample nor its products.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from roll_sft.engine.attention_packages import use_fa3
from roll_sft.engine.micro_batch import Segments
from roll_sft.models.variation import LayerAttention, Variation

if TYPE_CHECKING:
    from roll_sft.engine.attention_kernels import Kernel

_BLOCK = 256  # queries at a time, at least, where there is a window
_TRIAL_WINDOW = 16  # tokens; the trial's samples are shorter than the windows of models


@dataclass(frozen=True, slots=True)
class Style:
    """How a layer attends; `scale` None is 1 / sqrt(E), `window` counts the query itself."""

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None

    @property
    def left(self) -> int | None:
        """How many tokens before it a query sees, as flash attention counts."""
        return None if self.window is None else self.window - 1


def styled(kernel: "Kernel", variation: Variation, layer: LayerAttention) -> Any:
    """The kernel here of the same name as `kernel`, in the style of `layer`."""
    style = Style(variation.softmax_scale, layer.window, variation.attention_softcap)
    return functools.partial(_KERNELS[kernel.__name__], style=style)


def strictest(kernel: "Kernel", variation: Variation) -> Any:
    """`styled` for a trial on short samples: with a window if any layer has one."""
    window = _TRIAL_WINDOW if variation.windows else None
    style = Style(variation.softmax_scale, window, variation.attention_softcap)
    return functools.partial(_KERNELS[kernel.__name__], style=style)


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    style: Style,
) -> torch.Tensor:
    """torch's scaled dot product, or with a soft-cap its products, a segment at a time."""
    lengths = list(segments.query_lengths), list(segments.key_lengths)
    parts = zip(
        query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True
    )
    return torch.cat([block for part in parts for block in _blocks(*part, style=style)])


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    style: Style,
) -> torch.Tensor:
    """torch's own flash attention, which has windows and no soft-cap."""
    _refuse_softcap(style, "torch's variable-length attention")
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        *segments.bounds(),
        0.0,
        True,
        return_debug_mask=False,
        scale=style.scale,
        window_size_left=style.left,
        window_size_right=None if style.left is None else 0,
    )[0]
    return output


def fa3(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    style: Style,
) -> torch.Tensor:
    """flash-attention 3 under torch's operators; see `attention_packages.fa3`."""
    use_fa3()
    return varlen(query, key, value, segments, style=style)


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    style: Style,
) -> torch.Tensor:
    """flash-attn, from 2.6 on with soft-caps."""
    from flash_attn import flash_attn_varlen_func

    output: torch.Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        *segments.bounds(),
        causal=True,
        softmax_scale=style.scale,
        window_size=(-1, -1) if style.left is None else (style.left, 0),
        softcap=style.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output


def te(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    style: Style,
) -> torch.Tensor:
    """Transformer Engine's dot product attention, which has windows and no soft-cap."""
    _refuse_softcap(style, "Transformer Engine's attention")
    attention = _te_attention(query.shape[1], key.shape[1], query.shape[2], style)
    names = "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"
    bounds = dict(zip(names, segments.bounds(), strict=True))
    output: torch.Tensor = attention(query, key, value, **bounds)
    return output.view_as(query)


@functools.cache
def _te_attention(num_heads: int, num_groups: int, head_dim: int, style: Style) -> Any:
    """Transformer Engine's module of all layers of a style; it holds no parameters."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        num_heads,
        head_dim,
        num_gqa_groups=num_groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
        softmax_scale=style.scale,
        window_size=(-1, 0) if style.left is None else (style.left, 0),
    )


def _refuse_softcap(style: Style, what: str) -> None:
    if style.softcap is not None:
        raise ValueError(f"{what} has no soft-cap, and the model's is {style.softcap:g}")


_KERNELS = {"sdpa": sdpa, "varlen": varlen, "fa3": fa3, "flash": flash, "te": te}


def _blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, style: Style
) -> list[torch.Tensor]:
    """Attention of the last `len(query)` positions of `key`, in blocks of queries.

    `query` [t, H, E], `key` and `value` [k, G, E].
    """
    num_queries, num_keys = len(query), len(key)
    if style.window is None or num_keys <= style.window:
        return [_block(query, key, value, style=style)]
    size, before = max(style.window, _BLOCK), num_keys - num_queries
    blocks = []
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        seen = slice(max(0, before + start - style.window + 1), before + stop)
        blocks.append(_block(query[start:stop], key[seen], value[seen], style=style))
    return blocks


def _block(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, style: Style
) -> torch.Tensor:
    """Attention of the last `len(query)` positions of `key`: [t, H, E] over [k, G, E]."""
    num_queries, num_keys = len(query), len(key)
    mask = None
    if num_queries < num_keys or (style.window or num_keys) < num_keys or style.softcap is not None:
        last = num_keys - num_queries  # the key of the first query
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(last)
        if style.window is not None:
            mask = mask.triu(last - style.window + 1)
    if style.softcap is not None and mask is not None:
        return _capped(query, key, value, mask, style=style)
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=style.scale,
        enable_gqa=True,
    )
    return output[0].transpose(0, 1)


def _capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, *, style: Style
) -> torch.Tensor:
    """Attention [t, H, E] with scores between minus and plus the soft-cap; `mask` bool [t, k]."""
    assert style.softcap is not None, "no soft-cap"
    scale = query.shape[-1] ** -0.5 if style.scale is None else style.scale
    # The query heads of a group lie together: [G, H / G, t, E] over [G, 1, k, E].
    groups = query.transpose(0, 1).unflatten(0, (key.shape[1], -1))
    keys, values = (states.transpose(0, 1)[:, None] for states in (key, value))
    scores = (groups @ keys.transpose(-1, -2)) * scale
    scores = style.softcap * torch.tanh(scores / style.softcap)
    scores = scores.float().masked_fill(~mask, -torch.inf)
    output = scores.softmax(dim=-1).to(value.dtype) @ values
    return output.flatten(0, 1).transpose(0, 1)
