"""LoRA on a rank: adapters beside Megatron's linear layers, and what follows for the engine.

Legend: N tokens, r rank, P adapted projections of a fused weight, I inputs and O outputs of the
weight on this tensor rank, R <= O rows of it that have adapters.

Where the base is cut along its outputs, A is whole on every tensor rank and B is cut; where it is
cut along its inputs, A is cut, B is whole, and the product is added before the reduction. So the
forward and the backward need no other collectives than the base. The gradient of the whole half is
then a part of a sum over the tensor ranks on each of them; `sum_whole_halves` adds it up, once a
step.

Promises: adapters equal PEFT's on every layout; the base is never changed; only adapters have
gradients and optimizer state.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from roll_sft.base.layout import Coordinate, ParallelLayout
from roll_sft.checkpoint.tensors import Piece
from roll_sft.config.lora import LoraConfig
from roll_sft.config.schema import RunConfig
from roll_sft.engine.adapters.adapted_linear import (
    ROW_PARALLEL,
    AdaptedColumns,
    AdaptedRows,
    linear_layers,
)
from roll_sft.engine.adapters.lora_dropout import TokenDropout, with_keys
from roll_sft.engine.adapters.low_rank import (
    AdaptedProduct,
    AddedProduct,
    FrozenLayer,
    Projections,
    slices_of,
)
from roll_sft.engine.build import named_parameters
from roll_sft.engine.layers import LayerConfig
from roll_sft.engine.micro_batch import Indices, MicroBatch
from roll_sft.engine.recipes.frozen import keep_gradients_of_recomputed
from roll_sft.engine.state import Place
from roll_sft.models.adapters.adapter import (
    AdaptedWeight,
    adapted_weights,
    peft_name,
    saved_weights,
    scaling,
)
from roll_sft.models.adapters.peft_folder import AdapterSource
from roll_sft.models.source import ModelSource


class Adapter(torch.nn.Module):
    """The adapters of the projections that are fused in one weight of Megatron's.

    `lora_A` [P * r, I] and `lora_B` [R, r] hold those of one projection after the other.
    """

    def __init__(
        self,
        weight: AdaptedWeight,
        *,
        lora: LoraConfig,
        like: torch.Tensor,
        dropout: TokenDropout | None,
    ) -> None:
        """`like` is the base weight [O, I], for its shape, dtype and device."""
        super().__init__()
        self._dropout = dropout
        self._weight, self._rank, self._scale = weight, lora.rank, scaling(lora)
        num_outputs, num_inputs = like.shape
        self.runs, places, slices = _rows_of(weight)
        self._projections = Projections(
            rank=lora.rank,
            sizes=tuple(map(len, places)),
            slices=slices,
            places=() if slices else tuple(each.to(like.device) for each in places),
            num_outputs=num_outputs,
        )
        height = lora.rank * len(weight.modules)
        self.lora_A = torch.nn.Parameter(like.new_zeros(height, num_inputs))
        self.lora_B = torch.nn.Parameter(like.new_zeros(sum(map(len, places)), lora.rank))
        cut, dim = (self.lora_A, 1) if weight.is_row_parallel else (self.lora_B, 0)
        # By these marks the gradient norm counts every rank's part, and the whole half once.
        for mark, value in (
            ("tensor_model_parallel", True),
            ("partition_dim", dim),
            ("partition_stride", 1),
        ):
            setattr(cut, mark, value)

    @property
    def whole_half(self) -> torch.nn.Parameter:
        """The parameter that all tensor ranks hold alike."""
        return self.lora_B if self._weight.is_row_parallel else self.lora_A

    def forward(self, layer: FrozenLayer, rows: torch.Tensor) -> torch.Tensor:
        """The product [N, O] of `layer` and `rows` [N, I], with the adapters' parts."""
        where = (self._projections, self._scale)
        if self._dropout is None or not self.training:
            product: torch.Tensor = AdaptedProduct.apply(
                rows, self.lora_A, self.lora_B, layer, where
            )
            return product
        first = _tensor_rank() * rows.shape[1] if self._weight.is_row_parallel else 0
        modules, parts = self._weight.modules, self.lora_A.split(self._rank)
        hidden = [  # each projection drops inputs of its own
            F.linear(self._dropout(rows, module=module, first_column=first), part)
            for module, part in zip(modules, parts, strict=True)
        ]
        added: torch.Tensor = AddedProduct.apply(
            layer.product(rows), torch.cat(hidden, dim=1), self.lora_B, where
        )
        return added

    def places(self) -> Iterator[Place]:
        """Where the adapters lie in the tensors of PEFT's that a checkpoint holds."""
        weight, rank, is_second = self._weight, self._rank, _tensor_rank() > 0
        width, start = self.lora_A.shape[1], 0
        if weight.is_row_parallel:
            start = _tensor_rank() * width
        for index, module in enumerate(weight.modules):
            part = self.lora_A.detach()[index * rank : (index + 1) * rank]
            shape = (rank, weight.num_inputs)
            piece = Piece(peft_name(module, "lora_A"), shape, (0, start), part)
            yield Place(part.data_ptr(), piece, is_second and not weight.is_row_parallel)
        first = 0
        for run in self.runs:
            stop = first + run.stop - run.start
            part = self.lora_B.detach()[first:stop]
            shape = (weight.num_outputs(run.module), rank)
            piece = Piece(peft_name(run.module, "lora_B"), shape, (run.start, 0), part)
            yield Place(part.data_ptr(), piece, is_second and weight.is_row_parallel)
            first = stop


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows [start, stop) of a module's B, which lie one after the other on this rank."""

    module: str
    start: int
    stop: int


def _rows_of(
    weight: AdaptedWeight,
) -> tuple[list[_Run], list[torch.Tensor], tuple[slice, ...] | None]:
    """The rows of this tensor rank with adapters: runs, each module's places int64, and slices.

    In the order of the modules; a place is a row of the rank's fused weight. The slices are None
    where the places of a module do not lie together.
    """
    numbers = weight.rows_of_rank(tensor_rank=_tensor_rank(), tensor_size=_tensor_size())
    firsts, runs, places = weight.first_rows(), [], []
    for module in weight.modules:
        first = firsts[f"{module}.weight"]
        is_here = (numbers >= first) & (numbers < first + weight.num_outputs(module))
        place = is_here.nonzero()[:, 0]
        rows, order = (numbers[place] - first).sort()
        places.append(place[order])
        ends = [index + 1 for index, gap in enumerate((rows.diff() > 1).tolist()) if gap]
        for start, stop in itertools.pairwise([0, *ends, len(rows)]):
            if start < stop:
                runs.append(_Run(module, int(rows[start]), int(rows[stop - 1]) + 1))
    return runs, places, slices_of(places)


@dataclass(frozen=True, slots=True)
class Adapters:
    """All that a rank trains: its adapters, and the weights of `modules_to_save`."""

    adapters: tuple[Adapter, ...]
    saved: dict[str, torch.nn.Parameter]  # PEFT's name -> [padded V / TP, D]
    dropout: TokenDropout | None

    def keyed(
        self,
        batches: list[MicroBatch],
        indices: Indices,
        layout: ParallelLayout,
        rank: Coordinate,
    ) -> list[MicroBatch]:
        """`batches` of the samples `indices`, with the keys of their tokens if dropout needs it."""
        if self.dropout is None:
            return batches
        return with_keys(batches, indices, layout=layout, context_rank=rank.context_rank)

    def begin_step(self, step: int) -> None:
        """Called before the forward of step `step`."""
        if self.dropout is not None:
            self.dropout.begin_step(step)

    def places(self) -> list[Place]:
        """Where each trained number lies in the tensors that a checkpoint holds."""
        found = [place for adapter in self.adapters for place in adapter.places()]
        for name, weight in self.saved.items():
            rows, width = weight.shape
            shape, corner = (rows * _tensor_size(), width), (rows * _tensor_rank(), 0)
            piece = Piece(name, shape, corner, weight.detach(), is_padded=True)
            found.append(Place(weight.data_ptr(), piece, is_copy=False))
        return found


def adapted(
    chunks: Sequence[GPTModel],
    source: ModelSource,
    config: RunConfig,
    *,
    layers: LayerConfig,
    is_new: bool,
) -> Adapters:
    """Freeze the loaded `chunks`, and put adapters where `config.lora` asks for them.

    They begin at their first values, or at those of `lora.adapter_path`, if the run `is_new`; else
    at zero, for a checkpoint to fill. Raises `CheckpointError` for an adapter that is damaged.
    """
    saved = saved_weights(source.family, source.shape, config.lora)
    trained = {}
    for name, parameter in named_parameters(list(chunks)):
        parameter.requires_grad_(name in saved)
        if name in saved:
            trained[peft_name(saved[name].name.removesuffix(".weight"))] = parameter
    weights = adapted_weights(source.family, source.shape, config.lora)
    dropout = None
    if config.lora.dropout:
        dropout = TokenDropout(
            config.lora.dropout, seed=config.seed, is_compiled=layers.is_compiled
        )
    if layers.quantizes_base:
        from roll_sft.engine.adapters.quantized import quantize

        quantize(chunks, source, config.lora)
    made = _adapters(chunks, weights, config.lora, layers=layers, dropout=dropout)
    adapters = Adapters(tuple(made), trained, dropout)
    keep_gradients_of_recomputed(chunks, layers)
    _sum_halves_at_the_end(layers, [adapter.whole_half for adapter in adapters.adapters])
    path = config.lora.adapter_path
    if is_new and path is None:
        _begin(adapters, lora=config.lora, seed=config.seed)
    elif is_new and path is not None:
        _load(adapters, AdapterSource(path))
    return adapters


def _adapters(
    chunks: Sequence[GPTModel],
    weights: Mapping[str, AdaptedWeight],
    lora: LoraConfig,
    *,
    layers: LayerConfig,
    dropout: TokenDropout | None,
) -> Iterator[Adapter]:
    """Put an adapter beside each linear layer whose weight is one of `weights`."""
    if dropout is not None:
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                dropout.follow(layer)
    for name, owner, leaf in linear_layers(chunks):
        weight, base, adapter = weights.get(name), getattr(owner, leaf), None
        if weight is not None:
            adapter = Adapter(weight, lora=lora, like=base.weight, dropout=dropout)
            yield adapter
        if adapter is not None or layers.quantizes_base:
            kind = AdaptedRows if leaf in ROW_PARALLEL else AdaptedColumns
            setattr(owner, leaf, kind(base, adapter, config=layers))


def _sum_halves_at_the_end(layers: LayerConfig, halves: Sequence[torch.nn.Parameter]) -> None:
    """Have the gradients of `halves` added up over the tensor ranks at the end of each backward."""
    if _tensor_size() == 1 or not halves:
        return
    finalize: Any = layers.finalize_model_grads_func

    def finalize_and_sum(model: Any, *rest: Any, **named: Any) -> None:
        finalize(model, *rest, **named)
        gradients = [half.main_grad.view(-1) for half in halves]  # type: ignore[attr-defined]
        joint = torch.cat(gradients)
        dist.all_reduce(joint, group=parallel_state.get_tensor_model_parallel_group())
        for gradient, part in zip(gradients, joint.split([*map(len, gradients)]), strict=True):
            gradient.copy_(part)

    layers.finalize_model_grads_func = finalize_and_sum


def _begin(adapters: Adapters, *, lora: LoraConfig, seed: int) -> None:
    """Give every A its first values; B stays zero.

    Each tensor is drawn whole from a generator of its own, seeded by `seed` and its name, so that
    the values do not depend on the layout.
    """
    with torch.no_grad():
        for place in adapters.places():
            if place.piece.key.endswith(".lora_A.weight"):
                whole = _first_values(place.piece, lora=lora, seed=seed)
                place.piece.tensor.copy_(_rectangle(whole, place.piece))


def _first_values(piece: Piece, *, lora: LoraConfig, seed: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{piece.key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    whole = torch.empty(piece.shape, dtype=torch.float32, device="cpu")
    if lora.init == "gaussian":
        return whole.normal_(0.0, 1 / lora.rank, generator=generator)
    bound = 1 / math.sqrt(piece.shape[1])
    return whole.uniform_(-bound, bound, generator=generator)


def _load(adapters: Adapters, source: AdapterSource) -> None:
    """Fill what is trained from the tensors of a PEFT folder, whose embedding is not padded."""
    with torch.no_grad():
        for place in adapters.places():
            part = _rectangle(source.read(place.piece.key), place.piece)
            place.piece.tensor[: len(part)].copy_(part)


def _rectangle(whole: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The numbers of `piece` in its whole tensor."""
    for dim, (start, size) in enumerate(zip(piece.offset, piece.tensor.shape, strict=True)):
        start = min(start, whole.shape[dim])
        whole = whole.narrow(dim, start, min(size, whole.shape[dim] - start))
    return whole


def _tensor_rank() -> int:
    rank: int = parallel_state.get_tensor_model_parallel_rank()
    return rank


def _tensor_size() -> int:
    size: int = parallel_state.get_tensor_model_parallel_world_size()
    return size
