"""Imports the engine without torch's compiler, for ranks on CPUs."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def import_engine() -> None:
    """Import the engine, and Megatron-Core with it."""
    with compiler_left_out():
        importlib.import_module("roll_sft.engine.engine")


@contextlib.contextmanager
def compiler_left_out() -> Iterator[None]:
    """Within the block, importing Megatron-Core does not load torch's compiler.

    Megatron-Core decorates its fused functions with `torch.compile`, and loading that takes half of
    its import. `engine.build` turns these functions off. A run that compiles loads it when it does;
    one on CPUs does not, by default, and spares a second and 50 MB for each worker.
    """

    def as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return (lambda each: each) if function is None else function

    original: Any = torch.compile
    torch.compile = as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original
