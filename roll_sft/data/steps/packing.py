"""Which samples share a rank and a micro-batch: cost model, dealing to ranks, best-fit packing.

Pure functions of lengths. A sample is named by its index into `lengths`; every tie is broken by
that index and then by the number of the bin, so the same lengths give the same bins on every
machine.

Assumes positive lengths, already padded to the layout's sample alignment (`padded_lengths` alone
takes raw ones). Invariants: every index is in exactly one bin; a capacity is never exceeded (the
ceiling of `assign_to_ranks` is a wish); `balance_bins` keeps the number of bins and never raises
the largest cost, and neither does any exchange between bins.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace

from roll_sft.base.layout import ParallelLayout, round_up

Bin = tuple[int, ...]
"""Indices of the samples that share a rank or a micro-batch."""

# Largest cost over the mean, below which bins are left alone. Ranks wait for the costliest, and
# their packs for nobody but a pipeline's other stages.
_EVEN_RANKS = 1.0005
_EVEN_PACKS = 1.01
_EXCHANGES_PER_BIN = 4
# Padding that a pipeline takes, over a step's tokens, to know the length of its packs beforehand.
_MOST_FILLING = 0.02


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
    """Tokens of each sequence of one pack as it is run; their sum is what the pack costs.

    Each sample grows to the sample alignment, then the last one so that the pack divides by the
    pack alignment. A pack without samples still runs: it is one sequence of padding, of at least
    two tokens.
    """
    if not lengths:
        return [round_up(2, layout.pack_alignment)]
    # A sample of no tokens would be a zero-length segment, which breaks attention kernels.
    assert min(lengths) > 0, f"length {min(lengths)}: a sample has at least one token"
    alignment = layout.sample_alignment
    padded = [round_up(length, alignment) for length in lengths]
    padded[-1] += -sum(padded) % layout.pack_alignment
    return padded


def common_length(packs: Sequence[int], *, layout: ParallelLayout) -> int | None:
    """Tokens that each of a rank's packs is filled up to; None where each keeps its own.

    `packs` are the tokens of a rank's packs in one step, as they would run. Stages of a pipeline
    that do not know the length of what comes next exchange it before every tensor, and wait for the
    device to read it; a little padding is cheaper. The ranks of a pipeline hold the same packs, so
    they agree without a word.
    """
    longest = max(packs)
    filling = longest * len(packs) - sum(packs)
    is_cheap = layout.pipeline_size > 1 and filling <= _MOST_FILLING * sum(packs)
    return longest if is_cheap else None


def assign_to_ranks(
    lengths: Sequence[int], *, num_ranks: int, cost: CostModel, token_ceiling: int
) -> list[Bin]:
    """Samples of each rank: the costliest first, each to the least loaded rank with room.

    Then ranks exchange samples until their costs are even or no exchange helps: where a rank has
    few samples, dealing alone leaves about a percent. `token_ceiling` bounds a rank's tokens while
    it can: when no rank has room, the least loaded takes the sample. A rank may stay empty.
    """
    costs = cost.of_all(lengths)
    ranks = _deal(lengths, costs, num_bins=num_ranks, ceiling=token_ceiling, must_fit=False)
    return _evened(ranks, lengths, costs, ceiling=token_ceiling, aim=_EVEN_RANKS)


def pack_evenly(
    lengths: Sequence[int], *, capacity: int, multiple: int, cost: CostModel
) -> list[Bin]:
    """Bins of at most `capacity` tokens and of nearly equal cost, as few as best-fit finds.

    Their number is rounded up to `multiple` while there are samples to fill them with.
    """
    if not lengths:
        return []
    fewest = min(round_up(-(-sum(lengths) // capacity), multiple), len(lengths))
    costs = cost.of_all(lengths)
    # Mostly there is room to spare, and dealing alone finds bins that fit.
    if dealt := _deal(lengths, costs, num_bins=fewest, ceiling=capacity, must_fit=True):
        return _evened(dealt, lengths, costs, ceiling=capacity, aim=_EVEN_PACKS)
    bins = best_fit_decreasing(lengths, capacity=capacity)
    num_bins = min(round_up(len(bins), multiple), len(lengths))
    return balance_bins(bins, lengths, num_bins=num_bins, cost=cost, capacity=capacity)


def best_fit_decreasing(lengths: Sequence[int], *, capacity: int) -> list[Bin]:
    """Bins of at most `capacity` tokens: longest first, each into the fullest bin with room.

    Among equally full bins the one filled last is taken. Near O(n log n): bins are grouped by the
    room they have left, so a look-up bisects over the distinct values of it, of which there are
    few.
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


def balance_bins(
    bins: Sequence[Bin], lengths: Sequence[int], *, num_bins: int, cost: CostModel, capacity: int
) -> list[Bin]:
    """The same samples in `num_bins` bins of nearly equal cost, each of at most `capacity` tokens.

    Best-fit bins are equal in tokens, not in cost, and the last one is a remainder. Where dealing
    anew would break the capacity or make the costliest bin costlier, the given ones are only
    evened out, unless there are too few of them.
    """
    members = sorted(index for one_bin in bins for index in one_bin)
    costs = cost.of_all(lengths)
    dealt = _deal(
        [lengths[index] for index in members],
        [costs[index] for index in members],
        num_bins=num_bins,
        ceiling=capacity,
        must_fit=True,
    )
    balanced = [tuple(members[position] for position in one_bin) for one_bin in dealt]

    def largest_cost(candidates: Sequence[Bin]) -> float:
        return max((sum(costs[index] for index in one) for one in candidates), default=0.0)

    is_better = dealt and largest_cost(balanced) <= largest_cost(bins)
    return _evened(
        balanced if is_better else bins, lengths, costs, ceiling=capacity, aim=_EVEN_PACKS
    )


def order_for_pipeline(
    bins: Sequence[Bin], lengths: Sequence[int], *, cost: CostModel
) -> list[Bin]:
    """The same bins, cheap ones at both ends and the costliest in the middle.

    While a pipeline fills and drains most of its stages wait for one micro-batch, so the first
    and the last should be short.
    """
    costs = cost.of_all(lengths)
    ascending = sorted(bins, key=lambda one_bin: sum(costs[index] for index in one_bin))
    return ascending[0::2] + ascending[1::2][::-1]


def bin_cost(one_bin: Bin, lengths: Sequence[int], *, cost: CostModel) -> float:
    """Summed cost of a bin's samples."""
    return sum(cost(lengths[index]) for index in one_bin)


def _longest_first(lengths: Sequence[int]) -> list[int]:
    """Indices by falling length, and equal lengths by rising index (a reversed sort is stable)."""
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)


def _deal(
    lengths: Sequence[int],
    costs: Sequence[float],
    *,
    num_bins: int,
    ceiling: int,
    must_fit: bool,
) -> list[Bin]:
    """Longest processing time first, under a ceiling of tokens per bin.

    Cost rises with length, so the longest sample is the costliest. Where no bin has room for a
    sample the cheapest takes it or, if all must fit, there are no bins to return.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    rooms = [ceiling] * num_bins
    heap = [(0.0, number) for number in range(num_bins)]  # (cost so far, bin), cheapest first
    for index in _longest_first(lengths):
        length = lengths[index]
        load, number = heap[0]
        if rooms[number] >= length:
            bins[number].append(index)
            rooms[number] -= length
            heapreplace(heap, (load + costs[index], number))
            continue
        passed_over = []
        while heap and rooms[heap[0][1]] < length:
            passed_over.append(heappop(heap))
        if not heap and must_fit:
            return []
        if not heap:
            heap, passed_over = passed_over, []  # popped in order, so the list is a heap again
        load, number = heap[0]
        bins[number].append(index)
        rooms[number] -= length
        heapreplace(heap, (load + costs[index], number))
        for entry in passed_over:
            heappush(heap, entry)
    return [tuple(members) for members in bins]


def _evened(
    bins: Sequence[Bin],
    lengths: Sequence[int],
    costs: Sequence[float],
    *,
    ceiling: int,
    aim: float,
) -> list[Bin]:
    """The same bins after exchanges that each bring the costliest nearer to a cheaper one.

    Ends where the costliest is within `aim` of the mean, or no exchange helps.
    """
    loads = [sum(costs[index] for index in one) for one in bins]
    highest = aim * sum(loads) / max(1, len(loads))
    members = list(bins)
    for _ in range(_EXCHANGES_PER_BIN * len(bins)):
        by_load = sorted(range(len(loads)), key=loads.__getitem__)
        heavy = by_load[-1]
        if loads[heavy] <= highest:
            break
        for light in by_load[:-1]:
            gap = loads[heavy] - loads[light]
            room = ceiling - sum(lengths[index] for index in members[light])
            exchange = _best_exchange(members[heavy], members[light], lengths, costs, (gap, room))
            if exchange is not None:
                break
        else:
            break
        given, taken = exchange
        for number, lost, gained in ((heavy, given, taken), (light, taken, given)):
            kept = {*members[number], *gained}.difference(lost)
            members[number] = tuple(sorted(kept, key=lambda index: (-lengths[index], index)))
            loads[number] = sum(costs[index] for index in members[number])
    return members


def _best_exchange(
    heavy: Bin,
    light: Bin,
    lengths: Sequence[int],
    costs: Sequence[float],
    limits: tuple[float, int],
) -> tuple[Bin, Bin] | None:
    """What `heavy` gives and what it takes back, one sample or none, to halve the gap at best.

    `limits` are the gap between their costs, and the tokens that `light` has room for.
    """
    gap, room = limits
    best: tuple[Bin, Bin] | None = None
    best_distance = gap / 2  # a shift of nothing, or of the whole gap, helps nobody
    cheap_first = sorted(light, key=costs.__getitem__)
    cheap_costs = [costs[index] for index in cheap_first]
    for given in heavy:
        if len(heavy) > 1 and lengths[given] <= room:
            distance = abs(costs[given] - gap / 2)
            if distance < best_distance:
                best, best_distance = ((given,), ()), distance
        nearest = bisect_left(cheap_costs, costs[given] - gap / 2)
        for taken in cheap_first[max(0, nearest - 1) : nearest + 1]:
            distance = abs(costs[given] - costs[taken] - gap / 2)
            if distance < best_distance and lengths[given] - lengths[taken] <= room:
                best, best_distance = ((given,), (taken,)), distance
    return best
