"""Experts: Megatron's layer of them with a router of ours, and the balance of their load.

Legend: N tokens of this rank's part of the sequence, E experts, D hidden size, L layers.

A token goes to the `experts_per_token` experts of its largest scores, a softmax over all of them or
a sigmoid of each; none is dropped. Padding goes to no expert and counts nowhere. Experts lie on
consecutive ranks of a pipeline stage, tensor ranks included, and each is whole on its rank. So the
gradient of an expert is summed over the ranks that hold the same one, and not over data ranks.

The auxiliary loss is transformers' `load_balancing_loss_func` of the whole global batch, its real
tokens alone: E * sum over experts of f * p, where f is the number of tokens sent to an expert and p
the sum of its scores, over all layers and tokens, both divided by the number of (layer, token)
pairs. Only p has a gradient, and it needs f of the whole batch. Megatron's own loss is one of each
micro-batch, so it would depend on the layout, and its scale on the loss mask. So a forward pass
over all micro-batches counts first; without the loss (coefficient 0) there is none, and the counts
are those of the training pass.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer import MegatronModule, ModuleSpec
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import get_attr_wrapped_model

from roll_sft.base.errors import ConfigError
from roll_sft.base.expert_load import ExpertLoad
from roll_sft.base.layout import ParallelLayout
from roll_sft.checkpoint.tensors import Piece
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.data.steps.batch import zigzag_indices
from roll_sft.data.tokens.cache import TokenSet
from roll_sft.engine.layers import LayerConfig, SwiGLU, layer_spec
from roll_sft.engine.micro_batch import Indices, MicroBatch
from roll_sft.engine.moe.router_z_loss import RouterZLoss
from roll_sft.engine.state import EXPERTS
from roll_sft.models.moe.experts import ExpertShape
from roll_sft.models.moe.fused_experts import MARK, FusedExperts
from roll_sft.models.prediction import kept_of, kept_source
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import ModelSource

LOCAL = ".local_experts."


def expert_settings(shape: ModelShape, layout: ParallelLayout) -> dict[str, Any]:
    """Fields of Megatron's configuration that a model with experts needs besides."""
    experts = shape.experts
    assert experts is not None, f"{shape.architecture} has no experts"
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.experts_per_token,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": experts.has_shared_gate,
        "expert_model_parallel_size": layout.expert_size,
        "expert_tensor_parallel_size": 1,
        "moe_router_load_balancing_type": "none",  # ours is in the router
        "moe_router_pre_softmax": True,
        # No expert is ever full. Without it megatron-core 0.19 assumes that every token goes to as
        # many experts, and padding goes to none.
        "moe_expert_capacity_factor": float(experts.num_experts),
        **({"moe_layer_freq": _layers_with_experts(shape)} if experts.num_dense_layers else {}),
    }


def _layers_with_experts(shape: ModelShape) -> list[int]:
    """1 for each layer with experts, and 0 for one without, as Megatron wants it."""
    with_experts = shape.num_expert_layers
    return [0] * (shape.num_layers - with_experts) + [1] * with_experts


def expert_spec(shape: ModelShape) -> Any:
    """Megatron's local layer of experts with our router and activation, for a layer spec."""
    assert shape.experts is not None, f"{shape.architecture} has no experts"
    spec = get_moe_module_spec(
        use_te=False, num_experts=shape.experts.num_experts, moe_grouped_gemm=False
    )
    submodules = _submodules(spec)
    submodules.router = functools.partial(Router, experts=shape.experts)
    for mlp in (submodules.experts, submodules.shared_experts):
        _submodules(mlp).activation_func = SwiGLU
    if shape.experts.has_biases:
        from roll_sft.engine.moe.biased_experts import biased_experts

        submodules.experts = biased_experts(shape.experts, replaced=submodules.experts)
    return spec


def with_dense_layers(
    layers: list[ModuleSpec], shape: ModelShape, config: LayerConfig, *, stage: int | None
) -> list[ModuleSpec]:
    """`layers` of this rank's (virtual) `stage`, the model's first ones with an MLP."""
    assert shape.experts is not None, f"{shape.architecture} has no experts"
    attention = layers[0].submodules.self_attention
    dense = layer_spec(
        replace(shape, experts=None), core_attention=attention.submodules.core_attention
    )
    num_dense = shape.experts.num_dense_layers - get_transformer_layer_offset(
        config, vp_stage=stage
    )
    return [dense if index < num_dense else layer for index, layer in enumerate(layers)]


def _submodules(spec: Any) -> Any:
    # megatron-core 0.19 gives a builder, older ones a ModuleSpec.
    return spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]


class Router(MegatronModule):
    """Scores every expert for each token and chooses the best."""

    def __init__(self, config: LayerConfig, *, experts: ExpertShape, **_: Any) -> None:
        super().__init__(config=config)
        assert config.num_moe_experts is not None, "a router needs experts"
        size = config.num_moe_experts, config.hidden_size
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype))
        self.bias: torch.nn.Parameter | None = None
        if experts.has_biases:
            bias = torch.empty(config.num_moe_experts, dtype=config.params_dtype)
            self.bias = torch.nn.Parameter(bias)
        for parameter in self.parameters():
            # finalize_model_grads sums the gradients of marked parameters over the tensor group.
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010 -- a mark
        # Trained by no gradient. It stays in fp32, whose small steps bf16 would lose.
        self.score_bias: torch.nn.Parameter | None = None
        if experts.has_sigmoid:
            scores = torch.zeros(config.num_moe_experts, dtype=torch.float32)
            self.score_bias = torch.nn.Parameter(scores, requires_grad=False)
        self._experts = experts
        self.balance: Callable[..., torch.Tensor] | None = None  # of this layer
        self.penalized: Callable[..., torch.Tensor] | None = None  # by the z-loss

    def set_layer_number(self, layer_number: int) -> None:
        """The layer's index in the model, from 1; called by Megatron."""
        self.layer_number = layer_number

    def forward(
        self, hidden: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden` [N, 1, D], `padding_mask` bool [N, 1], True where a token is padding.

        Returns the weight of each expert [N, E], 0 where it is not chosen, in the dtype of
        `hidden`, and whether it is chosen, bool [N, E].
        """
        rows = hidden.flatten(0, 1)
        if self._experts.has_sigmoid:
            logits = F.linear(rows.float(), self.weight.float())
        else:
            logits = F.linear(rows, self.weight, self.bias)
        if self.penalized is not None:
            logits = self.penalized(logits, padding_mask)
        is_sigmoid = self._experts.has_sigmoid
        scores = logits.sigmoid() if is_sigmoid else logits.softmax(dim=-1, dtype=torch.float32)
        chosen = self._chosen(scores.detach())
        is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
        if padding_mask is not None:
            is_chosen &= ~padding_mask.reshape(-1, 1)
        if self.balance is not None:
            scores = self.balance(scores, is_chosen)
        chosen_scores = scores.gather(1, chosen)
        if self._experts.is_normalized:  # sigmoids may all be 0
            chosen_scores = chosen_scores / (chosen_scores.sum(dim=-1, keepdim=True) + 1e-20)
        if self._experts.weight_scale != 1.0:
            chosen_scores = chosen_scores * self._experts.weight_scale
        weights = torch.zeros_like(scores).scatter(1, chosen, chosen_scores)
        return weights.to(rows.dtype), is_chosen

    def _chosen(self, scores: torch.Tensor) -> torch.Tensor:
        """Indices of the experts of each token, int64 [N, n], of `scores` [N, E]."""
        if self.score_bias is not None:
            scores = scores + self.score_bias
        groups = self._experts.num_groups
        if groups > 1:
            of_groups = scores.unflatten(1, (groups, -1)).topk(2, dim=-1).values.sum(-1)
            best = of_groups.topk(self._experts.groups_per_token, dim=-1).indices
            is_open = torch.zeros_like(of_groups, dtype=torch.bool).scatter(1, best, True)
            size = scores.shape[1] // groups
            scores = scores.masked_fill(~is_open.repeat_interleave(size, dim=1), -torch.inf)
        return scores.topk(self._experts.experts_per_token, dim=-1).indices

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        bias = None if self.score_bias is None else self.score_bias.data
        super()._apply(fn, recurse)
        if bias is not None and self.score_bias is not None:  # rounded now, and moved
            self.score_bias.data = bias.to(self.score_bias.device)
        return self


class _AddGradient(torch.autograd.Function):
    """Scores as they are, whose gradient gets that of the auxiliary loss."""

    @staticmethod
    def forward(
        ctx: Any, scores: torch.Tensor, is_real: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(is_real, gradient)
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        is_real, gradient = ctx.saved_tensors
        return grads[0] + is_real * gradient, None, None


class Experts:
    """The experts of this rank's model: the marks of their parameters, and their load."""

    def __init__(
        self, chunks: list[GPTModel], source: ModelSource, config: RunConfig, *, recipe: Any
    ) -> None:
        """Mark the parameters of `chunks`, which are not wrapped yet.

        Raises `ConfigError` for data with weights, where the loss of the `recipe` is not plain.
        """
        self._source, shape = source, source.shape
        assert shape.experts is not None, f"{shape.architecture} has no experts"
        if recipe is not None and recipe.terms is not None:
            raise ConfigError(
                f"data.train: rows have weights, and {shape.architecture} has experts, which this"
                " version trains by the plain loss; remove that column"
            )
        self._experts, self._layout = shape.experts, layout_of(config.parallel)
        coefficient = config.moe.aux_loss_coef
        self._coefficient = shape.experts.aux_loss_coef if coefficient is None else coefficient
        self._has_adapters = config.lora.rank > 0
        self._bias_rate = config.moe.router_bias_update_rate
        recompute = config.train.recompute
        self._is_recomputed = recompute == "full" or "mlp" in recompute
        # Tokens sent to each expert of each layer that has some, and sums of their scores.
        device = torch.cuda.current_device()
        size = (2, shape.num_expert_layers, shape.experts.num_experts)
        self._totals = torch.zeros(size, dtype=torch.float64, device=device)
        self._gradient: torch.Tensor | None = None
        # Supervised and real tokens: of this rank, and when reduced of the global batch.
        self._tokens: list[Any] = [0, 0]
        self._is_counting = False
        modules = (module for chunk in chunks for module in chunk.modules())
        routers = [module for module in modules if isinstance(module, Router)]
        num_dense = shape.experts.num_dense_layers
        self._routers = {router.layer_number - 1 - num_dense: router for router in routers}
        self._z_loss: RouterZLoss | None = None
        if config.moe.z_loss_coef:
            self._z_loss = RouterZLoss(config.moe.z_loss_coef, num_layers=size[1])
        for layer, router in self._routers.items():
            router.balance = functools.partial(self._balance, layer)
            if self._z_loss is not None:
                router.penalized = self._z_loss.penalized
        for chunk in chunks:
            self._mark(chunk)

    def _mark(self, chunk: GPTModel) -> None:
        """Have the gradients of experts summed over the ranks that hold the same ones.

        Megatron's own mark forgets tensor ranks that hold the same experts: it is made of the size
        of the expert group alone.
        """
        is_apart = self._layout.expert_size * self._layout.tensor_size > 1
        for name, parameter in chunk.named_parameters():
            if EXPERTS in name:
                setattr(parameter, "allreduce", not is_apart)  # noqa: B010 -- a mark

    def kept(self) -> list[Piece]:
        """This rank's share of what a checkpoint keeps of the model's files, and no rank trains."""
        files, rank = kept_source(self._source), dist.get_rank()
        table = {} if files is None or self._has_adapters else kept_of(files)
        pieces = []
        for key, mapping in list(table.items())[rank :: dist.get_world_size()]:
            assert files is not None, "what is kept comes from files"
            tensor = mapping.local(files, tensor_rank=0, tensor_size=1).contiguous()
            pieces.append(Piece(key, tuple(tensor.shape), (0,) * tensor.ndim, tensor))
        is_first = rank == 0 and not self._has_adapters
        if is_first and isinstance(self._source.tensors, FusedExperts):
            pieces.append(Piece(MARK, (1,), (0,), torch.ones(1)))
        return pieces

    def marked(
        self, batches: list[MicroBatch], indices: Indices, tokens: TokenSet, context_rank: int
    ) -> list[MicroBatch]:
        """`batches` of the samples `indices`, and which of their tokens are padding."""
        marked = []
        for batch, ids in zip(batches, indices, strict=True):
            bounds = batch.pack.cu_seqlens
            is_padding = torch.ones(int(bounds[-1]), dtype=torch.bool)
            for start, index in zip(bounds.tolist(), ids, strict=False):
                is_padding[start : start + int(tokens.lengths[index])] = False
            mine = zigzag_indices(
                bounds, context_size=self._layout.context_size, context_rank=context_rank
            )
            marked.append(replace(batch, padding=is_padding[mine][None]))
        return marked

    def arguments(self, batch: MicroBatch, model: Any) -> dict[str, Any]:
        """Keyword arguments of the model's forward that keep padding from the experts."""
        padding = batch.padding
        assert padding is not None, "`marked` says what is padding"
        # The first stage cuts the mask over tensor ranks as it cuts the sequence, no other does.
        if self._layout.sequence_parallel and not get_attr_wrapped_model(model, "pre_process"):
            rank = parallel_state.get_tensor_model_parallel_rank()
            padding = padding.chunk(self._layout.tensor_size, dim=1)[rank]
        return {"padding_mask": padding}

    def begin(self, batches: Sequence[MicroBatch], forward: Callable[[], None]) -> None:
        """Before the gradients of `batches`: count, by a `forward` pass over them. Collective."""
        self._totals.zero_()
        self._tokens = [
            sum(batch.pack.num_supervised for batch in batches),
            sum(int((~batch.padding).sum()) for batch in batches if batch.padding is not None),
        ]
        self._gradient, self._is_counting = None, True
        if self._z_loss is not None:
            tokens = torch.tensor(self._tokens, dtype=torch.float64, device=self._totals.device)
            dist.all_reduce(tokens)
            self._z_loss.begin(tokens / self._ranks_of_a_pack)
        if self._coefficient == 0:
            return
        with torch.no_grad():
            forward()
        self._reduce()
        slope = self._coefficient * self._experts.num_experts * self._counts / self._rows.square()
        # The loss is a sum until it is divided by the supervised tokens of the global batch.
        self._gradient = (slope * self._tokens[0]).float()

    def load(self) -> ExpertLoad:
        """The load of the last global batch; collective, after its gradients, once.

        Moves the biases of sigmoid routers towards an even load, if asked to: by one rate, whatever
        the difference to the mean.
        """
        if self._is_counting:
            self._reduce()
        per_layer, scores = self._totals
        for layer, router in self._routers.items():
            if self._bias_rate and router.score_bias is not None:
                missing = per_layer[layer].mean() - per_layer[layer]
                router.score_bias.add_(missing.sign().float(), alpha=self._bias_rate)
        loss = self._experts.num_experts * (self._counts * scores.sum(0)).sum()
        pairs = self._tokens[1] * len(per_layer) * self._experts.experts_per_token
        return ExpertLoad(
            expert_aux_loss=float(loss / self._rows.square()),
            expert_max_over_mean=float((per_layer.amax(1) / per_layer.mean(1)).max()),
            dropped_tokens=round(float(pairs - self._counts.sum())),
            tokens_per_expert=tuple(int(count) for count in self._counts),
            expert_z_loss=None if self._z_loss is None else self._z_loss.mean(),
        )

    @property
    def _counts(self) -> torch.Tensor:
        """Tokens of all layers on each expert, float64 [E]."""
        return self._totals[0].sum(0)

    @property
    def _ranks_of_a_pack(self) -> int:
        """Ranks that have the same micro-batches, but for context ranks, which have parts."""
        return self._layout.tensor_size * self._layout.pipeline_size

    @property
    def _rows(self) -> torch.Tensor:
        """Pairs of a layer and a token, float64 []."""
        return self._counts.sum() / self._experts.experts_per_token

    def _balance(self, layer: int, scores: torch.Tensor, is_chosen: torch.Tensor) -> torch.Tensor:
        """Count tokens and scores of one layer, and attach the gradient of the auxiliary loss."""
        is_real = is_chosen.any(dim=1, keepdim=True)
        # A layer that is recomputed runs twice, the first time without gradients.
        if self._is_counting and not (self._is_recomputed and torch.is_grad_enabled()):
            with torch.no_grad():
                self._totals[0, layer] += is_chosen.sum(0)
                self._totals[1, layer] += (scores * is_real).sum(0)
        if self._gradient is None:
            return scores
        added: torch.Tensor = _AddGradient.apply(scores, is_real, self._gradient)
        return added

    def _reduce(self) -> None:
        """Sum totals and tokens over all ranks: of those to the global batch."""
        tokens = torch.tensor(self._tokens, dtype=torch.float64, device=self._totals.device)
        both = torch.cat([self._totals.flatten(), tokens])
        # Tensor ranks have parts of the sequence, and stages layers of their own.
        dist.all_reduce(both)
        self._totals, self._is_counting = both[:-2].view_as(self._totals), False
        self._tokens = list(both[-2:] / self._ranks_of_a_pack)


def global_name(name: str, *, num_experts: int) -> str:
    """The parameter `name` of this rank, with the expert's index among all of its layer."""
    before, _, rest = name.partition(LOCAL)
    index, _, tail = rest.partition(".")
    num_local = num_experts // parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * num_local
    return f"{before}{LOCAL}{first + int(index)}.{tail}"
