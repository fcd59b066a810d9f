"""Cost model, padding, dealing to ranks, best-fit packing and balance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_sft.base.layout import ParallelLayout
from roll_sft.data.steps.packing import (
    Bin,
    CostModel,
    assign_to_ranks,
    best_fit_decreasing,
    common_length,
    order_for_pipeline,
    pack_evenly,
    padded_lengths,
)

COST = CostModel(linear=1000.0)
CAPACITY = 64
FEW = settings(deadline=None, max_examples=60)

some_lengths = st.lists(st.integers(1, CAPACITY), max_size=60)


def indices_of(bins: list[Bin]) -> list[int]:
    return sorted(index for one_bin in bins for index in one_bin)


def tokens_of(bins: list[Bin], lengths: list[int]) -> list[int]:
    return [sum(lengths[index] for index in one_bin) for one_bin in bins]


def cost_of(one_bin: Bin, lengths: list[int], cost: CostModel = COST) -> float:
    return sum(cost(lengths[index]) for index in one_bin)


def log_normal(size: int, *, cap: int, seed: int = 0) -> list[int]:
    draws = np.random.default_rng(seed).lognormal(np.log(368), 1.05, size)
    return np.clip(draws, 2, cap).astype(int).tolist()


def naive_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Tokens of the bins of best-fit decreasing, by looking at every open bin."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(capacity - length)
    return [capacity - room for room in rooms]


def test_cost_is_proportional_to_training_flops() -> None:
    parameters, layers, hidden = 7_070_000_000, 28, 3584
    cost = CostModel.of(parameters, num_layers=layers, attention_width=hidden)
    assert cost.linear == pytest.approx(70_450, rel=1e-3)

    def flops(length: int) -> int:
        return 6 * parameters * length + 6 * layers * hidden * length**2

    assert cost(8192) / cost(100) == pytest.approx(flops(8192) / flops(100), rel=1e-12)


@pytest.mark.parametrize("tensor", [1, 2, 3, 4])
@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@settings(deadline=None, max_examples=15)
@given(lengths=st.lists(st.integers(1, 50), max_size=6))
def test_padding_is_the_least_that_aligns_every_sample_and_then_the_pack(
    tensor: int, context: int, sequence_parallel: bool, lengths: list[int]
) -> None:
    layout = ParallelLayout(tensor * context, tensor, 1, context, sequence_parallel)
    padded = padded_lengths(lengths, layout=layout)
    assert all(one % layout.sample_alignment == 0 for one in padded)
    assert sum(padded) % layout.pack_alignment == 0
    assert min(padded) > 0
    if lengths:
        extra = [new - old for new, old in zip(padded, lengths, strict=True)]
        assert all(0 <= one < layout.sample_alignment for one in extra[:-1])
        assert 0 <= extra[-1] < layout.sample_alignment + layout.pack_alignment
    else:
        assert len(padded) == 1
        assert padded[0] >= 2


def test_only_the_last_sample_grows_to_the_pack_alignment() -> None:
    layout = ParallelLayout(6, tensor_size=3, context_size=2, sequence_parallel=True)
    assert padded_lengths([5, 1, 9], layout=layout) == [8, 4, 12]
    assert padded_lengths([5, 1, 3], layout=layout) == [8, 4, 12]


def test_a_sample_without_tokens_is_refused() -> None:
    with pytest.raises(AssertionError, match="length 0"):
        padded_lengths([4, 0], layout=ParallelLayout(1))


@FEW
@given(some_lengths)
def test_best_fit_holds_every_sample_once_within_capacity(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths, capacity=CAPACITY)
    assert indices_of(bins) == list(range(len(lengths)))
    assert all(0 < tokens <= CAPACITY for tokens in tokens_of(bins, lengths))


@FEW
@given(some_lengths)
def test_best_fit_fills_bins_as_a_search_of_every_bin_does(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths, capacity=CAPACITY)
    # Equally full bins are interchangeable, so what is compared is how full each one ends up.
    assert sorted(tokens_of(bins, lengths)) == sorted(naive_best_fit(lengths, CAPACITY))


def test_best_fit_prefers_the_fullest_bin_that_has_room() -> None:
    assert best_fit_decreasing([6, 7, 3, 2, 1], capacity=10) == [(1, 2), (0, 3, 4)]


def test_best_fit_refuses_a_sample_above_capacity() -> None:
    with pytest.raises(AssertionError, match=r"length 11\b.*capacity 10\b"):
        best_fit_decreasing([3, 11], capacity=10)


def test_best_fit_needs_no_more_than_the_bound_on_typical_lengths() -> None:
    lengths = log_normal(20_000, cap=8192)
    bins = best_fit_decreasing(lengths, capacity=8192)
    assert len(bins) <= -(-sum(lengths) // 8192) + 1


@FEW
@given(some_lengths, st.integers(1, 8), st.integers(CAPACITY, 8 * CAPACITY))
def test_ranks_hold_every_sample_once(lengths: list[int], num_ranks: int, ceiling: int) -> None:
    ranks = assign_to_ranks(lengths, num_ranks=num_ranks, cost=COST, token_ceiling=ceiling)
    assert len(ranks) == num_ranks
    assert indices_of(ranks) == list(range(len(lengths)))
    assert ranks == assign_to_ranks(lengths, num_ranks=num_ranks, cost=COST, token_ceiling=ceiling)


@FEW
@given(some_lengths.filter(bool), st.integers(1, 8))
def test_without_a_ceiling_no_rank_exceeds_the_mean_by_more_than_one_sample(
    lengths: list[int], num_ranks: int
) -> None:
    ranks = assign_to_ranks(lengths, num_ranks=num_ranks, cost=COST, token_ceiling=sum(lengths))
    costs = [cost_of(rank, lengths) for rank in ranks]
    assert max(costs) <= sum(costs) / num_ranks + COST(max(lengths)) + 1e-6


def test_a_token_ceiling_sends_short_samples_to_a_rank_with_room() -> None:
    lengths, quadratic = [50] + [10] * 9, CostModel(linear=0.0)
    free = assign_to_ranks(lengths, num_ranks=2, cost=quadratic, token_ceiling=1000)
    assert tokens_of(free, lengths) == [50, 90]
    held = assign_to_ranks(lengths, num_ranks=2, cost=quadratic, token_ceiling=70)
    assert tokens_of(held, lengths) == [70, 70]


def test_a_ceiling_that_cannot_be_kept_gives_the_least_loaded_rank_the_sample() -> None:
    lengths = [40, 10, 10, 10, 10, 10]
    ranks = assign_to_ranks(lengths, num_ranks=2, cost=CostModel(linear=0.0), token_ceiling=40)
    assert tokens_of(ranks, lengths) == [40, 50]


def test_equal_samples_are_dealt_by_index_then_rank() -> None:
    ranks = assign_to_ranks([5] * 6, num_ranks=3, cost=COST, token_ceiling=100)
    assert ranks == [(0, 3), (1, 4), (2, 5)]


def test_ranks_of_512_log_normal_samples_differ_by_less_than_one_percent() -> None:
    for linear in (22_970.0, 70_450.0):
        lengths = log_normal(512, cap=8192)
        cost = CostModel(linear)
        ranks = assign_to_ranks(lengths, num_ranks=8, cost=cost, token_ceiling=sum(lengths))
        costs = [cost_of(rank, lengths, cost) for rank in ranks]
        assert max(costs) * 8 / sum(costs) <= 1.01


@FEW
@given(some_lengths, st.integers(1, 4))
def test_packs_hold_every_sample_once_within_capacity(lengths: list[int], multiple: int) -> None:
    bins = pack_evenly(lengths, capacity=CAPACITY, multiple=multiple, cost=COST)
    assert indices_of(bins) == list(range(len(lengths)))
    assert all(0 < tokens <= CAPACITY for tokens in tokens_of(bins, lengths))
    # Never more than best-fit needs, but for the multiple.
    assert len(bins) < len(best_fit_decreasing(lengths, capacity=CAPACITY)) + multiple


@pytest.mark.parametrize(("multiple", "tokens"), [(1, [60, 60]), (2, [60, 60]), (3, [40] * 3)])
def test_packs_are_even_and_as_few_as_the_multiple_allows(multiple: int, tokens: list[int]) -> None:
    lengths = [10] * 12
    assert tokens_of(best_fit_decreasing(lengths, capacity=100), lengths) == [100, 20]
    bins = pack_evenly(lengths, capacity=100, multiple=multiple, cost=COST)
    assert tokens_of(bins, lengths) == tokens


def test_packs_are_even_in_cost_and_not_in_tokens() -> None:
    lengths = [8, 3, 3, 3]
    bins = pack_evenly(lengths, capacity=10, multiple=1, cost=CostModel(linear=0.0))
    assert bins == [(0,), (1, 2, 3)]


def test_there_are_no_more_packs_than_samples() -> None:
    assert pack_evenly([5, 4], capacity=10, multiple=4, cost=COST) == [(0,), (1,)]
    assert pack_evenly([], capacity=10, multiple=4, cost=COST) == []


def test_a_pack_may_be_filled_to_its_last_token() -> None:
    assert pack_evenly([6, 4], capacity=10, multiple=1, cost=COST) == [(0, 1)]
    assert assign_to_ranks([6, 4, 5, 5], num_ranks=2, cost=COST, token_ceiling=10) == [
        (0, 1),
        (2, 3),
    ]


def test_a_pack_that_was_too_full_for_one_sample_still_takes_a_shorter_one() -> None:
    # The third pack is the cheapest and has no room for the 2, but for the 1 that follows.
    lengths, quadratic = [9, 8, 5, 4, 2, 1], CostModel(linear=0.0)
    bins = pack_evenly(lengths, capacity=10, multiple=1, cost=quadratic)
    assert bins == [(0,), (1, 4), (2, 3, 5)]


def test_samples_that_cannot_be_dealt_are_packed_by_best_fit() -> None:
    lengths = [5, 5, 4, 4, 2]  # longest first would end with 5 + 4 twice and no room for the 2
    bins = pack_evenly(lengths, capacity=10, multiple=1, cost=COST)
    assert bins == best_fit_decreasing(lengths, capacity=10) == [(0, 1), (2, 3, 4)]


def test_samples_that_need_more_packs_than_their_tokens_are_dealt_to_so_many() -> None:
    lengths = [6, 6, 6, 1, 1]  # 20 tokens, and no two of the long ones in one pack of 10
    bins = pack_evenly(lengths, capacity=10, multiple=1, cost=COST)
    assert bins == [(0, 3), (1, 4), (2,)]


@FEW
@given(some_lengths)
def test_a_pipeline_gets_rising_then_falling_costs(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths, capacity=CAPACITY)
    ordered = order_for_pipeline(bins, lengths, cost=COST)
    assert sorted(ordered) == sorted(bins)
    costs = [cost_of(one, lengths) for one in ordered]
    top = costs.index(max(costs)) if costs else 0
    assert costs[: top + 1] == sorted(costs[: top + 1])
    assert costs[top:] == sorted(costs[top:], reverse=True)
    assert abs(top - (len(costs) - 1 - top)) <= 1 or costs.count(max(costs)) > 1


def test_packs_are_filled_up_in_a_pipeline_alone_and_where_it_is_cheap() -> None:
    pipeline = ParallelLayout(2, pipeline_size=2)
    assert common_length([100, 98, 97], layout=pipeline) == 100
    assert common_length([100, 100], layout=pipeline) == 100
    assert common_length([7], layout=pipeline) == 7
    assert common_length([51, 49], layout=pipeline) == 51  # 2 % of all tokens, and no more
    assert common_length([52, 49], layout=pipeline) is None
    assert common_length([100, 94], layout=pipeline) is None
    assert common_length([100, 2], layout=pipeline) is None
    assert common_length([100, 100], layout=ParallelLayout(2)) is None
