"""Keys and values of the tokens that were read, for the core attention of `engine/attention.py`.

Legend: B sequences, L tokens that each may have, T tokens of a forward pass, H query heads and G
key/value groups of this tensor rank, E head dimension.

Memory is taken once for each layer, at its first forward pass. A prefill reads whole prompts: the
kernel of training computes their attention, and the cache only keeps keys and values. A decoding
pass has one token of each sequence, which attends to what the cache has of it.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from roll_sft.engine.micro_batch import Segments
from roll_sft.engine.variations.varied_kernels import Style

if TYPE_CHECKING:
    from roll_sft.engine.attention import PackedAttention

PLAIN = Style()


class KeyValueCache:
    """The cache of all layers of this rank."""

    def __init__(self, num_sequences: int, length: int) -> None:
        self._size = num_sequences, length
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # each [B, G, L, E]
        self._masks: dict[int | None, torch.Tensor] = {}

    def begin(
        self, sequences: torch.Tensor, positions: torch.Tensor, *, num_keys: int | None = None
    ) -> None:
        """The next forward pass has tokens of these `sequences` at these `positions`.

        Both int64, one entry for each token; what the pack has behind them is not kept. `num_keys`
        is given where the pass decodes: the tokens of the longest sequence, the new one included.
        """
        self._sequences, self._positions, self._num_keys = sequences, positions, num_keys
        self._masks = {}

    def keep(self, sequences: torch.Tensor) -> None:
        """Keep these sequences alone, int64 [n], in this order."""
        self._size = len(sequences), self._size[1]
        self._layers = {
            layer: (keys[sequences], values[sequences])
            for layer, (keys, values) in self._layers.items()
        }

    def attend(
        self,
        attention: "PackedAttention",
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
    ) -> torch.Tensor:
        """`query` [T, H, E], `key` and `value` [T, G, E], rotated -> [T, H * E], same dtype.

        Values may have another width than queries and keys, which the output then has.
        """
        keys, values = self._of(attention, key, value)
        for kept, states in ((keys, key), (values, value)):
            kept[self._sequences, :, self._positions] = states[: len(self._sequences)]
        if self._num_keys is None:
            return attention.attend(query, key, value, segments).flatten(1)
        style, seen = attention.style or PLAIN, slice(0, self._num_keys)
        return decoded(
            query,
            (keys[:, :, seen], values[:, :, seen]),
            mask=self._mask(style),
            style=style,
            sinks=getattr(attention, "softmax_offset", None),
        )

    def _of(
        self, attention: "PackedAttention", *like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = id(attention)
        if layer not in self._layers:
            num_sequences, length = self._size
            # Zeros: what a mask hides is multiplied by 0, and must be finite.
            key, value = (
                each.new_zeros(num_sequences, each.shape[1], length, each.shape[2]) for each in like
            )
            self._layers[layer] = key, value
        return self._layers[layer]

    def _mask(self, style: Style) -> torch.Tensor:
        """Which keys each sequence's new token sees, bool [B, 1, 1, keys]; of one pass."""
        if style.window not in self._masks:
            assert self._num_keys is not None, "a mask is of a decoding pass"
            places = torch.arange(self._num_keys, device=self._positions.device)
            last = self._positions[:, None]
            mask = places <= last
            if style.window is not None:
                mask &= places > last - style.window
            self._masks[style.window] = mask[:, None, None]
        return self._masks[style.window]


def decoded(
    query: torch.Tensor,
    seen: tuple[torch.Tensor, torch.Tensor],
    *,
    mask: torch.Tensor,
    style: Style,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one token of each sequence, [B, H * E].

    `query` [B, H, E] over the keys and values `seen`, [B, G, k, E] each; `mask` bool [B, 1, 1, k],
    `sinks` [H].
    """
    keys, values = seen
    # The query heads of a group share its keys, as the queries of a sequence do.
    groups = query.unflatten(1, (keys.shape[1], -1))
    if style.softcap is None and sinks is None:
        output: Any = F.scaled_dot_product_attention(
            groups, keys, values, attn_mask=mask, scale=style.scale
        )
        return output.flatten(1)
    scale = query.shape[-1] ** -0.5 if style.scale is None else style.scale
    scores = (groups @ keys.transpose(-1, -2)) * scale
    if style.softcap is not None:
        scores = style.softcap * torch.tanh(scores / style.softcap)
    scores = scores.float().masked_fill(~mask, -torch.inf)
    if sinks is not None:  # one more score of each head, without a value
        column = sinks.float().view(1, *groups.shape[1:3], 1).expand(len(query), -1, -1, -1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1)[..., : keys.shape[2]]
    return (weights.to(values.dtype) @ values).flatten(1)
