"""Which samples make up optimizer step k, and which rank runs which of them in which micro-batch.

The samples of step k are chosen first, from (seed, epoch, k, global_batch_size) alone; only then
are they dealt to data-parallel ranks and packed. So a layout, packing or a token cap changes
where a sample runs, never which step it is in, and to resume is to ask for the next step: there
is no iterator to restore.

Invariants: every sample is in exactly one step of an epoch; a batch never crosses epochs and the
last, short one is kept; every rank has at least one micro-batch, and a multiple of the layout's
`micro_batch_multiple`, empty ones filling up; no micro-batch exceeds the cap;
asking for a step twice gives equal plans, whatever was asked in between.

Assumes the set is not empty, `supervised` counts the labels each sample contributes, and no
sample is longer than the cap (the configuration guarantees it; it is asserted here).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from roll_sft.data import packing
from roll_sft.data.packing import Bin, CostModel
from roll_sft.layout import ParallelLayout, round_up


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What a plan depends on besides the samples.

    `micro_batch_tokens` caps the padded tokens of one micro-batch before the context-parallel
    split. Of these options only `seed`, `shuffle` and `global_batch_size` decide which samples a
    step holds.
    """

    seed: int
    global_batch_size: int
    shuffle: bool
    packing: bool
    micro_batch_tokens: int
    layout: ParallelLayout
    cost: CostModel


@dataclass(frozen=True, slots=True)
class RankWork:
    """What one worker needs to run one step: a few KB of indices, never tokens.

    All ranks of one model replica get equal work. `supervised_tokens` counts the whole global
    batch: it is the denominator of the loss. An empty micro-batch stands for a pack of weight 0.
    """

    step: int
    micro_batches: tuple[tuple[int, ...], ...]
    supervised_tokens: int
    learning_rate: float


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step, or one chunk of a validation pass.

    `ranks[data_rank][micro_batch]` are sample ids; `sample_ids` are the same ids in the order of
    the shuffle. Token counts are of the whole global batch, each token once: `total_tokens`
    without padding, `total_tokens_including_padding` with that of every pack, the packs of ranks
    without samples included. `dp_imbalance` is max over mean of the data ranks' modelled cost.
    `epoch` counts from 0 and `samples_seen_in_epoch` is as of the end of this step.
    """

    step: int
    epoch: int
    samples_seen_in_epoch: int
    sample_ids: tuple[int, ...]
    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    supervised_tokens: int
    total_tokens: int
    total_tokens_including_padding: int
    dp_imbalance: float

    def work_for(self, data_rank: int, *, learning_rate: float) -> RankWork:
        """The share of one data-parallel rank."""
        return RankWork(self.step, self.ranks[data_rank], self.supervised_tokens, learning_rate)


class Planner:
    """Plans any step of training over one set of samples.

    `lengths` and `supervised` are integer arrays [n]: tokens of each sample and how many of them
    are supervised. They are kept, not copied; the order of the epoch last asked for is cached (8n
    bytes).
    """

    def __init__(
        self,
        lengths: NDArray[np.integer],
        supervised: NDArray[np.integer],
        *,
        options: PlanOptions,
    ) -> None:
        layout = options.layout
        assert lengths.shape == supervised.shape == (lengths.size,), (
            f"shapes {lengths.shape} and {supervised.shape} must be one and the same [n]"
        )
        assert lengths.size > 0, "a plan needs at least one sample"
        assert 0 <= options.seed < 2**64, f"seed {options.seed} is not an unsigned 64-bit number"
        assert options.global_batch_size > 0, f"global_batch_size {options.global_batch_size} <= 0"
        # Rounded down, so that a pack still fits the cap after it is padded to the pack alignment.
        alignment = layout.pack_alignment
        self._capacity = options.micro_batch_tokens // alignment * alignment
        longest = int(lengths.max())
        assert round_up(longest, layout.sample_alignment) <= self._capacity, (
            f"a sample of {longest} tokens does not fit micro_batch_tokens "
            f"{options.micro_batch_tokens}, {self._capacity} when aligned"
        )
        self._lengths = lengths
        self._supervised = supervised
        self._options = options
        self._cached_order: tuple[int, NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch, the short last one included."""
        return -(-self._lengths.size // self._options.global_batch_size)

    def step(self, step: int) -> StepPlan:
        """Plan of optimizer step `step`, from 1; there is no last one, epochs follow each other."""
        assert step >= 1, f"step {step}: steps count from 1"
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        return self._plan(step, epoch=epoch, index=index, order=self._epoch_order(epoch))

    def evaluation(self) -> tuple[StepPlan, ...]:
        """One pass over all samples in stored order, at most `global_batch_size` a chunk."""
        order = np.arange(self._lengths.size)
        return tuple(
            self._plan(index + 1, epoch=0, index=index, order=order)
            for index in range(self.steps_per_epoch)
        )

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._cached_order is None or self._cached_order[0] != epoch:
            size, options = self._lengths.size, self._options
            shuffled = options.shuffle
            order = _shuffled(size, seed=options.seed, epoch=epoch) if shuffled else np.arange(size)
            self._cached_order = epoch, order
        return self._cached_order[1]

    def _plan(self, step: int, *, epoch: int, index: int, order: NDArray[np.int64]) -> StepPlan:
        first = index * self._options.global_batch_size
        chosen = order[first : first + self._options.global_batch_size]
        # In order of id, so that ties below fall the same way whatever the shuffle was.
        ids = np.sort(chosen)
        lengths = self._lengths[ids].tolist()
        shares, imbalance = self._deal(lengths)
        layout = self._options.layout
        return StepPlan(
            step=step,
            epoch=epoch,
            samples_seen_in_epoch=first + chosen.size,
            sample_ids=tuple(chosen.tolist()),
            ranks=tuple(
                tuple(tuple(ids[list(members)].tolist()) for members in share) for share in shares
            ),
            supervised_tokens=int(self._supervised[ids].sum(dtype=np.int64)),
            total_tokens=sum(lengths),
            total_tokens_including_padding=sum(
                sum(packing.padded_lengths([lengths[i] for i in members], layout=layout))
                for share in shares
                for members in share
            ),
            dp_imbalance=imbalance,
        )

    def _deal(self, lengths: Sequence[int]) -> tuple[list[list[Bin]], float]:
        """Micro-batches of each rank as indices into `lengths`, and max over mean of rank costs."""
        layout, cost = self._options.layout, self._options.cost
        aligned = [round_up(length, layout.sample_alignment) for length in lengths]
        ranks = packing.assign_to_ranks(
            aligned,
            num_ranks=layout.data_size,
            cost=cost,
            token_ceiling=self._token_ceiling(sum(aligned)),
        )
        costs = [packing.bin_cost(rank, aligned, cost=cost) for rank in ranks]
        imbalance = max(1.0, max(costs) * len(costs) / sum(costs))  # the mean rounds
        return [self._micro_batches(rank, aligned) for rank in ranks], imbalance

    def _micro_batches(self, rank: Bin, aligned: Sequence[int]) -> list[Bin]:
        own, cost = [aligned[i] for i in rank], self._options.cost
        multiple = self._options.layout.micro_batch_multiple
        if self._options.packing:
            bins = packing.best_fit_decreasing(own, capacity=self._capacity)
            num_bins = min(round_up(len(bins), multiple), len(own))
            bins = packing.balance_bins(
                bins, own, num_bins=num_bins, cost=cost, capacity=self._capacity
            )
        else:
            bins = [(position,) for position in range(len(own))]
        ordered = packing.order_for_pipeline(bins, own, cost=cost)
        batches = [tuple(rank[position] for position in members) for members in ordered]
        return batches + [()] * (round_up(max(1, len(batches)), multiple) - len(batches))

    def _token_ceiling(self, tokens: int) -> int:
        """Tokens a rank may hold: the fewest micro-batches that can run `tokens`, and one more.

        Balance in cost comes first, and ranks of many short samples then hold more tokens than
        others. Without the spare micro-batch a step that fills its micro-batches would have to be
        dealt by tokens; without any ceiling those ranks would run many more micro-batches than
        the rest.
        """
        tokens_per_round = self._options.layout.data_size * self._capacity
        return round_up(tokens, tokens_per_round) // self._options.layout.data_size + self._capacity


def _shuffled(size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of `size` that is the same under every version of numpy, for ever.

    numpy keeps the raw stream of a bit generator, not the methods of Generator. Philox is counter
    based: every key (seed, epoch) is an independent stream.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")
