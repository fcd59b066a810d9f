"""Whether numbers are finite, in one pass over them and one wait for their device."""

import math
from collections.abc import Iterable

import torch

from roll_sft.base.errors import CheckpointError, ConfigError


class NotFiniteError(CheckpointError):
    """A tensor of a model holds NaN or infinity; the message names it."""


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise `NotFiniteError` if `tensor`, called `name`, holds NaN or infinity."""
    found = first_not_finite([(name, tensor)])
    if found is not None:
        raise NotFiniteError(f"{found} is NaN or infinite")


def rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor`, called `name`, in `dtype`, and finite.

    Raises `NotFiniteError` where it was not, `ConfigError` for numbers that `dtype` does not reach.
    """
    result = tensor.to(dtype)
    if first_not_finite([(name, result)]):
        check_finite(name, tensor)
        largest, limit = float(tensor.abs().max()), torch.finfo(dtype).max
        raise ConfigError(
            f"dtype: {name} holds {largest:.4g}, and {str(dtype).removeprefix('torch.')} ends at"
            f" {limit:.4g}; take bf16 or fp32"
        )
    return result


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The first of the named tensors that holds NaN or infinity, as `name (2 of 64 numbers)`.

    None if all are finite. Tensors are floating point, of any shape, and all on one device, which
    is waited for once. Not collective: each rank learns of its own.
    """
    named = [(name, tensor.detach()) for name, tensor in tensors if tensor.numel()]
    if not named:
        return None
    # Smallest and largest: NaN passes through both, and unlike a sum neither can overflow.
    extremes = [value.float() for _, tensor in named for value in torch.aminmax(tensor)]
    values: list[float] = torch.stack(extremes).tolist()
    for (name, tensor), low, high in zip(named, values[::2], values[1::2], strict=True):
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = tensor.numel() - int(tensor.isfinite().sum())
            return f"{name} ({bad:,} of {tensor.numel():,} numbers)"
    return None
