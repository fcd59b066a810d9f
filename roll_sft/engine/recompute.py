"""Recomputation of norms without Transformer Engine, and without a C++ compiler.

Megatron-Core frees the output of a norm and computes it again for the backward. Whether that ran
under fp8 it asks Transformer Engine, whatever the dtype of the run: `CheckpointWithoutOutput` takes
fp8=False for a set value. Without the package those names are not bound, and the first layer fails.

What is computed again goes back into the memory of the freed output. From 0.19 on Megatron-Core
compiles a C++ function for that, in the first backward of each rank, which needs ninja and a
compiler on every node. Before it copied, and so it does here.
"""

import contextlib
from types import SimpleNamespace
from typing import Any

import torch


def use_norm_recomputation() -> None:
    """Bind the names that Megatron's recomputation of norms asks for.

    Those of Transformer Engine are bound where the package is installed, and stay.
    """
    from megatron.core.tensor_parallel import random

    module: Any = random
    if not random.HAVE_TE:
        module.FP8GlobalStateManager = _NoFp8
        module.activation_recompute_forward = module.fp8_autocast = _unchanged
    module._share_storage_ext = SimpleNamespace(share_storage=_refill)  # unknown before 0.19


def _refill(freed: torch.Tensor, computed: torch.Tensor) -> None:
    """Give `freed`, and all that share its storage, the numbers of `computed`, of its shape.

    Below autograd, which would else find a tensor that it keeps changed.
    """
    source, target = computed.untyped_storage(), freed.untyped_storage()
    target.resize_(source.size())
    target.copy_(source)


class _NoFp8:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _unchanged(**_: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()
