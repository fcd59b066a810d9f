"""Norms of queries and keys over a whole projection, and norms behind attention and MLP.

Legend: N tokens (of the sequence-parallel shard where there is one), H heads of this tensor rank,
E head dimension, D hidden size.
"""

import functools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from roll_sft.engine.fused import run_compiled
from roll_sft.engine.layers import LayerConfig, RMSNorm, scaled_rows, square_sums
from roll_sft.models.shape import ModelShape


def use_other_norms(layer: ModuleSpec, shape: ModelShape) -> None:
    """Give `layer`, of `layers.layer_spec`, the norms of `shape` that a plain decoder lacks."""
    attention, mlp = layer.submodules.self_attention, layer.submodules.mlp
    if shape.qk_norm == "projection":
        attention.submodules.q_layernorm = QueryNorm
        attention.submodules.k_layernorm = KeyNorm
    if shape.norm_placement == "pre":
        return
    if shape.norm_placement == "post":
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    attention.module = PostNormAttention
    # megatron-core 0.19 gives the MLP's own builder, older ones a ModuleSpec.
    if isinstance(mlp, functools.partial):
        builder = PostNormMLP.as_mlp_submodule
        layer.submodules.mlp = functools.partial(builder, *mlp.args, **mlp.keywords)
    else:
        mlp.module = PostNormMLP


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
        self.post_layernorm = NormInMLP(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `MLP`: [N, 1, D] and no bias."""
        output, bias = super().forward(*args, **kwargs)
        return self.post_layernorm(output), bias


class NormInMLP(RMSNorm):
    """A norm that makes its checkpoint entry, as an MLP of Megatron's asks of its parts."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Megatron's checkpoint entry: the same on every tensor rank."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)
