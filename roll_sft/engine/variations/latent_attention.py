"""Attention whose queries, keys and values are projections of smaller vectors (DeepSeek-V3's MLA).

Legend: N tokens of this rank's part of the sequence, T tokens of this context rank, H heads of this
tensor rank, R columns of a head that are rotated, P others, V columns of a value.

In place of Megatron's module, which rotates by itself: it reads the bounds of packs on the host in
every layer, and derives the frequencies anew. Parameters have the names of Megatron's. Each tensor
rank has the down projections whole and computes them for its part of the sequence; heads are cut.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    checkpoint,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import MegatronModule, ModuleSpec

from roll_sft.engine.layers import LayerConfig, RMSNorm
from roll_sft.engine.variations.varied_kernels import sdpa
from roll_sft.models.variation import LatentHeads

_EPSILON = 1e-6  # of both norms in transformers, whatever the rms_norm_eps of the model


def use_latents(layer: ModuleSpec, latent: LatentHeads) -> None:
    """Make `layer` attend by heads of this kind, with the core attention that it has."""
    submodules = layer.submodules.self_attention.submodules
    layer.submodules.self_attention = ModuleSpec(
        module=LatentAttention, params={"latent": latent}, submodules=submodules
    )


class WholeLinear(MegatronModule):
    """A matrix that every tensor rank has whole, for its part of the sequence."""

    def __init__(self, config: LayerConfig, inputs: int, outputs: int) -> None:
        super().__init__(config=config)
        weight = torch.empty(outputs, inputs, dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(weight)
        # finalize_model_grads sums the gradients of marked parameters over the tensor group.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 -- a mark

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, 1, inputs] -> [N, 1, outputs]."""
        return F.linear(hidden, self.weight)

    def get_extra_state(self) -> None:
        """The entry that Megatron's checkpoints have beside the weight of a linear layer: empty."""

    def set_extra_state(self, state: Any) -> None:
        """There is none."""


class LatentAttention(MegatronModule):
    """Self-attention of a layer, for Megatron's `self_attention` slot."""

    def __init__(
        self,
        config: LayerConfig,
        submodules: Any,
        layer_number: int,
        *,
        latent: LatentHeads,
        **_: Any,
    ) -> None:
        """`layer_number` counts from 1 over the whole model."""
        super().__init__(config=config)
        self._latent = latent
        self._recomputes = config.recompute_granularity == "selective" and "core_attn" in (
            config.recompute_modules or []
        )
        hidden, num_heads = config.hidden_size, config.num_attention_heads
        width, rank = num_heads * (latent.plain + latent.rotated), latent.query_rank
        up = functools.partial(_up_projection, config)
        if rank is None:
            self.linear_q_proj = up(hidden, width)
        else:
            self.linear_q_down_proj = WholeLinear(config, hidden, rank)
            self.q_layernorm = RMSNorm(config, rank, _EPSILON)
            self.linear_q_up_proj = up(rank, width)
        rank = latent.key_value_rank
        self.linear_kv_down_proj = WholeLinear(config, hidden, rank + latent.rotated)
        self.kv_layernorm = RMSNorm(config, rank, _EPSILON)
        self.linear_kv_up_proj = up(rank, num_heads * (latent.plain + latent.value))
        self.core_attention = submodules.core_attention(config=config, layer_number=layer_number)
        self.linear_proj = RowParallelLinear(
            num_heads * latent.value,
            hidden,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
        )

    def forward(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: Any,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """`hidden` [N, 1, D] -> [N, 1, D], same dtype, and no bias."""
        states = self._query(hidden), *self._key_and_value(hidden)
        attend = functools.partial(self._attend, packed_seq_params=packed_seq_params)
        output = checkpoint(attend, False, *states) if self._recomputes else attend(*states)
        projected, _unused = self.linear_proj(output[:, None])
        return projected, None

    def _query(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, 1, D] -> [T, H, R + P]."""
        latent = self._latent
        if latent.query_rank is None:
            query, _ = self.linear_q_proj(hidden)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden)))
        heads = query.view(len(query), -1, latent.plain + latent.rotated)
        plain, rotated = heads.split([latent.plain, latent.rotated], dim=-1)
        return torch.cat([rotated, plain], dim=-1)  # as the core attention rotates

    def _key_and_value(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, 1, D] -> [T, H, R + P] and [T, H, V]."""
        latent = self._latent
        both = self.linear_kv_down_proj(hidden)
        small, shared = both.split([latent.key_value_rank, latent.rotated], dim=-1)
        if self.config.sequence_parallel:  # every rank's heads have the key of every token
            group = parallel_state.get_tensor_model_parallel_group()
            shared = gather_from_sequence_parallel_region(shared.contiguous(), group=group)
        states, _ = self.linear_kv_up_proj(self.kv_layernorm(small))
        heads = states.view(len(states), -1, latent.plain + latent.value)
        plain, value = heads.split([latent.plain, latent.value], dim=-1)
        return torch.cat([shared.expand(-1, heads.shape[1], -1), plain], dim=-1), value

    def _attend(self, *states: torch.Tensor, packed_seq_params: Any) -> torch.Tensor:
        """Query, key and value -> [T, H * V]."""
        query, key, value = states
        missing = query.shape[-1] - value.shape[-1]
        if missing and self.core_attention.kernel.func is not sdpa:  # the others need one width
            value = F.pad(value, (0, missing))
        output = self.core_attention(query, key, value, packed_seq_params=packed_seq_params)
        heads = output.view(len(query), query.shape[1], -1)
        return heads[..., : self._latent.value].flatten(1)


def _up_projection(config: LayerConfig, inputs: int, outputs: int) -> ColumnParallelLinear:
    """Cut along the heads; it gathers the parts of the sequence."""
    return ColumnParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        skip_bias_add=False,
    )
