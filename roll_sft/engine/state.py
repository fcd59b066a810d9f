"""A rank's weights and optimizer state as pieces of stored tensors, whatever the layout.

Megatron-Core says where each parameter lies in the whole model; the distributed optimizer says
which range of each flattened parameter a data rank owns. Together they place every number of the
state in a tensor that is the same on every layout: `decoder.layers...` [layer, ...] and
`optimizer.state.exp_avg.decoder.layers...`. Each data rank writes and reads its own ranges and a
share of the pieces that all of them hold. Nothing is gathered, and writing is not collective.
`engine/load_state.py` fills the pieces again.

In fp32 the weights are the optimizer's master weights and are stored once.
"""

import bisect
import io
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from roll_sft.base.errors import DivergedError
from roll_sft.checkpoint.tensors import Piece, rectangles
from roll_sft.engine.build import not_finite
from roll_sft.engine.optimizer import MOMENTS, inner_optimizers, main_parameters

EXPERTS = ".mlp.experts."  # in the key of every tensor of experts


@dataclass(frozen=True, slots=True)
class HeldPiece:
    """A piece of the state that shares this rank's memory."""

    piece: Piece
    owner: int  # the replica that writes and reads it; this one if no other holds it
    is_shared: bool  # whether every replica holds it
    is_copy: bool  # whether another model-parallel rank writes it


@dataclass(frozen=True, slots=True)
class RankState:
    """The state of a rank. Replicas hold as many shared pieces, in the same order."""

    pieces: list[HeldPiece]
    objects: dict[str, bytes]  # empty values that Megatron-Core looks for beside the tensors

    def written(self) -> list[Piece]:
        """The pieces that this rank writes."""
        return [each.piece for each in self.pieces if is_mine(each) and not each.is_copy]


def rank_state(
    chunks: list[GPTModel],
    optimizer: MegatronOptimizer | None,
    trained: "list[Place] | None" = None,
) -> RankState:
    """The pieces of this rank's weights, and of its optimizer if given, whose state must exist.

    `trained` are the places of what is trained, where that is not every weight.
    """
    places = Places(chunks if trained is None else [], also=trained or [])
    shared = [(place.piece, place.is_copy) for place in places.all]
    own: list[tuple[Piece, bool]] = []
    for inner in [] if optimizer is None else inner_optimizers(optimizer):
        is_distributed = isinstance(inner, DistributedOptimizer)
        for parameter, main, start in main_parameters(inner):
            values = {name: inner.optimizer.state[main][name] for name in MOMENTS}
            if main.data_ptr() != parameter.data_ptr() + start * parameter.element_size():
                values["param"] = main.detach()
            for name, value in values.items():
                pieces = places.cut(parameter, value, name=name, start=start)
                (own if is_distributed else shared).extend(pieces)
    held = [HeldPiece(p, _replica(p), is_shared=False, is_copy=copy) for p, copy in own]
    owners = _owners([piece for piece, _ in shared])
    held += [
        HeldPiece(piece, owner, is_shared=True, is_copy=copy)
        for (piece, copy), owner in zip(shared, owners, strict=True)
    ]
    return RankState(held, places.objects)


def replicas(piece: Piece) -> dist.ProcessGroup:
    """The ranks that hold the same weights: for experts others than for the rest."""
    if EXPERTS in piece.key:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _replica(piece: Piece) -> int:
    """This rank among those that hold the same weights."""
    return dist.get_rank(replicas(piece))


def is_mine(held: HeldPiece) -> bool:
    """Whether this rank writes and reads the piece."""
    return held.owner == _replica(held.piece)


def check_written(pieces: Sequence[Piece]) -> None:
    """Raise `DivergedError` where a rank's part of a checkpoint is not finite."""
    if found := not_finite([(piece.key, piece.tensor) for piece in pieces]):
        raise DivergedError(f"{found[0]} {found[1]}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part of a parameter lies: in this rank's memory and in the whole model."""

    address: int
    piece: Piece
    is_copy: bool


class Places:
    """The parts of this rank's parameters, found by their address.

    A parameter may have several: gate and up projection are one parameter, and Megatron stores them
    as two halves of one tensor, so that the tensor shards of each lie together.
    """

    def __init__(self, chunks: list[GPTModel], *, also: Sequence[Place] = ()) -> None:
        self.all = [*also]
        self.objects: dict[str, bytes] = {}
        for chunk in chunks:
            # A shared expert asks for the group, others find it themselves.
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            state = chunk.sharded_state_dict(metadata={"dp_cp_group": group})
            apply_factories(state)
            for value in nested_values(state):
                if isinstance(value, ShardedTensor):
                    self.all.append(_place(value))
                elif isinstance(value, ShardedObject) and is_main_replica(value.replica_id):
                    buffer = io.BytesIO()
                    torch.save([value.data], buffer)
                    self.objects[value.unique_key] = buffer.getvalue()
        # Data ranks agree on the order of `all`, not on that of addresses: each virtual stage has a
        # buffer of its own, and these lie anywhere.
        self._by_address = sorted(self.all, key=lambda place: place.address)
        self._addresses = [place.address for place in self._by_address]

    def cut(
        self, parameter: torch.Tensor, value: torch.Tensor, *, name: str, start: int
    ) -> Iterator[tuple[Piece, bool]]:
        """Pieces of `value`, a state of numbers [start, start + len(value)) of flat `parameter`.

        A place holds a run of the parameter's numbers. The part of `value` in that run is cut into
        rectangles at the same offsets as the place's own piece.
        """
        flat = value.view(-1)
        num_cut = 0
        for place in self.within(parameter):
            weight = place.piece
            first = (place.address - parameter.data_ptr()) // parameter.element_size()
            begin = max(start - first, 0)
            end = min(start + flat.numel() - first, weight.tensor.numel())
            for offset, sizes in rectangles(begin, end, weight.tensor.shape):
                state = replace(
                    weight,
                    key=f"optimizer.state.{name}.{weight.key}",
                    offset=tuple(map(operator.add, weight.offset, offset)),
                    tensor=flat.narrow(0, num_cut, math.prod(sizes)).view(sizes),
                )
                num_cut += math.prod(sizes)
                yield state, place.is_copy
        assert num_cut == flat.numel(), f"{num_cut} of {flat.numel()} numbers have a place"

    def within(self, parameter: torch.Tensor) -> Iterator[Place]:
        """The places in the memory of `parameter`, in order."""
        start = parameter.data_ptr()
        first, stop = (
            bisect.bisect_left(self._addresses, address)
            for address in (start, start + parameter.nbytes)
        )
        yield from self._by_address[first:stop]


def _place(sharded: ShardedTensor) -> Place:
    data = sharded.data
    assert data is not None, f"{sharded.key} has no data"
    leading = (1,) * sharded.prepend_axis_num
    piece = Piece(
        key=sharded.key,
        shape=tuple(sharded.global_shape),
        offset=tuple(sharded.global_offset),
        tensor=data.detach().view(*leading, *data.shape),
        is_padded=sharded.allow_shape_mismatch,
    )
    replica = sharded.replica_id
    assert isinstance(replica, tuple), f"{sharded.key}: replica {replica} names no data rank"
    return Place(data.data_ptr(), piece, any(replica[:-1]))  # the last is the data rank


def _owners(pieces: list[Piece]) -> list[int]:
    """The owner of each shared piece: even shares of numbers, the same answer on all replicas."""
    loads: dict[bool, list[int]] = {}  # of experts, and of the rest: their replicas differ
    owners = [0] * len(pieces)
    sizes = [piece.tensor.numel() for piece in pieces]
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        size = dist.get_world_size(replicas(pieces[index]))
        load = loads.setdefault(EXPERTS in pieces[index].key, [0] * size)
        owners[index] = owner = load.index(min(load))
        load[owner] += sizes[index]
    return owners
