"""Imports the engine without torch's compiler and without trackers, for ranks on CPUs."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Trackers, for Megatron's timers and inference: where they are missing it goes without.
OPTIONAL = ("wandb", "torch.utils.tensorboard")


def import_engine() -> None:
    """Import the engine, and Megatron-Core with it."""
    with compiler_left_out():
        importlib.import_module("roll_sft.engine.engine")


@contextlib.contextmanager
def compiler_left_out() -> Iterator[None]:
    """Within the block, importing Megatron-Core loads neither torch's compiler nor trackers.

    Megatron-Core decorates its fused functions with `torch.compile`, and loading that takes half of
    its import. `engine.build` turns these functions off. A run that compiles loads it when it does;
    one on CPUs does not, by default, and spares two seconds and 50 MB for each worker.
    """

    def as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return (lambda each: each) if function is None else function

    modules: dict[str, Any] = sys.modules
    missing = [name for name in OPTIONAL if name not in modules]
    original: Any = torch.compile
    try:
        modules |= dict.fromkeys(missing)  # None: `import` raises as for a package that is missing
        torch.compile = as_it_is  # type: ignore[assignment]
        _make_optimizers_without_compiler(torch.optim.Optimizer)
        yield
    finally:
        torch.compile = original
        for name in missing:
            modules.pop(name, None)


def _make_optimizers_without_compiler(optimizer: Any) -> None:
    """Let `optimizer` be made without the compiler, which torch loads to have it pass methods by.

    In torch/_compile.py a method that is called looks for its own form for the compiler first.
    Nothing that is compiled here calls an optimizer, so the method itself will do.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        plain = getattr(getattr(optimizer, name), "__wrapped__", None)
        if plain is not None and not hasattr(plain, "__dynamo_disable"):
            setattr(plain, "__dynamo_disable", plain)
