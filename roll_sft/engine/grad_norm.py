"""The norm of many gradients and their clipping, on the device.

Without Transformer Engine and Apex, Megatron-Core takes the norm of each gradient and reads it on
the host, one after another: as many waits for the device a step as there are parameters. torch adds
them up where they are, so that the norm of the step is the one value that is read.
"""

from typing import Any

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads


def install() -> None:
    """Make this process's optimizers use the functions below where Megatron has only its own."""
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = norm_of_all
        clip_grads.multi_tensor_scale_impl = scale_all


def norm_of_all(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], *_: Any
) -> tuple[torch.Tensor, None]:
    """Euclidean norm [1] over the one list in `tensor_lists`; what Megatron's own returns."""
    (gradients,) = tensor_lists
    return torch.nn.utils.get_total_norm(gradients).reshape(1), None


def scale_all(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], scale: float
) -> None:
    """Multiply the gradients by `scale` in place; both lists of `tensor_lists` hold them.

    Megatron's own copies each gradient through a temporary: twice the traffic.
    """
    gradients, results = tensor_lists
    assert all(a is b for a, b in zip(gradients, results, strict=True)), "clipping is in place"
    torch._foreach_mul_(gradients, scale)
