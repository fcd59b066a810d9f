"""Rotation by position: what Megatron-Core makes of the bounds of samples, to the last bit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from roll_sft.base.layout import ParallelLayout
from roll_sft.data.steps.batch import build_batch
from roll_sft.engine.attention import describe_pack, rotate
from roll_sft.engine.micro_batch import segments_of

LENGTHS = (5, 1, 17, 8, 32)


@pytest.mark.parametrize("context_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pack_is_rotated_as_megatron_rotates_it(context_size: int, dtype: torch.dtype) -> None:
    layout = ParallelLayout(context_size, context_size=context_size)
    samples = [(np.ones(n, np.int32), np.zeros(n, np.uint8)) for n in LENGTHS]
    frequencies = 10_000.0 ** (-torch.arange(8) / 8)
    for rank in range(context_size):
        pack = build_batch(samples, layout=layout, context_rank=rank)
        angles = torch.outer(torch.arange(pack.max_seqlen).float(), frequencies)
        angles = torch.cat([angles, angles], dim=1)[:, None, None]
        torch.manual_seed(rank)
        length = pack.tokens_T.shape[1]
        query, key = (torch.randn(length, heads, 16).to(dtype) for heads in (3, 1))
        group = SimpleNamespace(size=lambda: context_size, rank=lambda rank=rank: rank)
        wanted = [
            rope_utils._apply_rotary_pos_emb_thd(states, pack.cu_seqlens, angles, cp_group=group)
            for states in (query, key)
        ]
        segments = segments_of(pack.cu_seqlens, context_size=context_size, context_rank=rank)
        described = describe_pack(segments, pack.positions_T, frequencies=frequencies)
        assert described.angles is not None
        rotated = rotate(query, key, described.angles, is_compiled=False)
        assert all(map(torch.equal, rotated, wanted))


def test_megatrons_description_of_a_pack_holds_bounds() -> None:
    bounds = torch.tensor([0, 16, 24, 48], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (16, 8, 24)])[None]
    segments = segments_of(bounds, context_size=1, context_rank=0)
    described = describe_pack(segments, positions, frequencies=torch.ones(4))
    assert torch.equal(described.cu_seqlens_q, bounds)
    assert torch.equal(described.cu_seqlens_kv, bounds)
    assert (described.max_seqlen_q, described.max_seqlen_kv) == (24, 24)
    # The second of two context ranks: the middle chunks, whose keys begin with their sample.
    segments = segments_of(bounds, context_size=2, context_rank=1)
    described = describe_pack(segments, positions[:, :24], frequencies=torch.ones(4))
    assert described.cu_seqlens_q.tolist() == [0, 4, 8, 10, 12, 18, 24]
    assert described.cu_seqlens_kv.tolist() == [0, 8, 20, 24, 30, 42, 60]
    assert (described.max_seqlen_q, described.max_seqlen_kv) == (6, 18)
