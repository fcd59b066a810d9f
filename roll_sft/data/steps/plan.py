"""The plan of optimizer step k: its samples, and the rank and micro-batch that run each of them.

The samples of step k are chosen first (`epochs`), from the seed, the mixture, the batch size and k
alone. Then they are dealt to data-parallel ranks and packed (`packing`). So the layout, packing and
the token cap change where a sample runs, never its step. To resume is to ask for the next step:
there is no iterator to restore.

Invariants: every draw of an epoch is in exactly one of its steps. A batch never crosses epochs; the
last one of an epoch may be short. Every rank has at least one micro-batch, and a multiple of the
layout's `micro_batch_multiple`, and as many as the others where they share experts; empty ones make
up the number. No micro-batch exceeds the cap.
Asking for a step twice gives equal plans, whatever was asked in between.

Assumes a set that is not empty, and no sample longer than the cap (both are asserted).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from roll_sft.base.layout import ParallelLayout, round_up
from roll_sft.data.steps import packing
from roll_sft.data.steps.epochs import BatchSize, Epochs, Share
from roll_sft.data.steps.packing import Bin, CostModel


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The inputs of a plan besides the samples.

    `micro_batch_tokens` caps the padded tokens of one micro-batch before the context-parallel
    split. `global_batch_tokens` wins over `global_batch_size`. Only these two, `seed` and `shuffle`
    decide which samples a step holds.
    """

    seed: int
    global_batch_size: int
    shuffle: bool
    packing: bool
    micro_batch_tokens: int
    layout: ParallelLayout
    cost: CostModel
    global_batch_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class RankWork:
    """One worker's part of one step: a few KB of sample ids, never tokens.

    All ranks of one model replica get equal work. `supervised_tokens` counts the whole global
    batch: it is the denominator of the loss. An empty micro-batch runs as padding without loss.
    `next_micro_batches` are those of the next step, to be built while this one runs. `loss_scale`
    is that denominator over a recipe's own; see `objective.step_scale`. No rank makes an
    update above `limits`, of the loss summed over tokens and of the norm.
    """

    step: int
    micro_batches: tuple[tuple[int, ...], ...]
    supervised_tokens: int
    learning_rate: float
    next_micro_batches: tuple[tuple[int, ...], ...] | None = None
    loss_scale: float = 1.0
    limits: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step, or one chunk of a validation pass.

    `ranks[data_rank][micro_batch]` are sample ids; `sample_ids` are the same ids in shuffled
    order. Token counts are of the whole global batch, each token once: `total_tokens` without
    padding, `total_tokens_including_padding` with the padding of every pack, also of ranks without
    samples. `fill` is `total_tokens` over the capacity of all packs. `dp_imbalance` is max over
    mean of the data ranks' modelled cost. `epoch` counts from 0; `samples_seen_in_epoch` includes
    this step.
    """

    step: int
    epoch: int
    samples_seen_in_epoch: int
    sample_ids: tuple[int, ...]
    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    supervised_tokens: int
    total_tokens: int
    total_tokens_including_padding: int
    fill: float
    dp_imbalance: float
    loss_scale: float = 1.0
    limits: tuple[float, float] | None = None  # see `RankWork`

    def work_for(
        self, data_rank: int, *, learning_rate: float, following: "StepPlan | None" = None
    ) -> RankWork:
        """The work of one data-parallel rank, with its micro-batches of the `following` step."""
        return RankWork(
            self.step,
            self.ranks[data_rank],
            self.supervised_tokens,
            learning_rate,
            None if following is None else following.ranks[data_rank],
            self.loss_scale,
            self.limits,
        )


class Planner:
    """Plans any step of training over one set of samples.

    `lengths` and `supervised` are integer arrays [n]: tokens of each sample and how many of them
    are supervised. Neither is copied. `shares` say how many samples of which part an epoch draws,
    by default each sample once. `loss_scale` of given samples is set where a recipe has one.
    """

    def __init__(
        self,
        lengths: NDArray[np.integer],
        supervised: NDArray[np.integer],
        *,
        options: PlanOptions,
        shares: Sequence[Share] = (),
    ) -> None:
        assert lengths.shape == supervised.shape == (lengths.size,), (
            f"shapes {lengths.shape} and {supervised.shape} must be equal, and [n]"
        )
        assert lengths.size > 0, "lengths [0]: a plan needs at least one sample"
        # Rounded down, so that a pack still fits the cap after it is padded to the pack alignment.
        layout, alignment = options.layout, options.layout.pack_alignment
        self._capacity = options.micro_batch_tokens // alignment * alignment
        longest = int(lengths.max())
        assert round_up(longest, layout.sample_alignment) <= self._capacity, (
            f"a sample of {longest} tokens does not fit micro_batch_tokens "
            f"{options.micro_batch_tokens}, {self._capacity} when aligned"
        )
        self._lengths = lengths
        self._supervised = supervised
        self._options = options
        self.loss_scale: Callable[[NDArray[np.int32]], float] = lambda _samples: 1.0
        self._epochs = Epochs(
            lengths,
            shares=shares or [Share(0, lengths.size, per_epoch=lengths.size)],
            batch=BatchSize(options.global_batch_size, options.global_batch_tokens),
            seed=options.seed,
            shuffle=options.shuffle,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first epoch, the short last one included."""
        return self.steps_in(1)

    @property
    def samples_per_epoch(self) -> int:
        """Samples that an epoch draws, repetitions counted."""
        return self._epochs.samples_per_epoch

    def steps_in(self, num_epochs: int) -> int:
        """Optimizer steps of the first `num_epochs`, the short last one of each included."""
        return self._epochs.steps_before(num_epochs)

    def step(self, step: int) -> StepPlan:
        """Plan of optimizer step `step`, from 1; there is no last one, epochs follow each other."""
        assert step >= 1, f"step {step}: steps count from 1"
        epoch, first, chosen = self._epochs.step(step)
        return self._plan(step, chosen, epoch=epoch, first=first)

    def evaluation(self) -> tuple[StepPlan, ...]:
        """One pass over all samples in stored order, at most a global batch in a chunk."""
        plans, first = [], 0
        for index, chosen in enumerate(self._epochs.stored()):
            plans.append(self._plan(index + 1, chosen, epoch=0, first=first))
            first += chosen.size
        return tuple(plans)

    def _plan(self, step: int, chosen: NDArray[np.int32], *, epoch: int, first: int) -> StepPlan:
        # In order of id, so that ties in packing do not depend on the shuffle.
        by_id = np.sort(chosen)
        lengths = self._lengths[by_id].astype(np.int64)
        layout, ids = self._options.layout, by_id.tolist()
        alignment = layout.sample_alignment
        aligned = (-(-lengths // alignment) * alignment).tolist()
        ranks, imbalance = self._deal(aligned)
        pack_tokens = [[sum(aligned[i] for i in pack) for pack in rank] for rank in ranks]
        padded = sum(_padded_tokens(packs, layout) for packs in pack_tokens)
        num_packs, total = sum(map(len, ranks)), int(lengths.sum())
        return StepPlan(
            step=step,
            epoch=epoch,
            samples_seen_in_epoch=first + chosen.size,
            sample_ids=tuple(chosen.tolist()),
            ranks=tuple(tuple(tuple(ids[i] for i in pack) for pack in rank) for rank in ranks),
            supervised_tokens=int(self._supervised[by_id].sum(dtype=np.int64)),
            total_tokens=total,
            total_tokens_including_padding=padded,
            fill=total / (num_packs * self._capacity),
            dp_imbalance=imbalance,
            loss_scale=self.loss_scale(by_id),
        )

    def _deal(self, aligned: Sequence[int]) -> tuple[list[list[Bin]], float]:
        """Micro-batches of each rank as indices into `aligned`, and max over mean of rank costs."""
        layout, cost = self._options.layout, self._options.cost
        ranks = packing.assign_to_ranks(
            aligned,
            num_ranks=layout.data_size,
            cost=cost,
            token_ceiling=self._token_ceiling(sum(aligned)),
        )
        all_costs = cost.of_all(aligned)
        costs = [sum(all_costs[i] for i in rank) for rank in ranks]
        imbalance = max(1.0, max(costs) * len(costs) / sum(costs))  # the mean rounds
        batches = [self._micro_batches(rank, aligned) for rank in ranks]
        # Data ranks that exchange tokens wait for each other in every micro-batch.
        is_shared = layout.tensor_size * layout.context_size % layout.expert_size > 0
        most = max(map(len, batches)) if is_shared else 0
        return [rank + [()] * (most - len(rank)) for rank in batches], imbalance

    def _micro_batches(self, rank: Bin, aligned: Sequence[int]) -> list[Bin]:
        own, cost = [aligned[i] for i in rank], self._options.cost
        multiple = self._options.layout.micro_batch_multiple
        if self._options.packing:
            bins = packing.pack_evenly(own, capacity=self._capacity, multiple=multiple, cost=cost)
        else:
            bins = [(position,) for position in range(len(own))]
        ordered = packing.order_for_pipeline(bins, own, cost=cost)
        batches = [tuple(rank[position] for position in members) for members in ordered]
        return batches + [()] * (round_up(max(1, len(batches)), multiple) - len(batches))

    def _token_ceiling(self, tokens: int) -> int:
        """Tokens a rank may hold: the fewest micro-batches that can run `tokens`, and one more.

        Ranks of equal cost hold unequal tokens: many short samples cost less than few long ones.
        Without the spare micro-batch, a step that fills its micro-batches would be dealt by tokens.
        Without a ceiling, ranks of short samples would run many more micro-batches than the rest.
        """
        tokens_per_round = self._options.layout.data_size * self._capacity
        return round_up(tokens, tokens_per_round) // self._options.layout.data_size + self._capacity


def _padded_tokens(packs: Sequence[int], layout: ParallelLayout) -> int:
    """Tokens of a rank's packs with all their padding; `packs` are sums of aligned samples."""
    lengths = [round_up(tokens or 2, layout.pack_alignment) for tokens in packs]
    length = packing.common_length(lengths, layout=layout)
    return sum(lengths) if length is None else length * len(lengths)
