"""Supervised fine-tuning of large language models on Ray and Megatron-Core."""

from typing import Any

__version__ = "0.1.0"  # pyproject.toml reads it here, and so does a checkout that is not installed

_OF_API = ("Result", "RunConfig", "load_config", "train")  # loaded with their first use


def __getattr__(name: str) -> Any:
    if name not in _OF_API:
        raise AttributeError(f"module 'roll_sft' has no attribute {name!r}")
    from roll_sft import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_API})
