"""Rotation by position: what Megatron-Core makes of the bounds of samples, to the last bit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from roll_sft.base.layout import ParallelLayout
from roll_sft.data.steps.batch import build_batch
from roll_sft.engine.rotary import RotaryTable, rotate

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
        states = torch.randn(pack.tokens_T.shape[1], 3, 16).to(dtype)
        group = SimpleNamespace(size=lambda: context_size, rank=lambda rank=rank: rank)
        wanted = rope_utils._apply_rotary_pos_emb_thd(
            states, pack.cu_seqlens, angles, cp_group=group
        )
        table = RotaryTable(frequencies).get_emb(pack.max_seqlen)
        config = SimpleNamespace(bias_activation_fusion=False)
        found = rotate(states, table, config, pack.positions_T[0], cp_group=group)
        assert torch.equal(found, wanted)
