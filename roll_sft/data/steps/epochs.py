"""Which samples an epoch holds, in which order, and where its steps are cut.

A pure function of (seed, epoch, shares, batch): nothing is drawn one after the other, so any step
can be asked for at once. The order of an epoch is made in parts (`data.shuffle`), each when the
first of its steps is asked for; of large sets in a thread, once half of the part before is used.

Invariants: an epoch holds each sample of a share `per_epoch // size` times, and a seeded choice of
them, without replacement, once more; a step never crosses epochs and is never empty; the last,
short one is kept.
"""

import functools
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from roll_sft.data.steps.shuffle import Draw, Part, part_of

# Parts of an order: the fewer, the fewer times all keys are drawn; the more, the less is held.
_PARTS = 8
_PART_SIZE = 1 << 17  # samples; smaller parts are not worth the draw
_PARTS_KEPT = 3  # the one in use, one on either side of it


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
        self._num_parts = min(_PARTS, -(-self.samples_per_epoch // _PART_SIZE))
        self._is_large = max(self.samples_per_epoch, lengths.size) > _PART_SIZE
        self._parts: dict[tuple[int, int], Future[Part]] = {}  # by epoch and number
        # Of every epoch whose steps had to be counted, where they begin, and its end.
        self._cuts: list[NDArray[np.int64]] = []
        self._ends = [0]  # steps before each of these epochs
        ends = accumulate((share.per_epoch for share in self._shares), initial=0)
        self._share_ends = np.array([*ends])  # in what an epoch holds
        # Of this epoch and the next one.
        self._chosen = functools.lru_cache(2 * len(self._shares))(self._choose)

    def steps_before(self, epoch: int) -> int:
        """Optimizer steps of all epochs before `epoch`, which counts from 0.

        Steps of a number of tokens have to be counted, once for each epoch, since samples that
        repeat or are drawn anew change how many there are.
        """
        if self._batch.tokens is None:
            return epoch * -(-self.samples_per_epoch // self._batch.samples)
        while len(self._ends) <= epoch:
            counted = len(self._cuts)
            parts = (self._part(counted, number) for number in range(self._num_parts))
            cuts = self._counted(part.numbers for part in parts)
            self._cuts.append(cuts)
            self._ends.append(self._ends[-1] + cuts.size - 1)
        return self._ends[epoch]

    def step(self, step: int) -> tuple[int, int, NDArray[np.int32]]:
        """Epoch (from 0) of optimizer step `step` (from 1), the samples of that epoch before it,
        and its own in the order of the shuffle. There is no last step: epochs follow each other.
        """
        if self._batch.tokens is None:
            epoch, index = divmod(step - 1, self.steps_before(1))
            first = index * self._batch.samples
            stop = min(first + self._batch.samples, self.samples_per_epoch)
        else:
            while self.steps_before(len(self._cuts)) < step:
                self.steps_before(len(self._cuts) + 1)
            epoch = bisect_right(self._ends, step - 1) - 1
            index = step - 1 - self._ends[epoch]
            first, stop = self._cuts[epoch][index : index + 2].tolist()
        return epoch, first, self._ordered(epoch, first, stop)

    def stored(self) -> list[NDArray[np.int32]]:
        """All samples once, in stored order, cut into steps likewise."""
        order = np.arange(self._lengths.size, dtype=np.int32)
        cuts = [*range(0, order.size, self._batch.samples), order.size]
        if self._batch.tokens is not None:
            cuts = self._counted([order]).tolist()
        return [order[first:stop] for first, stop in pairwise(cuts)]

    def _ordered(self, epoch: int, first: int, stop: int) -> NDArray[np.int32]:
        """What lies at `first:stop` in the order of an epoch."""
        number = min(first * self._num_parts // self.samples_per_epoch, self._num_parts - 1)
        # Parts are of about the same size, so this is the right one or one beside it.
        while first < (part := self._part(epoch, number)).first:
            number -= 1
        found = [part.numbers[first - part.first : stop - part.first]]
        while part.stop < stop:
            number += 1
            part = self._part(epoch, number)
            found.append(part.numbers[max(0, first - part.first) : stop - part.first])
        if self._is_large and stop - part.first > part.numbers.size // 2:
            is_last = number + 1 == self._num_parts
            self._begin(*(epoch + 1, 0) if is_last else (epoch, number + 1))
        ordered = found[0] if len(found) == 1 else np.concatenate(found)
        return ordered.astype(np.int32, copy=False)

    def _part(self, epoch: int, number: int) -> Part:
        if (found := self._parts.get((epoch, number))) is not None:
            return found.result()
        made = Future[Part]()
        made.set_result(self._made(epoch, number))
        self._keep(epoch, number, made)
        return made.result()

    def _begin(self, epoch: int, number: int) -> None:
        """Make a part in a thread, unless it is there; the thread ends by itself."""
        if (epoch, number) in self._parts:
            return
        thread = ThreadPoolExecutor(1, thread_name_prefix="order-of-samples")
        self._keep(epoch, number, thread.submit(self._made, epoch, number))
        thread.shutdown(wait=False)  # once it is done

    def _keep(self, epoch: int, number: int, part: Future[Part]) -> None:
        self._parts[epoch, number] = part
        while len(self._parts) > _PARTS_KEPT:
            del self._parts[next(iter(self._parts))]

    def _made(self, epoch: int, number: int) -> Part:
        size, num_parts = self.samples_per_epoch, self._num_parts
        if self._shuffle:
            part = part_of(Draw(size, self._seed, epoch, 0), number, num_parts=num_parts)
        else:
            first, stop = (size * each // num_parts for each in (number, number + 1))
            part = Part(first, np.arange(first, stop))
        return Part(part.first, self._drawn(epoch, part.numbers))

    def _drawn(self, epoch: int, places: NDArray[np.integer]) -> NDArray[np.int32]:
        """The samples at `places` of what an epoch holds: shares one after the other, each in
        stored order, repetitions one after the other.
        """
        shares, ends = self._shares, self._share_ends
        begun = zip(shares, ends[:-1], strict=True)
        if all(share.is_whole and share.start == end for share, end in begun):
            return places.astype(np.int32, copy=False)
        starts, sizes = np.array([(share.start, share.stop - share.start) for share in shares]).T
        which = np.searchsorted(ends[1:], places, side="right")
        place = places - ends[which]
        drawn: NDArray[np.int32] = (starts[which] + place % sizes[which]).astype(np.int32)
        # After the whole repetitions of a share come the samples that are drawn once more.
        place -= (np.diff(ends) // sizes * sizes)[which]
        for number in range(len(shares)):
            chosen = (which == number) & (place >= 0)
            if chosen.any():
                drawn[chosen] = self._chosen(epoch, number)[place[chosen]]
        return drawn

    def _choose(self, epoch: int, number: int) -> NDArray[np.int32]:
        """What an epoch draws of a share once more, or only once, in stored order."""
        share = self._shares[number]
        size = share.stop - share.start
        rest, num_parts = share.per_epoch % size, min(_PARTS, -(-size // _PART_SIZE))
        mixed, found, index = Draw(size, self._seed, epoch, 1 + number), [np.empty(0, np.int32)], 0
        while (missing := rest - sum(map(len, found))) > 0:
            part = part_of(mixed, index, num_parts=num_parts)
            found.append(part.numbers[:missing].astype(np.int32))
            index += 1
        chosen: NDArray[np.int32] = np.sort(np.concatenate(found)) + np.int32(share.start)
        return chosen

    def _counted(self, orders: Iterable[NDArray[np.integer]]) -> NDArray[np.int64]:
        """Where steps of a number of tokens begin in an order, and its end: int64 [steps + 1]."""
        tokens = self._batch.tokens
        assert tokens is not None, "steps of a number of samples need no count"
        cuts, first, before, budget = [0], 0, 0, tokens
        for order in orders:
            ends = before + np.cumsum(self._lengths[order], dtype=np.int64)
            # For a step that begins after i, the sample that meets the budget.
            following = np.searchsorted(ends, ends + tokens)
            meets = int(np.searchsorted(ends, budget))
            while meets < ends.size:
                cuts.append(first + meets + 1)
                budget = int(ends[meets]) + tokens
                meets = int(following[meets])
            first, before = first + ends.size, int(ends[-1]) if ends.size else before
        if cuts[-1] < first:
            cuts.append(first)
        return np.array(cuts)
