"""A tiny model of a configuration's family, on its layout, as far as this machine holds ranks.

The configuration file is the user's, with small sizes that every degree of the layout divides. The
weights are random; tokenizer and rows are those of the demonstration.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import psutil
import torch

from roll_sft.base.errors import ConfigError
from roll_sft.config.schema import ParallelConfig, RunConfig
from roll_sft.demo import demo

Device: TypeAlias = Literal["cpu", "cuda"]
RANK_GIB = 1.0  # memory of a rank on a CPU, most of it libraries
RANKS_PER_CORE = 4
HEAD_DIM, EXPERTS = 16, 4
LENGTH = 256  # tokens of a sample
DROPPED = ("quantization_config", "auto_map")  # of the real weights and their code
# An absent one would be the family's own, beyond the tiny vocabulary.
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
LISTS_OF_LAYERS = ("layer_types", "no_rope_layers", "mlp_layer_types")


def device_here(config: RunConfig) -> Device:
    """The device of the rehearsal: this machine's GPUs where the configuration may take them."""
    return "cuda" if config.parallel.device != "cpu" and torch.cuda.is_available() else "cpu"


def most_ranks(device: Device) -> int:
    """How many ranks this machine holds."""
    if device == "cuda":
        return torch.cuda.device_count()
    by_memory = int(psutil.virtual_memory().available / 2**30 / RANK_GIB)
    return max(1, min(by_memory, RANKS_PER_CORE * len(os.sched_getaffinity(0))))


def layout_for(parallel: ParallelConfig, *, most: int, device: Device) -> ParallelConfig:
    """`parallel` with two data-parallel ranks at most, and halved degrees until `most` ranks do."""
    names = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
    )
    degrees = {name: getattr(parallel, name) for name in names}
    tensor_size, stages, context_size = degrees.values()
    data_size = min(2, parallel.num_workers // (tensor_size * stages * context_size))
    while data_size * tensor_size * stages * context_size > most:
        largest = max(degrees, key=lambda name: int(degrees[name]))
        if degrees[largest] > 1:
            degrees[largest] //= 2
        elif data_size > 1:
            data_size = 1
        else:
            break
        tensor_size, stages, context_size = degrees.values()
    in_stage = data_size * tensor_size * context_size
    expert_size = parallel.expert_model_parallel_size
    while in_stage % expert_size:
        expert_size = max(1, expert_size // 2)
    virtual = parallel.virtual_pipeline_model_parallel_size
    return replace(
        parallel,
        **degrees,
        num_workers=in_stage * stages,
        expert_model_parallel_size=expert_size,
        virtual_pipeline_model_parallel_size=virtual if stages > 1 else None,
        sequence_parallel=parallel.sequence_parallel and tensor_size > 1,
        device=device,
        cpus_per_worker=1,
    )


def tiny_config(given: Mapping[str, Any], parallel: ParallelConfig) -> dict[str, Any]:
    """The config.json `given` of a model with small sizes that `parallel` can cut."""
    stages = parallel.pipeline_model_parallel_size
    num_layers = max(2, stages * (parallel.virtual_pipeline_model_parallel_size or 1))
    groups = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    heads = 2 * groups
    sizes = {
        "vocab_size": demo.VOCAB_SIZE,
        "hidden_size": HEAD_DIM * heads,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        # Latent attention has no groups.
        "num_key_value_heads": heads if given.get("kv_lora_rank") else groups,
        "intermediate_size": 2 * HEAD_DIM * heads,
        "max_position_embeddings": max(LENGTH, int(given.get("max_position_embeddings", 0))),
    }
    num_experts = max(EXPERTS, 2 * parallel.expert_model_parallel_size)
    smaller = {
        **dict.fromkeys(EXPERT_COUNTS, num_experts),
        "num_experts_per_tok": min(2, int(given.get("num_experts_per_tok") or 2)),
        "moe_intermediate_size": 2 * HEAD_DIM * parallel.tensor_model_parallel_size,
        "shared_expert_intermediate_size": 2 * HEAD_DIM * parallel.tensor_model_parallel_size,
        "first_k_dense_replace": min(1, int(given.get("first_k_dense_replace") or 0)),
        "n_group": 1,
        "topk_group": 1,
        "head_dim": HEAD_DIM,
    }
    config = {key: value for key, value in given.items() if key not in DROPPED}
    config |= {**sizes, **NO_TOKENS}
    config |= {key: value for key, value in smaller.items() if given.get(key) is not None}
    for key in LISTS_OF_LAYERS:
        if given.get(key):
            config[key] = [*given[key], *given[key] * num_layers][:num_layers]
    return config


def write_model(folder: Path, path: Path, parallel: ParallelConfig) -> list[str]:
    """Write model, tokenizer and rows into `folder`; returns the overrides that name them.

    `path` is the user's model. Raises `ConfigError` for a config.json that cannot be read.
    """
    try:
        given = json.loads((path / "config.json").read_text(encoding="utf-8"))
        tiny = tiny_config(given, parallel)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"model.path: {path}/config.json cannot be read: {error}") from error
    demo.write_assets(folder)
    own = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    tiny |= {key: own[key] for key in ("eos_token_id", "pad_token_id")}
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps(tiny), encoding="utf-8")
    return [
        f"model.path={folder / 'tiny'}",
        f"model.tokenizer_path={folder / 'model'}",
        "model.random_init=true",
        f"data.train=[{{path: {folder / 'train.jsonl'}}}]",
        f"data.validation=[{{path: {folder / 'validation.jsonl'}}}]",
        f"data.sequence_length={LENGTH}",
    ]
