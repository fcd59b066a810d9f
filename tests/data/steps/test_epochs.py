"""Mixtures, and steps of a number of tokens: what an epoch holds and where it is cut."""

import dataclasses
import tracemalloc
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_sft.base.layout import ParallelLayout
from roll_sft.data.steps import epochs as epochs_module
from roll_sft.data.steps.epochs import BatchSize, Epochs, Part, Permutation, Share, part_of
from roll_sft.data.steps.packing import CostModel
from roll_sft.data.steps.plan import Planner, PlanOptions

FEW = settings(deadline=None, max_examples=40)


def epochs(lengths: Any, *shares: Share, **changes: Any) -> Epochs:
    array = np.asarray(lengths, dtype=np.int32)
    options = {"batch": BatchSize(4), "seed": 7, "shuffle": True, **changes}
    whole = Share(0, array.size, array.size)
    return Epochs(array, shares=shares or (whole,), **options)


def samples_of(every: Epochs, epoch: int) -> list[list[int]]:
    first, stop = every.steps_before(epoch), every.steps_before(epoch + 1)
    return [every.step(step)[2].tolist() for step in range(first + 1, stop + 1)]


def drawn(every: Epochs, epoch: int) -> Counter[int]:
    return Counter(sample for step in samples_of(every, epoch) for sample in step)


@pytest.mark.parametrize(
    ("weight", "samples", "per_epoch"),
    [(1.0, None, 10), (0.5, None, 5), (2.0, None, 20), (0.25, None, 3), (0.001, None, 1)],
)
def test_weight_multiplies_the_samples_of_an_epoch(
    weight: float, samples: int | None, per_epoch: int
) -> None:
    assert Share.of(range(5, 15), weight=weight, samples=samples) == Share(5, 15, per_epoch)
    assert Share.of(range(5, 15), weight=1.0, samples=7).per_epoch == 7


@FEW
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=1, max_size=4),
    st.integers(0, 2**64 - 1),
    st.booleans(),
    st.integers(0, 5),
)
def test_an_epoch_draws_each_source_as_often_as_asked(
    sizes: list[tuple[int, int]], seed: int, shuffle: bool, epoch: int
) -> None:
    starts = np.cumsum([0, *(size for size, _ in sizes)]).tolist()
    shares = [
        Share(start, stop, draws)
        for (start, stop), (_, draws) in zip(pairwise(starts), sizes, strict=True)
    ]
    every = epochs([3] * starts[-1], *shares, seed=seed, shuffle=shuffle)
    counts = drawn(every, epoch)
    assert counts.total() == every.samples_per_epoch == sum(draws for _, draws in sizes)
    for share in shares:
        found = [counts[sample] for sample in range(share.start, share.stop)]
        assert sum(found) == share.per_epoch
        assert max(found) - min(found) <= 1  # without replacement within a round


def test_half_of_a_source_is_another_half_in_another_epoch_and_another_seed() -> None:
    every = epochs([3] * 100, Share(0, 100, 50))
    first, second = drawn(every, 0), drawn(every, 1)
    other = drawn(epochs([3] * 100, Share(0, 100, 50), seed=8), 0)
    assert len({frozenset(first), frozenset(second), frozenset(other)}) == 3
    assert drawn(every, 0) == first


def test_two_sources_of_one_size_draw_independently() -> None:
    counts = drawn(epochs([3] * 200, Share(0, 100, 50), Share(100, 200, 50)), 0)
    one = {sample for sample in counts if sample < 100}
    other = {sample - 100 for sample in counts if sample >= 100}
    assert one != other


def test_a_mixture_of_whole_sources_is_the_plain_shuffle() -> None:
    parts = epochs([3] * 30, Share(0, 10, 10), Share(10, 30, 20))
    assert samples_of(parts, 1) == samples_of(epochs([3] * 30), 1)


def test_the_choice_is_pinned() -> None:
    # Other numbers here would break every resumed run.
    every = epochs([3] * 12, Share(0, 6, 3), Share(6, 12, 8), seed=1234, batch=BatchSize(11))
    assert samples_of(every, 0) == [[11, 7, 10, 6, 0, 1, 7, 2, 10, 8, 9]]
    assert samples_of(every, 1) == [[0, 7, 8, 9, 7, 4, 11, 1, 10, 10, 6]]


def test_without_shuffle_a_source_is_repeated_in_stored_order() -> None:
    every = epochs([3] * 5, Share(0, 2, 4), Share(2, 5, 2), shuffle=False, batch=BatchSize(9))
    (ordered,) = samples_of(every, 0)
    assert ordered[:4] == [0, 1, 0, 1]
    assert ordered[4:] == sorted(ordered[4:])


def test_the_stored_order_is_cut_into_steps_of_samples() -> None:
    found = epochs([3] * 5, batch=BatchSize(2)).stored()
    assert [step.tolist() for step in found] == [[0, 1], [2, 3], [4]]


# Steps of a number of tokens


def naive_cuts(lengths: list[int], tokens: int) -> list[int]:
    """Number of samples in each step, one sample after the other."""
    steps, held = [0], 0
    for length in lengths:
        if held >= tokens:
            steps.append(0)
            held = 0
        steps[-1] += 1
        held += length
    return steps


@FEW
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 200), st.integers(0, 9)
)
def test_samples_are_added_until_the_budget_is_met(
    lengths: list[int], tokens: int, seed: int
) -> None:
    every = epochs(lengths, batch=BatchSize(1, tokens), seed=seed)
    for epoch in (0, 1, 2):
        steps = samples_of(every, epoch)
        ordered = [sample for step in steps for sample in step]
        assert sorted(ordered) == list(range(len(lengths)))
        assert list(map(len, steps)) == naive_cuts([lengths[i] for i in ordered], tokens)


def test_a_step_ends_with_the_sample_that_meets_its_budget_exactly() -> None:
    lengths = [3, 4, 3, 5, 5, 11, 1]
    every = epochs(lengths, batch=BatchSize(1, 10), shuffle=False)
    cuts = [[0, 1, 2], [3, 4], [5], [6]]
    assert samples_of(every, 0) == samples_of(every, 1) == cuts
    assert [step.tolist() for step in every.stored()] == cuts
    assert [every.step(step)[:2] for step in range(1, 6)] == [
        (0, 0),
        (0, 3),
        (0, 5),
        (0, 6),
        (1, 0),
    ]


@FEW
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 200),
    st.lists(st.integers(1, 60), min_size=1, max_size=5),
)
def test_a_step_of_tokens_is_the_same_whatever_was_asked_before(
    lengths: list[int], tokens: int, steps: list[int]
) -> None:
    share = Share(0, len(lengths), len(lengths) // 2 + 1)
    used = epochs(lengths, share, batch=BatchSize(1, tokens))
    for step in steps:
        fresh = epochs(lengths, share, batch=BatchSize(1, tokens)).step(step)
        epoch, before, chosen = used.step(step)
        assert (epoch, before, chosen.tolist()) == (fresh[0], fresh[1], fresh[2].tolist())


def test_samples_seen_in_the_epoch_are_counted() -> None:
    every = epochs([10] * 20, batch=BatchSize(1, 45))
    assert [every.step(step)[:2] for step in (1, 2, 4, 5)] == [(0, 0), (0, 5), (0, 15), (1, 0)]


# Scale


MILLION = PlanOptions(
    seed=7,
    global_batch_size=512,
    shuffle=True,
    packing=True,
    micro_batch_tokens=8192,
    layout=ParallelLayout(8),
    cost=CostModel(70_450.0),
)


@pytest.fixture(scope="module")
def million() -> np.ndarray:
    draws = np.random.default_rng(0).lognormal(np.log(368), 1.05, 1_000_000)
    return np.clip(draws, 2, 8192).astype(np.int32)


@pytest.mark.parametrize("tokens", [None, 300_000])
def test_a_million_samples_cost_few_bytes_each(million: np.ndarray, tokens: int | None) -> None:
    tracemalloc.start()
    planner = Planner(
        million, million, options=dataclasses.replace(MILLION, global_batch_tokens=tokens)
    )
    planner.step(1)
    planner.step(planner.steps_in(1) + 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak / million.size <= 28 - 8  # and 4 each for the lengths and the supervised


def test_a_jump_makes_only_the_parts_that_hold_its_step(
    million: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def watched(permutation: Permutation, number: int, *, num_parts: int) -> Part:
        made.append((permutation.epoch, number, num_parts))
        return part_of(permutation, number, num_parts=num_parts)

    monkeypatch.setattr(epochs_module, "part_of", watched)
    planner = Planner(million, million, options=MILLION)
    last = planner.steps_in(1)
    planner.step(1)
    assert made == [(0, 0, 8)]
    planner.step(last)
    planner.step(last)
    assert made == [(0, 0, 8), (0, 7, 8)]
    planner.step(41 * last + 1)
    assert made[2:] == [(41, 0, 8)]
