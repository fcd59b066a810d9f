"""A run in a program that is not ours: what it changes there is put back when it ends.

Ray, MLflow and this package change variables of the environment, hooks, log handlers and stderr,
some of them on import. Promise: after the block these are as before, in whatever thread it runs.
Variables of other names, which another thread may set meanwhile, are left alone.
"""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Iterator

from roll_sft.base.console import set_up_logging

# Beginnings of the names that the libraries of a run set.
_VARIABLES = (
    *(
        "RAY_",
        "MLFLOW_",
        "WANDB_",
        "HF_",
        "HYDRA_",
        "DO_NOT_TRACK",
        "TOKENIZERS_",
        "PYTHONBREAKPOINT",
    ),
    *("OMP_", "CUDA_", "NCCL_", "TORCH"),
)
_LOGGERS = ("", "roll_sft", "ray", "mlflow", "alembic", "sqlalchemy")


@contextlib.contextmanager
def as_guest() -> Iterator[None]:
    """Put back after the block what a run changes in this process."""
    with contextlib.ExitStack() as stack:
        for keep in (_variables, _hooks, _loggers, _stderr):
            stack.enter_context(keep())
        yield


@contextlib.contextmanager
def log_shown() -> Iterator[None]:
    """Show the package's log as the commands do, unless the program has a handler for it."""
    if not logging.getLogger("roll_sft").handlers:
        set_up_logging()
    yield


@contextlib.contextmanager
def _variables() -> Iterator[None]:
    def ours() -> dict[str, str]:
        return {name: each for name, each in os.environ.items() if name.startswith(_VARIABLES)}

    before = ours()
    try:
        yield
    finally:
        for name in ours().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _hooks() -> Iterator[None]:
    hooks = (sys.excepthook, sys.unraisablehook, threading.excepthook)
    finds_faults = faulthandler.is_enabled()
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
        if faulthandler.is_enabled() and not finds_faults:
            faulthandler.disable()


@contextlib.contextmanager
def _loggers() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(each.handlers[:], each.level, each.propagate, each.disabled) for each in loggers]
    try:
        yield
    finally:
        for logger, (handlers, level, propagate, disabled) in zip(loggers, before, strict=True):
            logger.handlers[:] = handlers
            logger.setLevel(level)
            logger.propagate, logger.disabled = propagate, disabled


@contextlib.contextmanager
def _stderr() -> Iterator[None]:
    """A cluster that cannot be joined goes on writing there, and is made silent."""
    stream, copy = sys.stderr, os.dup(2)
    try:
        yield
    finally:
        sys.stderr = stream
        if not os.path.samestat(os.fstat(copy), os.fstat(2)):
            os.dup2(copy, 2)
        os.close(copy)
