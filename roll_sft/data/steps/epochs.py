"""Which samples an epoch holds, in which order, and where its steps begin.

A pure function of (seed, epoch, shares, batch): no state runs on, so any step can be asked for at
once. The order of an epoch is computed in parts (`shuffle`), each when its first step is asked for.

Invariants: an epoch holds each sample of a share `per_epoch // size` times, and a seeded choice of
them, without replacement, once more. A step never crosses epochs and is never empty; the last one
of an epoch may be short.
"""

import functools
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from roll_sft.data.steps.shuffle import Part, Permutation, part_of

# Each part draws all keys of the epoch again: more parts take less memory and more time.
_MAX_PARTS = 8
_PART_SIZE = 1 << 17  # samples; a smaller part does not pay for its draw
_PARTS_KEPT = 2  # a step may lie in two parts


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
