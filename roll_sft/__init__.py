"""Supervised fine-tuning of large language models on Ray and Megatron-Core."""

from types import ModuleType
from typing import Any

import roll_sft.train as _train_room

__version__ = "0.1.0"  # pyproject.toml reads it here, and so does a checkout that is not installed

_OF_API = ("Result", "RunConfig", "load_config")  # loaded with their first use


def __getattr__(name: str) -> Any:
    if name not in _OF_API:
        raise AttributeError(f"module 'roll_sft' has no attribute {name!r}")
    from roll_sft import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_API})


class _TrainRoom(ModuleType):
    """The package `roll_sft.train`, which is also the function of that name.

    Importing any module of the package binds the name to the package, so it has to be both.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        """See `roll_sft.api.train`."""
        from roll_sft import api

        return api.train(*args, **options)


_train_room.__class__ = _TrainRoom
