"""Experts of gpt-oss' kind: with biases, clamped activations, and all of a rank in one tensor.

Legend: N tokens that came to this rank's experts, in the order of these, e experts of this rank, D
hidden size, F width of an expert.

Megatron's local experts cannot have biases where tensor ranks exchange tokens: its reduction writes
in place into a view. Experts are whole here, so nothing is reduced.
"""

import functools
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer import MegatronModule, ModuleSpec

from roll_sft.engine.fused import run_compiled
from roll_sft.engine.layers import LayerConfig
from roll_sft.models.moe.experts import ExpertShape


def biased_experts(experts: ExpertShape, *, replaced: Any) -> Any:
    """What Megatron builds as the experts of a layer, in place of `replaced`."""
    if isinstance(replaced, ModuleSpec):
        return ModuleSpec(module=BiasedExperts, params={"experts": experts})
    return functools.partial(BiasedExperts, experts=experts)  # from megatron-core 0.19 on


class StackedLinear(torch.nn.Module):
    """One matrix and one bias for each expert of this rank, in one parameter each."""

    def __init__(self, size: tuple[int, int, int], config: LayerConfig) -> None:
        """`size` is (e, inputs, outputs)."""
        super().__init__()
        num_experts, _, outputs = size
        dtype = config.params_dtype
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.empty(num_experts, outputs, dtype=dtype))
        for parameter in (self.weight, self.bias):
            # No other tensor rank has the same: the gradient norm counts it.
            setattr(parameter, "tensor_model_parallel", True)  # noqa: B010 -- a mark


class BiasedExperts(MegatronModule):
    """The experts of this rank, one after the other, for Megatron's layer of experts."""

    def __init__(
        self,
        num_local_experts: int,
        config: LayerConfig,
        *,
        experts: ExpertShape,
        pg_collection: Any,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        width = config.moe_ffn_hidden_size
        assert width is not None, "the width of an expert is always given"
        hidden = config.hidden_size
        self.gate_up = StackedLinear((num_local_experts, hidden, 2 * width), config)
        self.down = StackedLinear((num_local_experts, width, hidden), config)
        self._constants = experts.gate_limit, experts.gate_slope
        self._expert_group, self._replicas = pg_collection.ep, pg_collection.expt_dp

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """`tokens` [N, D], `tokens_per_expert` int [e], `weights` [N] -> [N, D] and no bias."""
        counts = tokens_per_expert.tolist()
        # Not by index: the backward of each would make a gradient of all experts.
        parts = (
            tokens.split(counts),
            weights.split(counts),
            *(each.unbind() for each in (self.gate_up.weight, self.gate_up.bias)),
            *(each.unbind() for each in (self.down.weight, self.down.bias)),
        )
        outputs = []
        for rows, weight, gate_up, gate_up_bias, down, down_bias in zip(*parts, strict=True):
            pairs = torch.addmm(gate_up_bias, rows, gate_up)
            activated = self._activated(pairs)
            output = torch.addmm(down_bias, activated, down)
            outputs.append((output * weight[:, None]).to(tokens.dtype))
        return torch.cat(outputs), None

    def _activated(self, pairs: torch.Tensor) -> torch.Tensor:
        if not self.config.is_compiled:
            return clamped_swiglu(pairs, *self._constants)
        activated: torch.Tensor = run_compiled(clamped_swiglu, [pairs], *self._constants)
        return activated

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Megatron's checkpoint entry: cut along the experts."""
        axis = len(sharded_offsets)
        cut = (axis, self._expert_group.rank(), self._expert_group.size())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                parameter,
                *sharded_offsets,
                cut,
                replica_id=(0, 0, self._replicas.rank()),
                prepend_axis_num=axis,
            )
            for name, parameter in self.named_parameters()
        }


def clamped_swiglu(pairs: torch.Tensor, limit: float, slope: float) -> torch.Tensor:
    """[N, 2 F], gates and what they gate in turn -> [N, F], same dtype; computed in fp32."""
    gates = pairs[..., ::2].float().clamp(max=limit)
    gated = pairs[..., 1::2].float().clamp(min=-limit, max=limit)
    return ((gated + 1) * gates * torch.sigmoid(slope * gates)).to(pairs.dtype)
