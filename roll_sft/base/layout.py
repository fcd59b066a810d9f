"""The grid of ranks: `ParallelLayout` maps parallel degrees to ranks, in pure Python.

The driver routes data with it, and every worker checks Megatron's groups against it. Rank order is
Megatron-Core's default, `tp-cp-dp-pp`: the tensor rank varies fastest.

Invariants: `coordinate` and `rank_of` are inverse bijections; ranks of one tensor-parallel group
are consecutive, and so are those of one (tensor x context) group.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Coordinate:
    """The position of one rank on each axis, from 0."""

    tensor_rank: int
    context_rank: int
    data_rank: int
    pipeline_rank: int


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Degrees of every axis. `world_size` must be a multiple of tensor x pipeline x context."""

    world_size: int
    tensor_size: int = 1
    pipeline_size: int = 1
    context_size: int = 1
    sequence_parallel: bool = False
    virtual_size: int = 1  # model chunks that each pipeline stage holds
    expert_size: int = 1  # consecutive ranks of a stage that share the experts of its layers

    def __post_init__(self) -> None:
        degrees = self.tensor_size * self.pipeline_size * self.context_size
        assert self.world_size > 0, f"world_size {self.world_size} must be positive"
        assert degrees > 0, f"degrees of {self} must be positive"
        assert self.world_size % degrees == 0, f"{degrees} does not divide {self.world_size}"

    @property
    def data_size(self) -> int:
        """Number of model replicas."""
        return self.world_size // (self.tensor_size * self.pipeline_size * self.context_size)

    @property
    def sample_alignment(self) -> int:
        """A sample is padded to a multiple of this: the zig-zag split cuts it in 2 x CP chunks."""
        return 2 * self.context_size if self.context_size > 1 else 1

    @property
    def pack_alignment(self) -> int:
        """A pack is padded to a multiple of this: sequence parallelism cuts each CP slice in TP."""
        if not self.sequence_parallel:
            return self.sample_alignment
        return math.lcm(self.sample_alignment, self.context_size * self.tensor_size)

    @property
    def micro_batch_multiple(self) -> int:
        """A rank runs a multiple of this many micro-batches: interleaved stages take turns."""
        return self.pipeline_size if self.virtual_size > 1 else 1

    def coordinate(self, rank: int) -> Coordinate:
        """Place of global `rank` on every axis."""
        assert 0 <= rank < self.world_size, f"rank {rank} is not in [0, {self.world_size})"
        rank, tensor_rank = divmod(rank, self.tensor_size)
        rank, context_rank = divmod(rank, self.context_size)
        pipeline_rank, data_rank = divmod(rank, self.data_size)
        return Coordinate(tensor_rank, context_rank, data_rank, pipeline_rank)

    def rank_of(self, place: Coordinate) -> int:
        """Global rank at `place`."""
        outer = place.pipeline_rank * self.data_size + place.data_rank
        return (
            outer * self.context_size + place.context_rank
        ) * self.tensor_size + place.tensor_rank

    @property
    def reporting_rank(self) -> int:
        """The rank whose metrics the driver reads: the first of the last pipeline stage."""
        return self.rank_of(Coordinate(0, 0, 0, self.pipeline_size - 1))


def round_up(number: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple
