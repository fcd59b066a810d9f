"""The rank grid and its alignments."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator

from roll_sft.base.layout import Coordinate, ParallelLayout, round_up

degrees = st.integers(1, 4)


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    tensor, context, pipeline, data = (draw(degrees) for _ in range(4))
    return ParallelLayout(
        tensor * context * pipeline * data, tensor, pipeline, context, draw(st.booleans())
    )


@settings(deadline=None, max_examples=60)
@given(layouts())
def test_rank_and_coordinate_are_inverse(layout: ParallelLayout) -> None:
    places = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert len(set(places)) == layout.world_size
    assert [layout.rank_of(place) for place in places] == list(range(layout.world_size))


@settings(deadline=None, max_examples=60)
@given(layouts())
def test_groups_are_those_of_megatrons_default_order(layout: ParallelLayout) -> None:
    megatron = RankGenerator(
        tp=layout.tensor_size,
        ep=1,
        dp=layout.data_size,
        pp=layout.pipeline_size,
        cp=layout.context_size,
        order="tp-cp-ep-dp-pp",
    )
    axes = {"tp": "tensor_rank", "cp": "context_rank", "dp": "data_rank", "pp": "pipeline_rank"}
    for token, field in axes.items():
        groups: dict[Coordinate, list[int]] = {}
        for rank in range(layout.world_size):
            others = dataclasses.replace(layout.coordinate(rank), **{field: 0})
            groups.setdefault(others, []).append(rank)
        assert sorted(groups.values()) == sorted(megatron.get_ranks(token)), token


def test_the_tensor_rank_varies_fastest_and_the_pipeline_rank_slowest() -> None:
    layout = ParallelLayout(16, tensor_size=2, pipeline_size=2, context_size=2)
    assert layout.data_size == 2
    assert layout.coordinate(0) == Coordinate(0, 0, 0, 0)
    assert layout.coordinate(1) == Coordinate(1, 0, 0, 0)
    assert layout.coordinate(2) == Coordinate(0, 1, 0, 0)
    assert layout.coordinate(4) == Coordinate(0, 0, 1, 0)
    assert layout.coordinate(8) == Coordinate(0, 0, 0, 1)


def test_the_reporting_rank_is_the_first_of_the_last_pipeline_stage() -> None:
    assert ParallelLayout(8, tensor_size=2, pipeline_size=2).reporting_rank == 4
    assert ParallelLayout(8, tensor_size=2).reporting_rank == 0


@settings(deadline=None, max_examples=60)
@given(layouts())
def test_an_aligned_pack_divides_on_every_axis_that_cuts_it(layout: ParallelLayout) -> None:
    assert layout.pack_alignment % layout.sample_alignment == 0
    if layout.context_size > 1:
        assert layout.sample_alignment == 2 * layout.context_size
    if layout.sequence_parallel:
        assert layout.pack_alignment % (layout.context_size * layout.tensor_size) == 0
    else:
        assert layout.pack_alignment == layout.sample_alignment


@pytest.mark.parametrize(
    ("tensor", "context", "sequence_parallel", "sample", "pack"),
    [(1, 1, False, 1, 1), (3, 1, True, 1, 3), (3, 2, True, 4, 12), (4, 2, False, 4, 4)],
)
def test_alignment_of_known_layouts(
    tensor: int, context: int, sequence_parallel: bool, sample: int, pack: int
) -> None:
    layout = ParallelLayout(tensor * context, tensor, 1, context, sequence_parallel)
    assert (layout.sample_alignment, layout.pack_alignment) == (sample, pack)


def test_degrees_that_do_not_divide_the_world_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"\b6\b.*\b8\b"):
        ParallelLayout(8, tensor_size=3, pipeline_size=2)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(AssertionError, match=rf"rank {rank}\b.*\b4\b"):
        ParallelLayout(4).coordinate(rank)


@given(st.integers(0, 10_000), st.integers(1, 100))
def test_round_up_is_the_smallest_multiple_not_below(number: int, multiple: int) -> None:
    result = round_up(number, multiple)
    assert result % multiple == 0
    assert number <= result < number + multiple
