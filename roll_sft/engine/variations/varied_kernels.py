"""The kernels of packed attention with a scale, a window, a soft-cap or sinks.

Legend as in `attention`.

Each has the name of a kernel of `attention_kernels` or `attention_packages` and takes a `Style`
besides, and `sinks` [H] if the model has them. A kernel that cannot express these raises
`ValueError`, which the trial before the first step reports. `sdpa` is exact for all of them: blocks
of queries see the keys of their window alone, so a window costs neither a mask of the whole sample
nor its products.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

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
    return functools.partial(_KERNELS[kernel.__name__], style=style_of(variation, layer))


def style_of(variation: Variation, layer: LayerAttention) -> Style:
    """How `layer` attends."""
    return Style(variation.softmax_scale, layer.window, variation.attention_softcap)


def strictest(kernel: "Kernel", variation: Variation) -> Any:
    """`styled` for a trial on short samples: with a window if any layer has one.

    The trial compares no gradient of sinks, so they are made of the queries, whose gradient shows
    it.
    """
    window = _TRIAL_WINDOW if variation.windows else None
    style = Style(variation.softmax_scale, window, variation.attention_softcap)
    chosen = functools.partial(_KERNELS[kernel.__name__], style=style)
    if not variation.has_sinks:
        return chosen

    def with_sinks(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        output: torch.Tensor = chosen(query, *rest, sinks=query[..., 0].sum(0) / 8)  # about 1
        return output

    return with_sinks


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    style: Style,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """torch's scaled dot product, or with a soft-cap or sinks its products, segment by segment."""
    lengths = list(segments.query_lengths), list(segments.key_lengths)
    parts = zip(
        query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True
    )
    blocks = [block for part in parts for block in _blocks(*part, style=style, sinks=sinks)]
    return torch.cat(blocks)


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    style: Style,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """torch's own flash attention, which has windows and no soft-cap; see `attend_with_sinks`."""
    _refuse_softcap(style, "torch's variable-length attention")
    window: dict[str, Any] = {
        "scale": style.scale,
        "window_size_left": style.left,
        "window_size_right": None if style.left is None else 0,
    }
    bounds = segments.bounds()

    def attend(*states: torch.Tensor) -> list[torch.Tensor]:
        operator = torch.ops.aten._flash_attention_forward
        found = operator(*states, *bounds, 0.0, True, return_debug_mask=False, **window)
        return list(found[:4])

    if sinks is None:
        return attend(query, key, value)[0]

    def differentiate(*states: torch.Tensor) -> list[torch.Tensor]:
        *first, state, unused = states
        operator = torch.ops.aten._flash_attention_backward
        return list(operator(*first, *bounds, 0.0, True, state, unused, **window))

    return attend_with_sinks(query, key, value, sinks, (attend, differentiate))


def fa3(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    style: Style,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """flash-attention 3 under torch's operators; see `attention_packages.fa3`."""
    use_fa3()
    return varlen(query, key, value, segments, style=style, sinks=sinks)


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    style: Style,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """flash-attn, from 2.6 on with soft-caps; without sinks."""
    _refuse_sinks(sinks, "flash-attn")
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
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Transformer Engine's dot product attention, which has windows and no soft-cap.

    Its newest versions have sinks, as a parameter of their own.
    """
    _refuse_softcap(style, "Transformer Engine's attention")
    _refuse_sinks(sinks, "Transformer Engine's attention")
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


def _refuse_sinks(sinks: torch.Tensor | None, what: str) -> None:
    if sinks is not None:
        raise ValueError(f"{what} is not built with attention sinks, and the model has them")


_KERNELS = {"sdpa": sdpa, "varlen": varlen, "fa3": fa3, "flash": flash, "te": te}


def _blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    style: Style,
    sinks: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Attention of the last `len(query)` positions of `key`, in blocks of queries.

    `query` [t, H, E], `key` and `value` [k, G, E].
    """
    num_queries, num_keys = len(query), len(key)
    if style.window is None or num_keys <= style.window:
        return [_block(query, key, value, style=style, sinks=sinks)]
    size, before = max(style.window, _BLOCK), num_keys - num_queries
    blocks = []
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        seen = slice(max(0, before + start - style.window + 1), before + stop)
        block = _block(query[start:stop], key[seen], value[seen], style=style, sinks=sinks)
        blocks.append(block)
    return blocks


def _block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    style: Style,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of the last `len(query)` positions of `key`: [t, H, E] over [k, G, E]."""
    num_queries, num_keys = len(query), len(key)
    mask, is_written_out = None, style.softcap is not None or sinks is not None
    if num_queries < num_keys or (style.window or num_keys) < num_keys or is_written_out:
        last = num_keys - num_queries  # the key of the first query
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(last)
        if style.window is not None:
            mask = mask.triu(last - style.window + 1)
    if is_written_out and mask is not None:
        return _written_out(query, (key, value), mask, style=style, sinks=sinks)
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


def _written_out(
    query: torch.Tensor,
    keys_and_values: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    *,
    style: Style,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention [t, H, E] with a soft-cap on the scores, or with sinks; `mask` bool [t, k]."""
    scale = query.shape[-1] ** -0.5 if style.scale is None else style.scale
    # The query heads of a group lie together: [G, H / G, t, E] over [G, 1, k, E].
    groups = query.transpose(0, 1).unflatten(0, (keys_and_values[0].shape[1], -1))
    keys, values = (states.transpose(0, 1)[:, None] for states in keys_and_values)
    scores = (groups @ keys.transpose(-1, -2)) * scale
    if style.softcap is not None:
        scores = style.softcap * torch.tanh(scores / style.softcap)
    scores = scores.float().masked_fill(~mask, -torch.inf)
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        column = sinks.float().view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    output = weights.to(values.dtype) @ values
    return output.flatten(0, 1).transpose(0, 1)


Passes: TypeAlias = tuple[
    Callable[..., Sequence[torch.Tensor]], Callable[..., Sequence[torch.Tensor]]
]
"""The forward and the backward of a kernel.

(query, key, value) -> (output, log of the sum of the scores' exponentials, what the backward
needs besides); (gradient of the output, query, key, value, output, log-sum, that) -> gradients of
query, key and value. A log-sum is float32 [H, T].
"""


def attend_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    passes: Passes,
) -> torch.Tensor:
    """Attention [T, H, E] with `sinks` [H] by a kernel that knows none.

    A sink is one more score without a value, so it scales the kernel's output by the share that it
    leaves. The backward recomputes the softmax from the log-sum, and takes the product of output
    and gradient for the sum over all scores; both are right for the softmax with the sink when it
    gets the output and log-sum of that one.
    """
    output: torch.Tensor = _WithSinks.apply(query, key, value, sinks, passes)
    return output


class _WithSinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor,
        passes: Passes,
    ) -> torch.Tensor:
        plain, log_sum, *rest = passes[0](query, key, value)
        total = torch.logaddexp(log_sum, sinks.float()[:, None])
        output = plain * (log_sum - total).exp().t()[..., None].to(plain.dtype)
        ctx.save_for_backward(query, key, value, sinks, output, total, *rest)
        ctx.differentiate = passes[1]
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks, output, total, *rest = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        found = ctx.differentiate(gradient, query, key, value, output, total, *rest)
        shares = (sinks.float()[:, None] - total).exp()
        products = (gradient.float() * output.float()).sum(-1).t()
        return *found, -(shares * products).sum(1).to(sinks.dtype), None
