"""Whether the numbers of a model's tensors are finite."""

import math

import torch

from roll_sft.base.errors import CheckpointError, ConfigError


class NotFiniteError(CheckpointError):
    """A tensor of a model holds NaN or infinity; the message names it."""


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise `NotFiniteError` if `tensor`, called `name`, holds NaN or infinity.

    One pass over a floating point tensor of any shape.
    """
    if tensor.numel() == 0:
        return
    # Smallest and largest: NaN passes through both, and unlike a sum neither can overflow.
    if all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor.detach())):
        return
    num_bad = tensor.numel() - int(tensor.isfinite().sum())
    raise NotFiniteError(f"{name} ({num_bad:,} of {tensor.numel():,} numbers) is NaN or infinite")


def rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor`, called `name`, in `dtype`, and finite.

    Raises `NotFiniteError` if `tensor` is not finite, `ConfigError` for numbers beyond `dtype`.
    """
    result = tensor.to(dtype)
    try:
        check_finite(name, result)
    except NotFiniteError:
        check_finite(name, tensor)
        largest, limit = float(tensor.abs().max()), torch.finfo(dtype).max
        raise ConfigError(
            f"dtype: {name} holds {largest:.4g}, and {str(dtype).removeprefix('torch.')} ends at"
            f" {limit:.4g}; take bf16 or fp32"
        ) from None
    return result
