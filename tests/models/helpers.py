"""Tiny transformers models, configurations on disk, and tensors in memory."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from roll_sft.models.files.config_file import load_hf_config
from roll_sft.models.files.safetensors_in import Shape

SIZES: dict[str, Any] = {
    "vocab_size": 2053,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose norms and biases are random too, or a wrong map of them would not show."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.3)
    return model


def config_from_disk(folder: Path, written: dict[str, Any]) -> PreTrainedConfig:
    """`written` as config.json in `folder`, opened as a run opens it."""
    (folder / "config.json").write_text(json.dumps(written))
    return load_hf_config(str(folder), trust_remote_code=False)


class MemorySource:
    """Tensors from a dictionary; counts the bytes it hands out."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.num_bytes_read = 0

    def __str__(self) -> str:
        return "somewhere"

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> Shape:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        self.num_bytes_read += self.tensors[name].nbytes
        return self.tensors[name]

    def read_slice(self, name: str, *, start: int, stop: int, dim: int) -> torch.Tensor:
        assert 0 <= start <= stop <= self.tensors[name].shape[dim], (name, start, stop)
        part = self.tensors[name].narrow(dim, start, stop - start)
        self.num_bytes_read += part.nbytes
        return part
