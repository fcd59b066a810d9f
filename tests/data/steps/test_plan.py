"""Which samples a step holds, and where they run."""

import dataclasses
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_sft.base.layout import ParallelLayout
from roll_sft.data.steps.batch import PackedBatch, build_batch, common_tokens
from roll_sft.data.steps.packing import CostModel
from roll_sft.data.steps.plan import Planner, PlanOptions, StepPlan

FEW = settings(deadline=None, max_examples=40)
SMALL = PlanOptions(
    seed=7,
    global_batch_size=16,
    shuffle=True,
    packing=True,
    micro_batch_tokens=128,
    layout=ParallelLayout(1),
    cost=CostModel(linear=1000.0),
)
LAYOUTS = [
    ParallelLayout(1),
    ParallelLayout(4),
    ParallelLayout(8, tensor_size=2, pipeline_size=2),
    ParallelLayout(4, context_size=2),
    ParallelLayout(12, tensor_size=3, context_size=2, sequence_parallel=True),
    ParallelLayout(8, tensor_size=4, sequence_parallel=True),
    ParallelLayout(4, context_size=4),
    ParallelLayout(4, pipeline_size=2, virtual_size=2),
    ParallelLayout(4, pipeline_size=4, virtual_size=2),
]


def planner(
    lengths: list[int] | np.ndarray, *, options: PlanOptions = SMALL, **changes: Any
) -> Planner:
    array = np.asarray(lengths, dtype=np.int32)
    return Planner(array, array // 2, options=dataclasses.replace(options, **changes))


def epoch_of(plans: Planner, epoch: int = 0) -> list[StepPlan]:
    first = epoch * plans.steps_per_epoch + 1
    return [plans.step(step) for step in range(first, first + plans.steps_per_epoch)]


def ids_of(plan: StepPlan) -> list[int]:
    return [sample for rank in plan.ranks for pack in rank for sample in pack]


def as_run(
    lengths: list[int],
    packs: tuple[tuple[int, ...], ...],
    *,
    layout: ParallelLayout,
    context_rank: int = 0,
) -> list[PackedBatch]:
    """The micro-batches of one rank, as an engine builds them."""
    samples = [
        [(np.zeros(lengths[i], np.int32), np.zeros(lengths[i], np.uint8)) for i in pack]
        for pack in packs
    ]
    num_tokens = common_tokens(samples, layout=layout)
    return [
        build_batch(pack, layout=layout, context_rank=context_rank, num_tokens=num_tokens)
        for pack in samples
    ]


some_lengths = st.lists(st.integers(1, 96), min_size=1, max_size=70)
some_options = st.builds(
    PlanOptions,
    seed=st.integers(0, 2**64 - 1),
    global_batch_size=st.integers(1, 40),
    shuffle=st.booleans(),
    packing=st.booleans(),
    micro_batch_tokens=st.integers(108, 400),
    layout=st.sampled_from(LAYOUTS),
    cost=st.builds(CostModel, linear=st.sampled_from([0.0, 100.0, 50_000.0])),
)


@FEW
@given(some_lengths, some_options, st.integers(0, 3))
def test_every_sample_is_in_exactly_one_step_of_an_epoch(
    lengths: list[int], options: PlanOptions, epoch: int
) -> None:
    steps = epoch_of(planner(lengths, options=options), epoch)
    everyone = [sample for plan in steps for sample in plan.sample_ids]
    assert Counter(everyone) == Counter(range(len(lengths)))
    assert all(sorted(ids_of(plan)) == sorted(plan.sample_ids) for plan in steps)


@FEW
@given(some_lengths, some_options)
def test_batches_are_full_but_the_last_and_never_cross_epochs(
    lengths: list[int], options: PlanOptions
) -> None:
    plans = planner(lengths, options=options)
    size, total = options.global_batch_size, len(lengths)
    assert plans.steps_per_epoch == -(-total // size)
    for epoch in (0, 1):
        for index, plan in enumerate(epoch_of(plans, epoch)):
            assert (plan.epoch, plan.step) == (epoch, epoch * plans.steps_per_epoch + index + 1)
            assert len(plan.sample_ids) == min(size, total - index * size)
            assert plan.samples_seen_in_epoch == min((index + 1) * size, total)


@FEW
@given(some_lengths, some_options)
def test_no_micro_batch_exceeds_the_cap_as_it_is_run(
    lengths: list[int], options: PlanOptions
) -> None:
    for plan in epoch_of(planner(lengths, options=options)):
        for rank in plan.ranks:
            for batch in as_run(lengths, rank, layout=options.layout):
                assert batch.cu_seqlens[-1] <= options.micro_batch_tokens


@FEW
@given(some_lengths, some_options)
def test_every_rank_has_a_micro_batch_and_only_an_idle_rank_an_empty_one(
    lengths: list[int], options: PlanOptions
) -> None:
    for plan in epoch_of(planner(lengths, options=options)):
        assert len(plan.ranks) == options.layout.data_size
        multiple = options.layout.micro_batch_multiple
        for rank in plan.ranks:
            assert rank
            assert len(rank) % multiple == 0
            # Empty ones only fill up the last turn of interleaved stages, or an idle rank.
            assert sum(not pack for pack in rank) < multiple or not any(rank)


@FEW
@given(some_lengths, some_options)
def test_tokens_are_counted_as_they_are_run(lengths: list[int], options: PlanOptions) -> None:
    plans, layout = planner(lengths, options=options), options.layout
    for plan in epoch_of(plans):
        assert plan.total_tokens == sum(lengths[i] for i in plan.sample_ids)
        assert plan.supervised_tokens == sum(lengths[i] // 2 for i in plan.sample_ids)
        batches = [
            batch
            for rank in plan.ranks
            for context_rank in range(layout.context_size)
            for batch in as_run(lengths, rank, layout=layout, context_rank=context_rank)
        ]
        run = sum(batch.tokens_T.numel() for batch in batches)
        assert plan.total_tokens_including_padding == run


@FEW
@given(some_lengths, some_options, st.sampled_from(LAYOUTS), st.booleans(), st.integers(108, 999))
def test_samples_of_a_step_do_not_depend_on_how_they_are_run(
    lengths: list[int], options: PlanOptions, layout: ParallelLayout, packing: bool, cap: int
) -> None:
    other = dataclasses.replace(
        options, layout=layout, packing=packing, micro_batch_tokens=cap, cost=CostModel(1.0)
    )
    for one, two in zip(
        epoch_of(planner(lengths, options=options), 1),
        epoch_of(planner(lengths, options=other), 1),
        strict=True,
    ):
        assert one.sample_ids == two.sample_ids
        assert one.supervised_tokens == two.supervised_tokens
        assert one.total_tokens == two.total_tokens


@FEW
@given(some_lengths, some_options, st.lists(st.integers(1, 30), min_size=2, max_size=6))
def test_a_step_is_the_same_whatever_was_asked_before(
    lengths: list[int], options: PlanOptions, steps: list[int]
) -> None:
    used = planner(lengths, options=options)
    for step in steps:
        assert used.step(step) == planner(lengths, options=options).step(step)


def test_another_seed_and_another_epoch_give_another_order() -> None:
    lengths = list(range(1, 97))
    plans = planner(lengths)
    assert plans.step(1) != planner(lengths, seed=8).step(1)
    first, second = (epoch_of(plans, epoch)[0].sample_ids for epoch in (0, 1))
    assert first != second


def philox_4x64(counter: int, *, key: tuple[int, int]) -> list[int]:
    """One block of Philox4x64-10 as published (Salmon et al., SC 2011), in plain integers."""
    low = 2**64 - 1
    words, (first_key, second_key) = [counter, 0, 0, 0], key
    for _ in range(10):
        first, second = words[0] * 0xD2E7470EE14C6C93, words[2] * 0xCA5A826395121157
        words = [
            second >> 64 ^ words[1] ^ first_key,
            second & low,
            first >> 64 ^ words[3] ^ second_key,
            first & low,
        ]
        first_key = first_key + 0x9E3779B97F4A7C15 & low
        second_key = second_key + 0xBB67AE8584CAA73B & low
    return words


def test_the_shuffle_is_pinned() -> None:
    # Other numbers here would break every resumed run: no version of numpy may bring them.
    plan = planner([4] * 12, seed=1234, global_batch_size=12)
    assert plan.step(1).sample_ids == (8, 9, 7, 11, 3, 0, 1, 4, 2, 10, 5, 6)
    assert plan.step(2).sample_ids == (0, 9, 5, 6, 4, 2, 8, 1, 10, 7, 3, 11)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_the_shuffle_sorts_by_the_published_generator(epoch: int) -> None:
    plan = planner([4] * 12, seed=2**64 - 1, global_batch_size=12).step(epoch + 1)
    key = (2**64 - 1, epoch)
    draws = [word for block in (1, 2, 3) for word in philox_4x64(block, key=key)]
    assert plan.sample_ids == tuple(sorted(range(12), key=draws.__getitem__))


def test_the_shuffle_favours_no_position() -> None:
    draws = np.array([planner([1] * 8, seed=seed).step(1).sample_ids for seed in range(2000)])
    counts = np.array([np.bincount(column, minlength=8) for column in draws.T])
    assert np.abs(counts - 250).max() < 75  # five standard deviations


def test_without_shuffle_samples_come_in_stored_order() -> None:
    plans = planner([4] * 40, shuffle=False)
    for epoch in (0, 1):
        ordered = [sample for plan in epoch_of(plans, epoch) for sample in plan.sample_ids]
        assert ordered == list(range(40))


def test_without_packing_every_micro_batch_is_one_sample() -> None:
    plan = planner([5] * 16, packing=False, layout=ParallelLayout(4)).step(1)
    assert all(len(pack) == 1 for rank in plan.ranks for pack in rank)


def test_ranks_without_samples_get_one_empty_micro_batch() -> None:
    plan = planner([9, 5], layout=ParallelLayout(4)).step(1)
    assert plan.ranks == (((0,),), ((1,),), ((),), ((),))
    assert plan.total_tokens_including_padding == 9 + 5 + 2 + 2
    assert plan.dp_imbalance == pytest.approx(4 * 9 * 1009 / (9 * 1009 + 5 * 1005))


@pytest.mark.parametrize("virtual_size", [1, 2])
def test_data_ranks_that_share_experts_run_equally_many_micro_batches(virtual_size: int) -> None:
    """A data rank with fewer samples than others takes part in their exchanges."""
    layout = ParallelLayout(8, pipeline_size=2, virtual_size=virtual_size, expert_size=2)
    apart = dataclasses.replace(layout, expert_size=1)
    ranks = planner([128] + 8 * [5], layout=layout, packing=False).step(1).ranks
    alone = planner([128] + 8 * [5], layout=apart, packing=False).step(1).ranks
    assert len({len(rank) for rank in alone}) > 1
    assert len({len(rank) for rank in ranks}) == 1
    assert [[pack for pack in rank if pack] for rank in ranks] == [
        [pack for pack in rank if pack] for rank in alone
    ]


def test_experts_within_a_data_rank_change_no_plan() -> None:
    layout = ParallelLayout(4, tensor_size=2, sequence_parallel=True, expert_size=2)
    apart = dataclasses.replace(layout, expert_size=1)
    lengths = [128, 5, 5, 5, 5]
    plans = [planner(lengths, layout=each, packing=False).step(1) for each in (layout, apart)]
    assert plans[0].ranks == plans[1].ranks


def test_imbalance_is_max_over_mean_of_the_modelled_cost() -> None:
    plan = planner([3, 1], layout=ParallelLayout(2), cost=CostModel(0.0)).step(1)
    assert plan.dp_imbalance == pytest.approx(9 / 5)
    assert planner([3, 1]).step(1).dp_imbalance == 1.0


def test_equal_samples_are_dealt_by_id_whatever_the_shuffle() -> None:
    plan = planner([4] * 6, packing=False, layout=ParallelLayout(2)).step(1)
    assert plan.sample_ids != tuple(range(6))
    assert plan.ranks == (((0,), (4,), (2,)), ((1,), (5,), (3,)))


def test_micro_batches_of_a_rank_are_balanced() -> None:
    plan = planner([10] * 12, micro_batch_tokens=100).step(1)
    assert [len(pack) for pack in plan.ranks[0]] == [6, 6]


def test_balance_in_cost_may_take_one_micro_batch_more_than_the_fewest() -> None:
    # Two full micro-batches hold all 160 tokens, but only with 20 of them beside the long one.
    lengths = [60] + [10] * 10
    plan = planner(
        lengths, micro_batch_tokens=80, layout=ParallelLayout(2), cost=CostModel(linear=0.0)
    ).step(1)
    assert plan.ranks[0] == ((0,),)
    assert [len(pack) for pack in plan.ranks[1]] == [5, 5]


def test_a_rank_of_short_samples_does_not_run_many_more_micro_batches() -> None:
    lengths = [100] + [10] * 60  # in cost the long one outweighs all the others
    plan = planner(
        lengths,
        global_batch_size=61,
        micro_batch_tokens=100,
        layout=ParallelLayout(2),
        cost=CostModel(linear=0.0),
    ).step(1)
    assert [len(rank) for rank in plan.ranks] == [2, 5]


def test_large_micro_batches_run_in_the_middle() -> None:
    plan = planner([10, 20, 30, 40, 50], packing=False, shuffle=False).step(1)
    assert plan.ranks == (((0,), (2,), (4,), (3,), (1,)),)


def test_evaluation_passes_once_over_all_samples_in_order() -> None:
    plans = planner([4] * 37, layout=ParallelLayout(4), seed=3)
    chunks = plans.evaluation()
    assert [len(chunk.sample_ids) for chunk in chunks] == [16, 16, 5]
    assert [sample for chunk in chunks for sample in chunk.sample_ids] == list(range(37))
    assert [chunk.step for chunk in chunks] == [1, 2, 3]
    assert [chunk.epoch for chunk in chunks] == [0, 0, 0]
    assert [chunk.samples_seen_in_epoch for chunk in chunks] == [16, 32, 37]
    assert sum(chunk.supervised_tokens for chunk in chunks) == 2 * 37


def test_work_for_a_rank_holds_its_micro_batches_and_the_global_denominator() -> None:
    plan = planner([6] * 16, layout=ParallelLayout(4)).step(1)
    work = plan.work_for(2, learning_rate=1e-5)
    assert work.micro_batches == plan.ranks[2]
    assert (work.step, work.supervised_tokens, work.learning_rate) == (1, 48, 1e-5)


def test_work_for_a_rank_pickles_to_a_few_kilobytes() -> None:
    plans = planner(np.full(100_000, 50), global_batch_size=4096, layout=ParallelLayout(8), seed=1)
    work = plans.step(1).work_for(0, learning_rate=1e-5)
    assert sum(map(len, work.micro_batches)) == 512
    assert len(pickle.dumps(work)) < 6_000
    assert pickle.loads(pickle.dumps(work)) == work


@pytest.mark.parametrize("cap", [8192, 32768])
def test_ranks_of_log_normal_samples_differ_by_less_than_one_percent(cap: int) -> None:
    draws = np.random.default_rng(0).lognormal(np.log(368), 1.05, 8 * 512)
    plans = planner(
        np.clip(draws, 2, 8192),
        global_batch_size=512,
        micro_batch_tokens=cap,
        layout=ParallelLayout(8),
        cost=CostModel(22_970.0),
    )
    assert all(plan.dp_imbalance <= 1.01 for plan in epoch_of(plans))


def test_a_sample_above_the_cap_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"\b129 tokens.*micro_batch_tokens 128\b"):
        planner([5, 129])
    # 97 tokens align to 100, and a cap of 107 holds 96 at a pack alignment of 12.
    with pytest.raises(AssertionError, match=r"micro_batch_tokens 107\b.*\b96\b"):
        planner([97], layout=LAYOUTS[4], micro_batch_tokens=107)


def test_an_empty_set_and_step_zero_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"lengths \[0\]"):
        planner([])
    with pytest.raises(AssertionError, match="step 0"):
        planner([5]).step(0)
