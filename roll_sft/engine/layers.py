"""The modules of a layer that Megatron's local layer spec lacks, and where a family puts them.

Legend: N tokens (of the sequence-parallel shard where there is one), H heads of this tensor rank,
E head dimension, D hidden size, F columns of the MLP on this tensor rank.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import MegatronModule, ModuleSpec, TransformerConfig

from roll_sft.engine.fused import run_compiled
from roll_sft.models.shape import ModelShape


@dataclass
class LayerConfig(TransformerConfig):
    """Megatron's configuration, which every module gets, with fields of ours."""

    is_compiled: bool = False  # whether element-wise functions run compiled
    quantizes_base: bool = False  # whether linear layers are built for NF4
    variation: Any = None  # the model's `models.variation.Variation`
    loss_terms: Any = None  # `objective.Terms`, of a recipe that has any

    recompute_modules: list[str] | None = None  # Megatron's own

    def __post_init__(self) -> None:
        if self.num_moe_experts:  # Megatron's name for the experts in place of the MLP
            names = self.recompute_modules or []
            if isinstance(self.moe_layer_freq, int):  # else some layers have an MLP
                names = [name for name in names if name != "mlp"]
            has_mlp = "mlp" in (self.recompute_modules or [])
            self.recompute_modules = [*names, *(["moe"] if has_mlp else [])]
        super().__post_init__()
        # Megatron's name for an MLP that takes its activation from the layer spec.
        self.use_te_activation_func = self.is_compiled


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is marked as replicated over sequence-parallel shards.

    On CUDA torch 2.9 and newer run one kernel forward and two backward. Elsewhere there are seven
    and more, of which `run_compiled` makes one.
    """

    def __init__(self, config: LayerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self._is_compiled = config.is_compiled
        self._adds_one = config.variation is not None and config.variation.norm_adds_one
        # finalize_model_grads sums the gradients of marked parameters over the tensor group.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 -- a mark

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[..., D] -> the same shape and dtype."""
        weight = self.weight.float() + 1 if self._adds_one else self.weight
        if not self._is_compiled or (values.is_cuda and _has_cuda_kernel() and not self._adds_one):
            return F.rms_norm(values, values.shape[-1:], weight, self.eps).to(values.dtype)
        rows = values.reshape(-1, values.shape[-1])
        normed: torch.Tensor = run_compiled(normed_rows, [rows], weight, self.eps)
        return normed.view(values.shape)


class SwiGLU(MegatronModule):
    """The activation of a compiled MLP, one function of the joint projection."""

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        """[N, 1, 2 F], or [N, 2 F], the gates and then what they gate -> F in place of 2 F."""
        # A view, not `pairs[:, 0]`: the backward of an index fills and copies the whole activation.
        rows = pairs.flatten(0, -2)
        activated: torch.Tensor = run_compiled(swiglu, [rows], self.config.activation_func)
        # By name, not -1: an expert that gets no token has no number to tell the width from.
        return activated.view(*pairs.shape[:-1], activated.shape[-1])


def swiglu(
    pairs: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor] = F.silu
) -> torch.Tensor:
    """[N, 2 F] -> [N, F], same dtype; computed in fp32."""
    # Halves are converted, not the whole: a tensor that is cut in fp32 would be joined in fp32.
    gates, gated = pairs.chunk(2, dim=-1)
    return (activation(gates.float()) * gated.float()).to(pairs.dtype)


def square_sums(rows: torch.Tensor) -> torch.Tensor:
    """[N, D] -> float32 [N, 1]."""
    return rows.float().square().sum(-1, keepdim=True)


def scaled_rows(
    rows: torch.Tensor, squares: torch.Tensor, weight: torch.Tensor, width: int, eps: float
) -> torch.Tensor:
    """`rows` [N, D], whose `width` parts have `squares` [N, 1] in all, normed by `weight` [D]."""
    normed = rows.float() * torch.rsqrt(squares / width + eps)
    return (weight * normed).to(rows.dtype)


def normed_rows(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm as one function: [N, D] by `weight` [D], same dtype; computed in fp32."""
    return scaled_rows(rows, square_sums(rows), weight, rows.shape[-1], eps)


@functools.cache
def _has_cuda_kernel() -> bool:
    # torch got both kernels together with this operator; see aten's layer_norm_kernel.cu.
    return hasattr(torch.ops.aten, "_fused_rms_norm_backward")


def layer_spec(shape: ModelShape, *, core_attention: Any) -> ModuleSpec:
    """Megatron's local layer with `core_attention`, our activation and the norms of `shape`."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.qk_norm != "none")
    attention = layer.submodules.self_attention
    attention.submodules.core_attention = core_attention
    if shape.qk_norm == "head":
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    mlp = layer.submodules.mlp
    # megatron-core 0.19 gives the MLP's own builder, older ones a ModuleSpec.
    has_builder = isinstance(mlp, functools.partial)
    (mlp.keywords["submodules"] if has_builder else mlp.submodules).activation_func = SwiGLU
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if shape.qk_norm == "projection" or shape.norm_placement != "pre":
        from roll_sft.engine.variations.other_norms import use_other_norms

        use_other_norms(layer, shape)
    if latent := shape.variation and shape.variation.latent:
        from roll_sft.engine.variations.latent_attention import use_latents

        use_latents(layer, latent)
    if shape.experts is not None:
        from roll_sft.engine.moe.experts import expert_spec

        layer.submodules.mlp = expert_spec(shape)
    return layer
