"""How a step is divided: samples over data-parallel ranks, then over micro-batches.

Ranks get samples by longest processing time first (LPT): in order of falling cost, each sample goes
to the least loaded rank. Micro-batches are dealt in the same way under a capacity of tokens, and
packed by best-fit decreasing where LPT finds no fit.

All functions are pure functions of lengths. A sample is named by its index into `lengths`. Ties are
broken by that index and then by the number of the bin, so equal lengths give equal bins on every
machine. Lengths are positive and already padded to the layout's sample alignment; `padded_lengths`
alone takes raw ones.

Invariants: every index is in exactly one bin, and no micro-batch exceeds its capacity.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace

from roll_sft.base.layout import ParallelLayout, round_up

Bin = tuple[int, ...]
"""Indices of the samples that share a rank or a micro-batch."""

# Padding that a pipeline accepts, as a share of a step's tokens, for packs of one length.
_MAX_FILLING = 0.02


@dataclass(frozen=True, slots=True)
class CostModel:
    """Relative time of one sample of s tokens: `linear * s + s**2`.

    Training FLOPs with causal attention inside each document are 6*N*T + 6*L*w*sum(s**2): the 6*N
    of every token (PaLM, appendix B) plus half of its 12*L*w*s, the half that a causal mask
    leaves, with w = heads x head_dim. Divided by 6*L*w the linear weight is N / (L*w) tokens: about
    70,000 for a 7B, 23,000 for a 0.5B model.
    """

    linear: float

    @classmethod
    def of(
        cls, num_matmul_parameters: int, *, num_layers: int, attention_width: int
    ) -> "CostModel":
        """Model of a transformer; count the LM head as a matmul, not the input embedding."""
        return cls(linear=num_matmul_parameters / (num_layers * attention_width))

    def __call__(self, length: int) -> float:
        """Cost of a sample of `length` tokens, in units of 6*L*w FLOPs."""
        return self.linear * length + length * length

    def of_all(self, lengths: Sequence[int]) -> list[float]:
        """Cost of each sample."""
        linear = self.linear
        return [linear * length + length * length for length in lengths]


def padded_lengths(lengths: Sequence[int], *, layout: ParallelLayout) -> list[int]:
    """Tokens of each sequence of one pack with padding; their sum is the length of the pack.

    Each sample is padded to the sample alignment, then the last one until the pack divides by the
    pack alignment. A pack without samples is one sequence of at least two tokens of padding.
    """
    if not lengths:
        return [round_up(2, layout.pack_alignment)]
    # A sample of no tokens would be a zero-length segment, which breaks attention kernels.
    assert min(lengths) > 0, f"length {min(lengths)}: a sample has at least one token"
    padded = [round_up(length, layout.sample_alignment) for length in lengths]
    padded[-1] += -sum(padded) % layout.pack_alignment
    return padded


def common_length(packs: Sequence[int], *, layout: ParallelLayout) -> int | None:
    """Tokens to fill each of a rank's `packs` up to; None where each keeps its own length.

    `packs` are the padded tokens of a rank's packs in one step. Pipeline stages that do not know
    the length of the next tensor exchange its shape first, and wait for the device to read it; a
    little padding is cheaper. All ranks of a pipeline hold the same packs, so they agree without
    communication.
    """
    longest = max(packs)
    filling = longest * len(packs) - sum(packs)
    is_cheap = layout.pipeline_size > 1 and filling <= _MAX_FILLING * sum(packs)
    return longest if is_cheap else None


def assign_to_ranks(
    lengths: Sequence[int], *, num_ranks: int, cost: CostModel, token_ceiling: int
) -> list[Bin]:
    """Samples of each rank: the costliest first, each to the least loaded rank with room.

    `token_ceiling` bounds a rank's tokens as long as some rank has room; after that the least
    loaded rank takes the sample. A rank may stay empty.
    """
    return _deal(lengths, cost=cost, num_bins=num_ranks, ceiling=token_ceiling, must_fit=False)


def pack_evenly(
    lengths: Sequence[int], *, capacity: int, multiple: int, cost: CostModel
) -> list[Bin]:
    """Bins of at most `capacity` tokens and of nearly equal cost, as few as LPT or best-fit finds.

    Their number is rounded up to `multiple` where there are samples to fill them with.
    """
    if not lengths:
        return []

    def dealt(fewest: int) -> list[Bin]:
        num_bins = min(round_up(fewest, multiple), len(lengths))
        return _deal(lengths, cost=cost, num_bins=num_bins, ceiling=capacity, must_fit=True)

    if bins := dealt(-(-sum(lengths) // capacity)):  # mostly there is room to spare
        return bins
    packed = best_fit_decreasing(lengths, capacity=capacity)
    return dealt(len(packed)) or packed


def best_fit_decreasing(lengths: Sequence[int], *, capacity: int) -> list[Bin]:
    """Bins of at most `capacity` tokens: longest first, each into the fullest bin with room.

    Among equally full bins the one filled last is taken. Near O(n log n): bins are grouped by the
    room that they have left, and the search bisects over its few distinct values.
    """
    assert max(lengths, default=0) <= capacity, f"length {max(lengths)} > capacity {capacity}"
    bins: list[list[int]] = []
    bins_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of bins_by_room, ascending
    for index in _longest_first(lengths):
        position = bisect_left(rooms, lengths[index])
        if position == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[position]
            number = bins_by_room[room].pop()
            if not bins_by_room[room]:
                del bins_by_room[room], rooms[position]
        bins[number].append(index)
        room -= lengths[index]
        if room not in bins_by_room:
            bins_by_room[room] = []
            insort(rooms, room)
        bins_by_room[room].append(number)
    return [tuple(members) for members in bins]


def order_for_pipeline(
    bins: Sequence[Bin], lengths: Sequence[int], *, cost: CostModel
) -> list[Bin]:
    """The same bins, cheap ones at both ends and the costliest in the middle.

    While a pipeline fills or drains, most stages wait for one micro-batch: the first and the last
    should be short.
    """
    costs = cost.of_all(lengths)
    ascending = sorted(bins, key=lambda one_bin: sum(costs[index] for index in one_bin))
    return ascending[0::2] + ascending[1::2][::-1]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    """Indices by falling length, and equal lengths by rising index (a reversed sort is stable)."""
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)


def _deal(
    lengths: Sequence[int], *, cost: CostModel, num_bins: int, ceiling: int, must_fit: bool
) -> list[Bin]:
    """Longest processing time first, under a ceiling of tokens per bin.

    Cost rises with length, so the longest sample is the costliest. Where no bin has room for a
    sample, the cheapest bin takes it; with `must_fit` the result is then empty.
    """
    costs = cost.of_all(lengths)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    rooms = [ceiling] * num_bins
    heap = [(0.0, number) for number in range(num_bins)]  # (cost so far, bin), cheapest first
    for index in _longest_first(lengths):
        length = lengths[index]
        passed_over = []
        while rooms[heap[0][1]] < length:
            passed_over.append(heappop(heap))
            if not heap:  # no bin has room
                if must_fit:
                    return []
                heap, passed_over = passed_over, []  # popped in order, so the list is a heap again
                break
        load, number = heap[0]
        bins[number].append(index)
        rooms[number] -= length
        heapreplace(heap, (load + costs[index], number))
        for entry in passed_over:
            heappush(heap, entry)
    return [tuple(members) for members in bins]
