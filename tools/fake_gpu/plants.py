"""Faults that the check must find, put into the engine of this process while a block runs."""

import contextlib
from typing import Any
from unittest.mock import patch

import torch

from roll_sft.engine import attention, build, loss


def planted(name: str) -> contextlib.AbstractContextManager[Any]:
    """The fault `name`, one of `PLANTS`."""
    holder, function, fault = PLANTS[name]
    return patch.object(holder, function, fault(getattr(holder, function)))


def _cpu_tensor(angles: Any) -> Any:
    """The angles of the rotation lie on the host."""

    def on_host(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(angles(positions, frequencies), device="cpu")

    return on_host


def _item(cross_entropy: Any) -> Any:
    """The forward of every pack reads its loss."""

    def read(*arguments: Any, **options: Any) -> torch.Tensor:
        losses: torch.Tensor = cross_entropy(*arguments, **options)
        losses.sum().item()
        return losses

    return read


def _synchronize(configure: Any) -> Any:
    """Every exchange between pipeline stages waits for the device."""

    def configured(*arguments: Any, **options: Any) -> Any:
        config = configure(*arguments, **options)
        config.batch_p2p_sync = True
        return config

    return configured


PLANTS = {
    "cpu-tensor": (attention, "rotary_angles", _cpu_tensor),
    "item": (loss, "cross_entropy_of_rows", _item),
    "synchronize": (build, "transformer_config", _synchronize),
}
