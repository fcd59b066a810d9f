"""Recomputation of norms without Transformer Engine.

Megatron-Core frees the output of a norm and computes it again for the backward. Whether that ran
under fp8 it asks Transformer Engine, whatever the dtype of the run: `CheckpointWithoutOutput` takes
fp8=False for a set value. Without the package those names are not bound, and the first layer fails.
"""

import contextlib
from typing import Any


def use_norm_recomputation() -> None:
    """Bind the names of Transformer Engine that Megatron's recomputation of norms asks for.

    Where the package is installed they are bound, and nothing is changed.
    """
    from megatron.core.tensor_parallel import random

    if not random.HAVE_TE:
        module: Any = random
        module.FP8GlobalStateManager = _NoFp8
        module.activation_recompute_forward = module.fp8_autocast = _unchanged


class _NoFp8:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _unchanged(**_: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()
