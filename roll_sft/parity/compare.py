"""Parity: what one rank computes of a batch, beside what transformers computes of it alone.

Rank 0 asks the oracle; then every rank compares what is its own: the outputs of its modules, the
losses of its tokens, the gradients of its shards. The family's weight mappings cut the reference as
they cut the weights, so no tensor travels but through the oracle's files.

Assumes an engine without the distributed optimizer, which leaves a rank parts of gradients only.

Legend: T tokens of this context rank (T / TP in a shard of sequence parallelism), X features.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from roll_sft.base.layout import Coordinate, ParallelLayout
from roll_sft.config.schema import layout_of
from roll_sft.data.steps.batch import PackedBatch, zigzag_indices
from roll_sft.engine import build
from roll_sft.engine.engine import Engine
from roll_sft.engine.micro_batch import MicroBatch
from roll_sft.models.files.safetensors_in import Shape, TensorSource
from roll_sft.models.fused_rows import FusedRows
from roll_sft.models.weight_map import QKV, GatedMLP, WeightMapping, hf_names
from roll_sft.parity.measurement import RankParity, TensorError, TokenError, badness
from roll_sft.parity.oracle import Reference, probed_columns, read_reference, write_reference
from roll_sft.parity.task import ParityTask

# A smaller loss is compared as one nat: its error is that of the logits, which does not shrink.
LOSS_FLOOR = 1.0
SMALLEST = 1e-30  # where a reference is all zeros: equal ones differ by nothing
_HEAD = "output_layer.weight"  # sees selected rows only; the losses stand for its output


def compare(engine: Engine, task: ParityTask) -> RankParity:
    """This rank's errors over the batch of `task`; all ranks call it, rank 0 asks the oracle."""
    if dist.get_rank() == 0:
        write_reference(task, device=torch.device(torch.cuda.current_device()))
    dist.barrier()
    return measure(engine, task)


def measure(engine: Engine, task: ParityTask) -> RankParity:
    """`compare`, where the folder of `task` holds the reference already."""
    assert not task.config.parallel.use_distributed_optimizer, "ranks hold parts of gradients only"
    layout = layout_of(task.config.parallel)
    rank = _Rank(
        task=task,
        reference=read_reference(task.folder),
        mappings=task.source.family.weights(task.source.shape),
        layout=layout,
        place=layout.coordinate(dist.get_rank()),
    )
    batches = engine.build(task.tokens, rank.micro_batches)
    outputs = list(_output_errors(engine, batches, rank=rank))
    engine.accumulate_gradients(batches)
    loss_sum, num_supervised = engine.reduce_losses()
    tokens = list(_token_errors(engine, batches, rank=rank))
    return RankParity(
        loss=loss_sum / num_supervised if num_supervised else None,
        grad_norm=engine.gradient_norm(),
        num_tokens=sum(batch.pack.num_supervised for batch in batches) if rank.counts_tokens else 0,
        worst_token=max(tokens, key=lambda token: badness(token.error), default=None),
        tensors=(*outputs, *_gradient_errors(engine, rank)),
    )


@dataclass(frozen=True, slots=True)
class _Rank:
    """Where this rank is, and what it is compared with."""

    task: ParityTask
    reference: Reference
    mappings: dict[str, WeightMapping]
    layout: ParallelLayout
    place: Coordinate

    @property
    def micro_batches(self) -> tuple[tuple[int, ...], ...]:
        """Sample ids of each micro-batch of this rank."""
        return self.task.plan.ranks[self.place.data_rank]

    @property
    def is_last_stage(self) -> bool:
        """Whether losses are computed here."""
        return self.place.pipeline_rank == self.layout.pipeline_size - 1

    @property
    def counts_tokens(self) -> bool:
        """Whether the losses here are not another tensor rank's as well."""
        return self.is_last_stage and self.place.tensor_rank == 0

    def local(self, mapping: WeightMapping, source: TensorSource) -> torch.Tensor:
        """What `mapping` cuts out of `source` for this rank."""
        return mapping.local(
            source, tensor_rank=self.place.tensor_rank, tensor_size=self.layout.tensor_size
        )

    def origins(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token here: its sample's index in the pack and its position in it, int64 [T]."""
        places = zigzag_indices(
            batch.cu_seqlens,
            context_size=self.layout.context_size,
            context_rank=self.place.context_rank,
        )
        samples = torch.searchsorted(batch.cu_seqlens[1:].long(), places, right=True)
        return samples, batch.positions_T[0]


def _token_errors(
    engine: Engine, batches: Sequence[MicroBatch], *, rank: _Rank
) -> Iterator[TokenError]:
    """The worst token of each sample that has supervised tokens here."""
    if not rank.is_last_stage:
        return
    for ids, batch, row_losses in zip(rank.micro_batches, batches, engine.row_losses, strict=True):
        pack = batch.pack
        losses = row_losses.cpu()
        samples, positions = (values[pack.rows] for values in rank.origins(pack))
        for place, index in enumerate(ids):
            mine = samples == place
            if not mine.any():
                continue
            wanted = rank.reference.losses.read(str(index))[positions[mine]]
            errors = (losses[mine] - wanted).abs() / wanted.clamp(min=LOSS_FLOOR)
            worst = int(errors.argmax())
            yield TokenError(
                sample=rank.task.tokens.sample_name(index),
                position=int(positions[mine][worst]),
                error=float(errors[worst]),
            )


def _gradient_errors(engine: Engine, rank: _Rank) -> Iterator[TensorError]:
    """The error of this rank's shard of each parameter's gradient."""
    largest = rank.reference.facts.largest
    for name, parameter in build.named_parameters(engine.chunks):
        mapping = rank.mappings[name]
        gradient: torch.Tensor = parameter.main_grad  # type: ignore[attr-defined]
        wanted = rank.local(mapping, rank.reference.gradients).to(gradient.device)
        error, row = _worst(gradient - wanted, largest=largest, names=hf_names(mapping))
        yield TensorError("gradient", name, _owner(mapping, row, rank=rank), error)


def _output_errors(
    engine: Engine, batches: Sequence[MicroBatch], *, rank: _Rank
) -> Iterator[TensorError]:
    """The error of the output of each module with a weight, at the probed tokens of this rank."""
    largest, probed = rank.reference.facts.largest_output, probed_columns(rank.task)
    columns = [
        _columns_of(batch.pack, ids, probed, rank=rank)
        for batch, ids in zip(batches, rank.micro_batches, strict=True)
    ]
    for name, taken in _module_outputs(engine, batches, columns, rank=rank).items():
        mapping = rank.mappings[name]
        found, places = (torch.cat(parts, dim=-1) for parts in zip(*taken, strict=True))
        wanted = _output_of(mapping, rank, width=len(found))
        if wanted is None or places.numel() == 0:
            continue
        error, row = _worst(found - wanted[:, places], largest=largest, names=hf_names(mapping))
        yield TensorError("output", name, _owner(mapping, row, rank=rank), error)


def _columns_of(
    batch: PackedBatch,
    ids: Sequence[int],
    probed: dict[int, tuple[int, torch.Tensor]],
    *,
    rank: _Rank,
) -> torch.Tensor:
    """Of each token here its column in the reference's outputs, or -1: int64 [T]."""
    samples, positions = rank.origins(batch)
    columns = torch.full_like(positions, -1)
    for place, index in enumerate(ids):
        start, at = probed[index]
        is_probed = (samples == place) & torch.isin(positions, at)
        columns[is_probed] = start + torch.searchsorted(at, positions[is_probed])
    return columns


def _module_outputs(
    engine: Engine, batches: Sequence[MicroBatch], columns: list[torch.Tensor], *, rank: _Rank
) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Parameter name -> of each micro-batch its module's output and columns, [X, k] and [k]."""
    outputs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def keep(name: str, _module: Any, _inputs: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        rows = tensor.flatten(0, 1).flatten(1)  # the batch of one stands before T or after it
        taken = outputs.setdefault(name, [])
        places = columns[len(taken)]  # a module runs the micro-batches in their order
        # Shorter than the others: a shard of sequence parallelism.
        first = rank.place.tensor_rank * len(rows) if len(rows) < len(places) else 0
        places = places[first : first + len(rows)]
        # A copy: Megatron adds the residual in place when it runs forward alone.
        taken.append((rows[(places >= 0).to(rows.device)].T.float().cpu(), places[places >= 0]))

    names = {id(parameter): name for name, parameter in build.named_parameters(engine.chunks)}
    hooks = []
    for module in (module for chunk in engine.chunks for module in chunk.modules()):
        for own_name, parameter in module.named_parameters(recurse=False):
            if own_name == "weight" and names[id(parameter)] != _HEAD:
                hook = functools.partial(keep, names[id(parameter)])
                hooks.append(module.register_forward_hook(hook))
    engine.forward(batches)
    for handle in hooks:
        handle.remove()
    return outputs


def _output_of(mapping: WeightMapping, rank: _Rank, *, width: int) -> torch.Tensor | None:
    """The reference's [width, columns] of the module that has this weight; None if it has none.

    Features that a rank holds are cut as the rows of the weight, whose order they follow.
    """
    outputs = rank.reference.outputs
    if isinstance(mapping, QKV | GatedMLP | FusedRows):
        return rank.local(mapping, outputs)
    (name,) = hf_names(mapping)
    num_features = outputs.shape(name)[0]
    if width == num_features:
        return outputs.read(name)
    if width * rank.layout.tensor_size != num_features:
        return None  # heads that several tensor ranks share, between the parts of attention
    start = rank.place.tensor_rank * width
    return outputs.read_slice(name, start=start, stop=start + width, dim=0)


def _worst(
    difference: torch.Tensor, *, largest: dict[str, float], names: Iterable[str]
) -> tuple[float, int]:
    """Largest |difference| / largest |reference|, and the row that has it."""
    scale = max(SMALLEST, *(largest[name] for name in names))
    by_row = difference.abs().flatten(1).amax(1) if difference.ndim > 1 else difference.abs()
    row = int(by_row.argmax())
    return float(by_row[row]) / scale, row


def _owner(mapping: WeightMapping, row: int, *, rank: _Rank) -> str:
    """The Hugging Face tensor that `row` of this rank's tensor comes from."""
    names = hf_names(mapping)
    if len(names) == 1:
        return names[0]
    owners = rank.local(mapping, _Owners(mapping.hf_shapes))
    return names[int(owners.flatten(1)[row, 0] if owners.ndim > 1 else owners[row])]


class _Owners:
    """A `TensorSource` whose numbers say in which tensor they stand, counted from 0."""

    def __init__(self, shapes: dict[str, Shape]) -> None:
        self._shapes = shapes

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        return torch.full(self._shapes[name], list(self._shapes).index(name), dtype=torch.uint8)

    def read_slice(self, name: str, *, start: int, stop: int, dim: int) -> torch.Tensor:
        return self.read(name).narrow(dim, start, stop - start)
