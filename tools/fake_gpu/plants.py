"""Faults that the check must find: `--plant NAME`."""

from typing import Any

import torch

from roll_sft.engine import attention, build, loss


def plant(name: str) -> None:
    """Put the fault `name` into the engine of this process. Raises `SystemExit`."""
    known = {"cpu-tensor": _cpu_tensor, "item": _item, "synchronize": _synchronize}
    if name not in known:
        raise SystemExit(f"--plant {name}: known are {', '.join(known)}")
    known[name]()


def _cpu_tensor() -> None:
    """The angles of the rotation are computed on the host."""
    angles = attention.rotary_angles

    def on_host(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(angles(positions, frequencies), device="cpu")

    attention.rotary_angles = on_host


def _item() -> None:
    """The forward of every pack reads its loss."""
    cross_entropy = loss.cross_entropy_of_rows

    def read(*arguments: Any, **options: Any) -> torch.Tensor:
        losses = cross_entropy(*arguments, **options)
        losses.sum().item()
        return losses

    loss.cross_entropy_of_rows = read


def _synchronize() -> None:
    """Every exchange between pipeline stages waits for the device."""
    configure = build.transformer_config

    def configured(*arguments: Any, **options: Any) -> Any:
        config = configure(*arguments, **options)
        config.batch_p2p_sync = True
        return config

    build.transformer_config = configured
