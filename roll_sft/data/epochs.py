"""Which samples an epoch holds, in which order, and where its steps are cut.

A pure function of (seed, epoch, shares, batch): nothing is drawn one after the other, so any step
can be asked for at once. What an epoch needs (its order and its cuts) is computed when the first of
its steps is asked for, 4 bytes for each sample of it, and kept until another epoch is.

Invariants: an epoch holds each sample of a share `per_epoch // size` times, and a seeded choice of
them, without replacement, once more; a step never crosses epochs and is never empty; the last,
short one is kept.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


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
        """Whether an epoch holds each sample once."""
        return self.per_epoch == self.stop - self.start


@dataclass(frozen=True, slots=True)
class BatchSize:
    """What ends an optimizer step: a number of samples or, where given, a number of tokens.

    Tokens are unpadded ones: samples are added until there are at least so many.
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
        self.samples_per_epoch = sum(share.per_epoch for share in self._shares)
        self._cached: tuple[int, NDArray[np.int32], NDArray[np.int64]] | None = None
        self._ends = [0]  # steps before each epoch, as far as they had to be counted

    def steps_before(self, epoch: int) -> int:
        """Optimizer steps of all epochs before `epoch`, which counts from 0.

        Steps of a number of tokens have to be counted, once for each epoch, since samples that
        repeat or are drawn anew change how many there are.
        """
        if self._batch.tokens is None:
            return epoch * -(-self.samples_per_epoch // self._batch.samples)
        while len(self._ends) <= epoch:
            _, cuts = self._epoch(len(self._ends) - 1)
            self._ends.append(self._ends[-1] + cuts.size - 1)
        return self._ends[epoch]

    def step(self, step: int) -> tuple[int, int, NDArray[np.int32]]:
        """Epoch (from 0) of optimizer step `step` (from 1), the samples of that epoch before it,
        and its own in the order of the shuffle. There is no last step: epochs follow each other.
        """
        if self._batch.tokens is None:
            epoch = (step - 1) // self.steps_before(1)
        else:
            while self.steps_before(len(self._ends) - 1) < step:
                self.steps_before(len(self._ends))
            epoch = bisect_right(self._ends, step - 1) - 1
        order, cuts = self._epoch(epoch)
        index = step - 1 - self.steps_before(epoch)
        first, stop = cuts[index : index + 2].tolist()
        return epoch, first, order[first:stop]

    def stored(self) -> list[NDArray[np.int32]]:
        """All samples once, in stored order, cut into steps likewise."""
        order = np.arange(self._lengths.size, dtype=np.int32)
        cuts = self._cuts(order).tolist()
        return [order[first:stop] for first, stop in pairwise(cuts)]

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        if self._cached is None or self._cached[0] != epoch:
            self._cached = None  # before the next is made: two at once would double the memory
            order = self._order(epoch)
            self._cached = epoch, order, self._cuts(order)
        return self._cached[1:]

    def _order(self, epoch: int) -> NDArray[np.int32]:
        parts = [self._drawn(epoch, number) for number in range(len(self._shares))]
        drawn = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if not self._shuffle:
            return drawn
        return drawn[_permutation(drawn.size, seed=self._seed, epoch=epoch, stream=0)]

    def _drawn(self, epoch: int, number: int) -> NDArray[np.int32]:
        """What an epoch holds of a share, in stored order, repetitions one after the other."""
        share = self._shares[number]
        whole = np.arange(share.start, share.stop, dtype=np.int32)
        times, rest = divmod(share.per_epoch, whole.size)
        if rest == 0:
            return np.tile(whole, times) if times > 1 else whole
        mixed = _permutation(whole.size, seed=self._seed, epoch=epoch, stream=1 + number)
        return np.concatenate([np.tile(whole, times), np.sort(whole[mixed[:rest]])])

    def _cuts(self, order: NDArray[np.int32]) -> NDArray[np.int64]:
        """Where steps begin in `order`, and its end: int64 [steps + 1]."""
        size, tokens = order.size, self._batch.tokens
        if tokens is None:
            return np.append(np.arange(0, size, self._batch.samples), size)
        ends = np.cumsum(self._lengths[order], dtype=np.int64)
        # For a step that begins at i, the first sample after the one that meets the budget.
        following = np.searchsorted(ends, np.append(0, ends[:-1]) + tokens) + 1
        cuts = [0]
        while cuts[-1] < size:
            cuts.append(min(int(following[cuts[-1]]), size))
        return np.array(cuts)


def _permutation(size: int, *, seed: int, epoch: int, stream: int) -> NDArray[np.int64]:
    """A permutation of `size` that is the same under every version of numpy, for ever.

    numpy keeps the raw stream of a bit generator, not the methods of Generator. Philox is counter
    based: every key (seed, epoch), and every start of the counter 2**192 apart, is an independent
    stream.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(size), kind="stable")
