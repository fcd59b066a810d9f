"""The modules of a layer that Megatron's local layer spec lacks, and where a family puts them.

Legend: N tokens (of the sequence-parallel shard where there is one), H heads of this tensor rank,
E head dimension, D hidden size, F columns of the MLP on this tensor rank.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import MegatronModule, ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from roll_sft.engine.fused import run_compiled
from roll_sft.models.shape import ModelShape


@dataclass
class LayerConfig(TransformerConfig):
    """Megatron's configuration, which every module gets, with fields of ours."""

    is_compiled: bool = False  # whether element-wise functions run compiled
    quantizes_base: bool = False  # whether linear layers are built for NF4

    def __post_init__(self) -> None:
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
        # finalize_model_grads sums the gradients of marked parameters over the tensor group.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 -- a mark

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[..., D] -> the same shape and dtype."""
        if not self._is_compiled or (values.is_cuda and _has_cuda_kernel()):
            return super().forward(values)
        rows = values.reshape(-1, values.shape[-1])
        normed: torch.Tensor = run_compiled(normed_rows, [rows], self.weight, self.eps)
        return normed.view(values.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Megatron's checkpoint entry: the same on every tensor rank."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)


class ProjectionNorm(torch.nn.Module):
    """RMSNorm over all heads of a query or key projection at once, its heads cut over tensor ranks.

    The weight holds this rank's heads, [H * E]; the mean square is over the heads of all ranks.
    """

    def __init__(self, config: LayerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self._is_compiled = config.is_compiled
        self._eps = eps
        self._width = self._heads_in(config) * hidden_size
        local = self._width // parallel_state.get_tensor_model_parallel_world_size()
        self.weight = torch.nn.Parameter(torch.ones(local, dtype=config.params_dtype))
        # By these marks the gradient norm counts every rank's part.
        for mark, value in (
            ("tensor_model_parallel", True),
            ("partition_dim", 0),
            ("partition_stride", 1),
        ):
            setattr(self.weight, mark, value)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """[N, 1, H, E] -> the same shape and dtype."""
        rows = heads.reshape(len(heads), -1)
        squares = self._call(square_sums, [rows])
        # Every rank's output depends on every rank's heads: the sum is reduced on the way there,
        # and so is its gradient on the way back.
        total = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(squares)
        )
        normed = self._call(scaled_rows, [rows, total], self.weight, self._width, self._eps)
        return normed.view(heads.shape)

    def _call(self, function: Any, rows: list[torch.Tensor], *rest: Any) -> torch.Tensor:
        return run_compiled(function, rows, *rest) if self._is_compiled else function(*rows, *rest)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Megatron's checkpoint entry: cut along the heads."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)

    def _heads_in(self, config: LayerConfig) -> int:
        raise AssertionError("use QueryNorm or KeyNorm")


class QueryNorm(ProjectionNorm):
    """Over all query heads."""

    def _heads_in(self, config: LayerConfig) -> int:
        return config.num_attention_heads


class KeyNorm(ProjectionNorm):
    """Over all key heads."""

    def _heads_in(self, config: LayerConfig) -> int:
        assert config.num_query_groups is not None, "the number of key heads is always given"
        return config.num_query_groups


class SwiGLU(MegatronModule):
    """The activation of a compiled MLP, one function of the joint projection."""

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        """[N, 1, 2 F], the gates and then what they gate -> [N, 1, F], same dtype."""
        # A view, not `pairs[:, 0]`: the backward of an index fills and copies the whole activation.
        activated: torch.Tensor = run_compiled(swiglu, [pairs.flatten(0, 1)])
        return activated.unsqueeze(1)


class PostNormAttention(SelfAttention):
    """Self-attention whose output is normed before the residual addition."""

    def __init__(self, config: LayerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.post_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `SelfAttention`: [N, 1, D] and no bias."""
        output, bias = super().forward(*args, **kwargs)
        return self.post_layernorm(output), bias


class PostNormMLP(MLP):
    """MLP whose output is normed before the residual addition."""

    def __init__(self, config: LayerConfig, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("ffn_hidden_size") is None:  # Megatron gives it to an MLP of its own alone
            kwargs["ffn_hidden_size"] = config.ffn_hidden_size
        super().__init__(config, *args, **kwargs)
        self.post_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `MLP`: [N, 1, D] and no bias."""
        output, bias = super().forward(*args, **kwargs)
        return self.post_layernorm(output), bias


def swiglu(pairs: torch.Tensor) -> torch.Tensor:
    """[N, 2 F] -> [N, F], same dtype; computed in fp32."""
    # Halves are converted, not the whole: a tensor that is cut in fp32 would be joined in fp32.
    gates, gated = pairs.chunk(2, dim=-1)
    return (F.silu(gates.float()) * gated.float()).to(pairs.dtype)


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


def layer_spec(shape: ModelShape, *, core_attention: type) -> ModuleSpec:
    """Megatron's local layer with `core_attention`, our activation and the norms of `shape`."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.qk_norm != "none")
    attention = layer.submodules.self_attention
    attention.submodules.core_attention = core_attention
    if shape.qk_norm == "head":
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    elif shape.qk_norm == "projection":
        attention.submodules.q_layernorm = QueryNorm
        attention.submodules.k_layernorm = KeyNorm
    mlp = layer.submodules.mlp
    # megatron-core 0.19 gives the MLP's own builder, older ones a ModuleSpec.
    has_builder = isinstance(mlp, functools.partial)
    (mlp.keywords["submodules"] if has_builder else mlp.submodules).activation_func = SwiGLU
    if shape.norm_placement == "pre":
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    else:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
        attention.module = PostNormAttention
        if has_builder:
            builder = PostNormMLP.as_mlp_submodule
            layer.submodules.mlp = functools.partial(builder, *mlp.args, **mlp.keywords)
        else:
            mlp.module = PostNormMLP
    return layer
