"""Micro-batches as tensors, and their split over context-parallel ranks."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_sft.base.layout import ParallelLayout
from roll_sft.data.steps.batch import (
    PackedBatch,
    Sample,
    build_batch,
    zigzag_indices,
    zigzag_inverse,
)

FEW = settings(deadline=None, max_examples=40)
PAD = 999
LAYOUTS = [
    ParallelLayout(tensor * context, tensor, 1, context, sequence_parallel)
    for tensor in (1, 2, 3, 4)
    for context in (1, 2, 4)
    for sequence_parallel in (False, True)
]


@st.composite
def packs(draw: st.DrawFn) -> list[Sample]:
    """Samples whose token ids are all different, so that every id names its place."""
    samples, next_id = [], 1000
    for length in draw(st.lists(st.integers(1, 40), max_size=5)):
        bits = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
        tokens = np.arange(next_id, next_id + length, dtype=np.int32)
        samples.append((tokens, np.array([*bits[:-1], 0], dtype=np.uint8)))
        next_id += length + 100  # so that the next sample's first id is not the successor
    return samples


def slices(samples: list[Sample], layout: ParallelLayout) -> list[PackedBatch]:
    return [
        build_batch(samples, layout=layout, context_rank=rank, pad_token_id=PAD)
        for rank in range(layout.context_size)
    ]


def reference_zigzag(bounds: list[int], context_size: int, rank: int) -> list[int]:
    """Of 2 x context_size chunks of every sequence: the rank's from the front and from the back."""
    places: list[int] = []
    for start, end in pairwise(bounds):
        chunk = (end - start) // (2 * context_size)
        for number in (rank, 2 * context_size - 1 - rank):
            places += range(start + number * chunk, start + (number + 1) * chunk)
    return places


@FEW
@given(packs(), st.sampled_from(LAYOUTS))
def test_the_slices_together_are_the_pack(samples: list[Sample], layout: ParallelLayout) -> None:
    parts = slices(samples, layout)
    bounds = parts[0].cu_seqlens
    inverse = zigzag_inverse(bounds, context_size=layout.context_size)
    tokens = torch.cat([part.tokens_T[0] for part in parts])[inverse].tolist()
    positions = torch.cat([part.positions_T[0] for part in parts])[inverse].tolist()
    labels = torch.cat([part.labels_T for part in parts])[inverse].tolist()
    supervised = torch.cat([part.supervised_T for part in parts])[inverse].tolist()
    for number, (ids, mask) in enumerate(samples):
        start, end = bounds[number : number + 2].tolist()
        padding = end - start - ids.size
        assert tokens[start:end] == ids.tolist() + [PAD] * padding
        assert positions[start:end] == list(range(end - start))
        assert labels[start:end] == [*ids[1:].tolist(), 0] + [0] * padding
        assert supervised[start:end] == mask.astype(bool).tolist() + [False] * padding


@FEW
@given(packs(), st.sampled_from(LAYOUTS))
def test_every_supervised_row_names_its_place_and_the_next_token(
    samples: list[Sample], layout: ParallelLayout
) -> None:
    seen = []
    for part in slices(samples, layout):
        assert part.num_supervised == part.rows.numel() == part.row_labels.numel()
        assert part.rows.tolist() == part.supervised_T.nonzero().flatten().tolist()
        assert torch.equal(part.labels_T[part.rows], part.row_labels)
        assert torch.equal(part.tokens_T[0, part.rows] + 1, part.row_labels)
        seen += part.row_labels.tolist()
    wanted = [token + 1 for ids, mask in samples for token in ids[mask.astype(bool)].tolist()]
    assert sorted(seen) == wanted


@FEW
@given(packs(), st.sampled_from(LAYOUTS))
def test_no_token_predicts_the_next_sample(samples: list[Sample], layout: ParallelLayout) -> None:
    first_tokens = {int(ids[0]) for ids, _ in samples}
    for part in slices(samples, layout):
        assert first_tokens.isdisjoint(part.labels_T.tolist())
        assert first_tokens.isdisjoint(part.row_labels.tolist())
        assert PAD not in part.row_labels.tolist()


@FEW
@given(packs(), st.sampled_from(LAYOUTS))
def test_every_cut_of_the_pack_is_even(samples: list[Sample], layout: ParallelLayout) -> None:
    parts = slices(samples, layout)
    lengths = parts[0].cu_seqlens.diff()
    assert len(lengths) == max(1, len(samples))
    assert (lengths > 0).all()
    assert (lengths % layout.sample_alignment == 0).all()
    assert parts[0].max_seqlen == lengths.max()
    for part in parts:
        assert part.tokens_T.numel() * layout.context_size == parts[0].cu_seqlens[-1]
        assert torch.equal(part.cu_seqlens, parts[0].cu_seqlens)
        if layout.sequence_parallel:
            assert part.tokens_T.numel() % layout.tensor_size == 0


@FEW
@given(packs(), st.sampled_from(LAYOUTS))
def test_shapes_and_types_are_those_promised(samples: list[Sample], layout: ParallelLayout) -> None:
    for part in slices(samples, layout):
        size = part.tokens_T.shape[1]
        expected = {
            "tokens_T": ((1, size), torch.int64),
            "labels_T": ((size,), torch.int64),
            "positions_T": ((1, size), torch.int64),
            "supervised_T": ((size,), torch.bool),
            "cu_seqlens": ((max(1, len(samples)) + 1,), torch.int32),
            "rows": ((part.num_supervised,), torch.int64),
            "row_labels": ((part.num_supervised,), torch.int64),
        }
        found = {
            name: (tuple(getattr(part, name).shape), getattr(part, name).dtype) for name in expected
        }
        assert found == expected


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_empty_micro_batch_is_one_sequence_of_padding(layout: ParallelLayout) -> None:
    for part in slices([], layout):
        assert part.cu_seqlens.tolist() == [0, part.max_seqlen]
        assert part.max_seqlen >= 2
        assert part.max_seqlen % layout.pack_alignment == 0
        assert set(part.tokens_T[0].tolist()) == {PAD}
        assert part.num_supervised == part.rows.numel() == 0
        assert not part.supervised_T.any()


@FEW
@given(packs(), st.sampled_from(LAYOUTS), st.integers(0, 5))
def test_a_pack_that_is_filled_up_is_the_pack_and_a_sequence_of_padding(
    samples: list[Sample], layout: ParallelLayout, times: int
) -> None:
    filling = times * layout.pack_alignment
    for rank, own in enumerate(slices(samples, layout)):
        num_tokens = int(own.cu_seqlens[-1]) + filling
        part = build_batch(
            samples, layout=layout, context_rank=rank, pad_token_id=PAD, num_tokens=num_tokens
        )
        share = filling // layout.context_size
        size = own.tokens_T.shape[1]
        tail = [num_tokens] if filling else []
        assert part.cu_seqlens.tolist() == [*own.cu_seqlens.tolist(), *tail]
        assert part.max_seqlen == max(own.max_seqlen, filling)
        assert part.tokens_T[0].tolist() == own.tokens_T[0].tolist() + [PAD] * share
        assert torch.equal(part.positions_T[:, :size], own.positions_T)
        for name in ("labels_T", "supervised_T"):
            whole = torch.cat([getattr(own, name), torch.zeros(share)])
            assert torch.equal(getattr(part, name), whole.to(getattr(part, name).dtype))
        assert torch.equal(part.rows, own.rows)
        assert torch.equal(part.row_labels, own.row_labels)


def test_a_pack_is_not_filled_up_to_less_than_it_holds_nor_to_what_cannot_be_cut() -> None:
    sample = (np.arange(8, dtype=np.int32), np.zeros(8, np.uint8))
    with pytest.raises(AssertionError, match=r"\b8 tokens.*\b6\b"):
        build_batch([sample], layout=ParallelLayout(1), context_rank=0, num_tokens=6)
    layout = ParallelLayout(2, context_size=2)
    with pytest.raises(AssertionError, match=r"\b10 tokens\b"):
        build_batch([sample], layout=layout, context_rank=0, num_tokens=10)


@FEW
@given(st.sampled_from([1, 2, 3, 4, 8]), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_zigzag_takes_the_chunks_of_the_formula(context_size: int, chunks: list[int]) -> None:
    bounds = [0, *np.cumsum(np.array(chunks) * 2 * context_size).tolist()]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    for rank in range(context_size):
        places = zigzag_indices(cu_seqlens, context_size=context_size, context_rank=rank)
        assert places.dtype == torch.int64
        assert places.tolist() == reference_zigzag(bounds, context_size, rank)


def test_zigzag_gives_every_rank_the_same_causal_work() -> None:
    cu_seqlens = torch.tensor([0, 64, 96], dtype=torch.int32)
    starts = torch.tensor([0] * 64 + [64] * 32)
    work = []
    for rank in range(4):
        places = zigzag_indices(cu_seqlens, context_size=4, context_rank=rank)
        work.append(int((places - starts[places] + 1).sum()))
    assert len(set(work)) == 1


def test_zigzag_refuses_a_length_that_does_not_divide() -> None:
    cu_seqlens = torch.tensor([0, 8, 14], dtype=torch.int32)
    with pytest.raises(AssertionError, match=r"\[8, 6\].*\b4\b"):
        zigzag_indices(cu_seqlens, context_size=2, context_rank=0)


def test_zigzag_refuses_a_rank_outside_its_group() -> None:
    with pytest.raises(AssertionError, match=r"rank 2\b.*\b2\b"):
        zigzag_indices(torch.tensor([0, 8]), context_size=2, context_rank=2)


def test_a_mask_on_the_last_token_is_refused() -> None:
    sample = (np.array([1, 2], np.int32), np.array([0, 1], np.uint8))
    with pytest.raises(AssertionError, match=r"mask\[1\]"):
        build_batch([sample], layout=ParallelLayout(1), context_rank=0)
