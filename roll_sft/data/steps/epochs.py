"""Which samples an epoch holds, in which order, and where its steps begin.

A pure function of (seed, epoch, shares, batch): no state runs on, so any step can be asked for at
once.

Invariants: an epoch holds each sample of a share `per_epoch // size` times, and a seeded choice of
them, without replacement, once more. A step never crosses epochs and is never empty; the last one
of an epoch may be short.

The order of an epoch is a seeded permutation. Each number gets a random key of 64 bits; the
permutation is the numbers in the order of their keys, and in their own order where keys are equal.
It is computed in parts, each when its first step is asked for. A part holds the numbers whose keys
lie in one slice of all possible keys: all keys are drawn in blocks that stay in the processor's
cache, and those in the slice are sorted. So memory is that of one part: the whole permutation of
100 million numbers at once would take four times the time and 3 GiB.
"""

import functools
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

# Each part draws all keys of the epoch again: more parts take less memory and more time.
_MAX_PARTS = 8
_PART_SIZE = 1 << 17  # samples; a smaller part does not pay for its draw
_PARTS_KEPT = 2  # a step may lie in two parts
_NUM_KEYS = 1 << 64
_KEYS_PER_BLOCK = 1 << 16  # half a megabyte


@dataclass(frozen=True, slots=True)
class Share:
    """Samples `start:stop` of a set, of which each epoch draws `per_epoch`."""

    start: int
    stop: int
    per_epoch: int

    @classmethod
    def of(cls, whole: range, *, weight: float, samples: int | None) -> "Share":
        """`samples` of `whole` per epoch, or else `weight` times as many as it has, at least 1."""
        drawn = samples or max(1, math.floor(weight * len(whole) + 0.5))
        return cls(whole.start, whole.stop, drawn)

    @property
    def is_whole(self) -> bool:
        """Whether an epoch draws each sample once."""
        return self.per_epoch == self.stop - self.start


@dataclass(frozen=True, slots=True)
class BatchSize:
    """What ends an optimizer step: a number of samples or, where given, a number of tokens.

    Tokens are counted without padding. A step ends with the sample that reaches their number.
    """

    samples: int
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Permutation:
    """Names one permutation: each (seed, epoch, stream) gives another one, independent of all."""

    size: int
    seed: int
    epoch: int
    stream: int


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive entries of a permutation: `numbers` int32 [m], after the `first` entries."""

    first: int
    numbers: NDArray[np.int32]

    @property
    def stop(self) -> int:
        """Where the next part begins."""
        return self.first + self.numbers.size


class Epochs:
    """The order of every epoch over one set of samples, cut into steps.

    `lengths` int [n] are the tokens of each sample; `shares` cover the set or parts of it.
    """

    def __init__(
        self,
        lengths: NDArray[np.integer],
        *,
        shares: Sequence[Share],
        batch: BatchSize,
        seed: int,
        shuffle: bool,
    ) -> None:
        assert 0 <= seed < 2**64, f"seed {seed} is not an unsigned 64-bit number"
        assert batch.samples > 0, f"a step of {batch.samples} samples"
        assert batch.tokens is None or batch.tokens > 0, f"a step of {batch.tokens} tokens"
        self._lengths, self._shares, self._batch = lengths, tuple(shares), batch
        self._seed, self._shuffle = seed, shuffle
        # Where each share begins in the unshuffled list of an epoch, and the end of the list.
        self._share_bounds = [*accumulate((share.per_epoch for share in shares), initial=0)]
        self.samples_per_epoch = self._share_bounds[-1]
        self._num_parts = _num_parts(self.samples_per_epoch)
        self._part = functools.lru_cache(_PARTS_KEPT)(self._make_part)
        self._extra = functools.lru_cache(len(self._shares))(self._draw_extra)
        # Of each epoch whose steps are counted: where they begin, and the steps before it.
        self._step_bounds: list[NDArray[np.int64]] = []
        self._steps_before = [0]

    def steps_before(self, epoch: int) -> int:
        """Optimizer steps of all epochs before `epoch`, which counts from 0.

        Steps of a number of tokens are counted once for each epoch: their number depends on the
        order, and on the samples that are repeated or drawn.
        """
        if self._batch.tokens is None:
            return epoch * -(-self.samples_per_epoch // self._batch.samples)
        while len(self._steps_before) <= epoch:
            counted = len(self._step_bounds)
            parts = (self._part(counted, number) for number in range(self._num_parts))
            self._step_bounds.append(self._cut_by_tokens(part.numbers for part in parts))
            num_steps = self._step_bounds[-1].size - 1
            self._steps_before.append(self._steps_before[-1] + num_steps)
        return self._steps_before[epoch]

    def step(self, step: int) -> tuple[int, int, NDArray[np.int32]]:
        """Epoch (from 0) of optimizer step `step` (from 1), the number of samples of that epoch
        before the step, and the step's samples in shuffled order, int32 [samples].

        There is no last step: epochs follow each other.
        """
        if self._batch.tokens is None:
            epoch, index = divmod(step - 1, self.steps_before(1))
            first = index * self._batch.samples
            stop = min(first + self._batch.samples, self.samples_per_epoch)
        else:
            while self._steps_before[-1] < step:
                self.steps_before(len(self._steps_before))
            epoch = bisect_right(self._steps_before, step - 1) - 1
            index = step - 1 - self._steps_before[epoch]
            first, stop = self._step_bounds[epoch][index : index + 2].tolist()
        return epoch, first, self._slice(epoch, first, stop)

    def stored(self) -> list[NDArray[np.int32]]:
        """All samples once, in stored order, cut into steps by the same rule."""
        order = np.arange(self._lengths.size, dtype=np.int32)
        bounds = [*range(0, order.size, self._batch.samples), order.size]
        if self._batch.tokens is not None:
            bounds = self._cut_by_tokens([order]).tolist()
        return [order[first:stop] for first, stop in pairwise(bounds)]

    def _cut_by_tokens(self, orders: Iterable[NDArray[np.int32]]) -> NDArray[np.int64]:
        """Where steps of `batch.tokens` begin in the joined `orders`, and the end: [steps + 1]."""
        assert self._batch.tokens is not None, "steps of a number of samples need no count"
        bounds, num_samples, num_tokens = [0], 0, 0
        wanted = self._batch.tokens  # tokens of the epoch at which the current step ends
        for order in orders:
            token_ends = num_tokens + np.cumsum(self._lengths[order], dtype=np.int64)
            while (last := int(np.searchsorted(token_ends, wanted))) < order.size:
                bounds.append(num_samples + last + 1)
                wanted = int(token_ends[last]) + self._batch.tokens
            num_samples += order.size
            num_tokens = int(token_ends[-1]) if order.size else num_tokens
        if bounds[-1] < num_samples:
            bounds.append(num_samples)
        return np.array(bounds)

    def _slice(self, epoch: int, first: int, stop: int) -> NDArray[np.int32]:
        """The samples at `first:stop` in the order of an epoch."""
        # Parts are of about equal size, so this is the right one or one beside it.
        number = min(first * self._num_parts // self.samples_per_epoch, self._num_parts - 1)
        while first < (part := self._part(epoch, number)).first:
            number -= 1
        slices = [part.numbers[first - part.first : stop - part.first]]
        while part.stop < stop:
            number += 1
            part = self._part(epoch, number)
            slices.append(part.numbers[max(0, first - part.first) : stop - part.first])
        return np.concatenate(slices)

    def _make_part(self, epoch: int, number: int) -> Part:
        size, num_parts = self.samples_per_epoch, self._num_parts
        if self._shuffle:
            permutation = Permutation(size, self._seed, epoch, stream=0)
            part = part_of(permutation, number, num_parts=num_parts)
        else:
            first, stop = (size * each // num_parts for each in (number, number + 1))
            part = Part(first, np.arange(first, stop, dtype=np.int32))
        return Part(part.first, self._samples_at(epoch, part.numbers))

    def _samples_at(self, epoch: int, places: NDArray[np.int32]) -> NDArray[np.int32]:
        """The samples at `places` int32 [m] of the unshuffled list of an epoch.

        The list holds one share after the other. A share is whole repetitions of its samples in
        stored order, then those that are drawn once more.
        """
        samples = np.empty(places.size, dtype=np.int32)
        bounds = pairwise(self._share_bounds)
        for number, (share, (first, stop)) in enumerate(zip(self._shares, bounds, strict=True)):
            inside = (first <= places) & (places < stop)
            place = places[inside] - first
            size = share.stop - share.start
            drawn = share.start + place % size
            is_extra = place >= share.per_epoch // size * size
            if is_extra.any():
                drawn[is_extra] = self._extra(epoch, number)[place[is_extra] % size]
            samples[inside] = drawn
        return samples

    def _draw_extra(self, epoch: int, number: int) -> NDArray[np.int32]:
        """The samples of a share that an epoch draws once more, or only once, in stored order."""
        share = self._shares[number]
        size = share.stop - share.start
        permutation = Permutation(size, self._seed, epoch, stream=1 + number)
        num_extra, num_parts = share.per_epoch % size, _num_parts(size)
        extra, index = np.empty(0, dtype=np.int32), 0
        while extra.size < num_extra:
            part = part_of(permutation, index, num_parts=num_parts)
            extra = np.concatenate((extra, part.numbers[: num_extra - extra.size]))
            index += 1
        return share.start + np.sort(extra)


def _num_parts(size: int) -> int:
    return min(_MAX_PARTS, -(-size // _PART_SIZE))


def part_of(permutation: Permutation, number: int, *, num_parts: int) -> Part:
    """Part `number` of `num_parts`, all of about equal size.

    The result is the same under every version of numpy: numpy keeps the raw stream of a bit
    generator stable, not the methods of Generator. Philox is counter based: each key (seed, epoch)
    and each start of the counter, 2**192 apart, is an independent stream.
    """
    size = permutation.size
    assert 0 <= number < num_parts, f"part {number} of {num_parts}"
    assert size <= 1 << 31, f"a permutation of {size} numbers does not fit int32"
    low = np.uint64(_NUM_KEYS * number // num_parts)
    width = np.uint64(_NUM_KEYS * (number + 1) // num_parts - 1) - low
    bits = np.random.Philox(
        key=np.array([permutation.seed, permutation.epoch], dtype=np.uint64),
        counter=np.array([0, 0, 0, permutation.stream], dtype=np.uint64),
    )
    first, numbers, kept_keys = 0, [np.empty(0, np.int32)], [np.empty(0, np.uint64)]
    for start in range(0, size, _KEYS_PER_BLOCK):
        keys = bits.random_raw(min(_KEYS_PER_BLOCK, size - start))
        first += int(np.count_nonzero(keys < low))
        inside = np.flatnonzero(keys - low <= width)  # keys below `low` wrap around
        kept_keys.append(keys[inside])
        numbers.append((inside + start).astype(np.int32))
    order = stable_argsort(np.concatenate(kept_keys))
    return Part(first, np.concatenate(numbers)[order])


def stable_argsort(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """`np.argsort(keys, kind="stable")` of uint64 [n], ten times as fast for random keys.

    The last bits of each key are replaced by its position, so that one plain sort orders both. Keys
    that are equal in all other bits are sorted again by the whole key; random keys have hardly any.
    """
    position_bits = max(1, int(keys.size - 1).bit_length())
    position_mask = np.uint64((1 << position_bits) - 1)
    combined = keys & ~position_mask
    combined |= np.arange(keys.size, dtype=np.uint64)
    combined.sort()
    positions = (combined & position_mask).view(np.int64)
    combined >>= np.uint64(position_bits)  # in place: only the compared bits are left
    ties = np.flatnonzero(combined[1:] == combined[:-1])
    if ties.size:
        places = np.union1d(ties, ties + 1)
        tied = positions[places]
        # Keys of different ties differ in their first bits, so one sort orders all ties.
        positions[places] = tied[np.lexsort((tied, keys[tied]))]
    return positions
