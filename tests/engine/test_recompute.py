"""A norm's output goes back to all that share its memory, without a compiler."""

import torch
from megatron.core.tensor_parallel import random

from roll_sft.engine.recompute import use_norm_recomputation


def test_what_is_computed_again_fills_the_freed_memory_of_every_view() -> None:
    use_norm_recomputation()
    output = torch.arange(12.0).view(3, 4)
    view, version = output.t(), output._version
    wanted = view.clone()
    output.untyped_storage().resize_(0)
    refill = random._share_storage_ext.share_storage  # which megatron-core 0.19 would compile
    refill(output, torch.arange(12.0).view(3, 4))
    assert torch.equal(view, wanted)
    assert output._version == version  # else autograd finds a tensor that it keeps changed
