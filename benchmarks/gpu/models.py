"""What is trained on one GPU: shapes, samples of random tokens, weights of random numbers."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen2Config

from roll_sft.config.build import build_config
from roll_sft.config.schema import RunConfig
from roll_sft.job.memory import GIB, MemoryEstimate, estimate
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import family_of

# Hidden, ffn, layers, heads, key-value heads, tied, and the share of the measured peak to reach.
SHAPES = {
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, True, 0.35),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, True, 0.45),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2, True, 0.48),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, False, 0.52),
}
TINY = {"tiny": (64, 128, 2, 4, 2, True, 0.0)}
ROOM = 0.9  # of the device, for what the plan estimates


class Tokens:
    """Samples of random tokens, of the given lengths, the second half of each supervised."""

    weights = None  # all count the same

    def __init__(self, lengths: NDArray[np.int32], vocab_size: int) -> None:
        self.lengths, self.supervised = lengths, (lengths // 2).astype(np.int32)
        self._vocab_size = vocab_size

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Token ids and label mask of sample `index`."""
        length, draw = int(self.lengths[index]), np.random.default_rng(index)
        mask = np.zeros(length, np.uint8)
        mask[length - 1 - int(self.supervised[index]) : length - 1] = 1
        return draw.integers(0, self._vocab_size, length, dtype=np.int32), mask


class Weights:
    """Random weights, drawn on the device in bf16, which a host would take minutes for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._like = {"device": torch.cuda.current_device(), "dtype": torch.bfloat16}

    def names(self) -> frozenset[str]:
        """All of the family's."""
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor `name`."""
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, bf16 on the device."""
        tensor = torch.empty(self._shapes[name], **self._like)
        return tensor.fill_(1.0) if name.endswith("norm.weight") else tensor.normal_(0, 0.02)

    def read_slice(self, name: str, *, dim: int, start: int, stop: int) -> torch.Tensor:
        """Part of the tensor `name`."""
        return self.read(name).narrow(dim, start, stop - start)


def log_normal(longest: int) -> NDArray[np.int32]:
    """Lengths as of real data: 4,000, half of them below 368."""
    draws = np.random.default_rng(0).lognormal(np.log(368), 1.05, 4000)
    return np.clip(draws, 16, longest).astype(np.int32)


def run_of(device: str, *, longest: int, pack_tokens: int) -> RunConfig:
    """A run in bf16 of samples of `longest` tokens at most, in packs of `pack_tokens`."""
    return build_config(
        {
            "model": {"dtype": "bf16"},
            "parallel": {"device": device},
            "data": {"sequence_length": longest},
            "train": {"micro_batch_tokens": pack_tokens},
        }
    )


def config_of(numbers: tuple[Any, ...], run: RunConfig, *, memory_bytes: float) -> Qwen2Config:
    """The model of `numbers`, with as many layers as `memory_bytes` have room for."""
    hidden, ffn, layers, heads, groups, tied, _goal = numbers
    config = Qwen2Config(
        vocab_size=151_936 if hidden > 64 else 1000,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=32_768,
        tie_word_embeddings=tied,
        architectures=["Qwen2ForCausalLM"],
    )
    shape = family_of(config).shape(config)
    while layers > 1 and estimate_of(shape, run, layers).total_gib * GIB > ROOM * memory_bytes:
        layers -= 1
    config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
    return config


def estimate_of(shape: ModelShape, run: RunConfig, layers: int) -> MemoryEstimate:
    """What a plan says of the memory of one GPU, for `layers` of `shape`."""
    shape = replace(shape, num_layers=layers)
    return estimate(run, shape)
