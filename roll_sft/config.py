"""The configuration of a run: frozen dataclasses and a strict build from a composed mapping.

Each key has one owner dataclass and one default, here; YAML overrides it and code never supplies
another. `build_config` merges a composed mapping into the dataclasses, refuses unknown keys at
every level with the nearest real name, and refuses wrong types. What the values may be, alone and
together, is in `checks.py`.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from roll_sft.errors import ConfigError
from roll_sft.layout import ParallelLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """`model`: what is trained."""

    path: str | None = None  # local folder with config.json, safetensors and tokenizer
    tokenizer_path: str | None = None  # default: model.path
    dtype: str = "fp32"  # fp32 | bf16 (fp32 master weights and gradients)
    random_init: bool = False  # weights from the config and the seed alone
    trust_remote_code: bool = False
    attention_backend: str = "auto"  # auto | te | flash | varlen | sdpa


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One entry of `data.train` or `data.validation`."""

    path: str | None = None
    name: str | None = None  # default: the file's stem
    split: str | None = None
    weight: float = 1.0  # rows per epoch, as a multiple
    samples: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """`data`: what it is trained on."""

    train: list[SourceConfig] = field(default_factory=list)
    validation: list[SourceConfig] = field(default_factory=list)
    prompt_key: str | None = None  # null = detect, here and below
    query_key: str | None = None
    response_key: str | None = None
    system_key: str | None = None
    messages_key: str | None = None
    text_key: str | None = None
    tools_key: str | None = None
    chat_template: str | None = None  # null = the tokenizer's own
    sequence_length: int = 4096  # longest sample, unpadded tokens
    overlong: str = "drop"  # drop | truncate | error
    train_on: str = "assistant"  # assistant | last_assistant | all
    packing: bool = True
    num_proc: int = 1
    cache_dir: str | None = None  # default: ~/.cache/roll_sft
    on_bad_row: str = "error"  # error | skip
    max_bad_fraction: float = 0.01  # of malformed rows, under on_bad_row=skip
    shuffle: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """`parallel`: how it is spread over workers."""

    num_workers: int = 1  # world size: one worker per GPU
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    device: str = "auto"  # auto | cpu | cuda
    cpus_per_worker: int = 1
    placement_timeout_s: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """`train`: the optimisation."""

    num_train_epochs: int = 1
    max_steps: int | None = None  # wins over num_train_epochs
    global_batch_size: int = 128  # samples per optimizer step
    micro_batch_tokens: int | None = None  # padded tokens per pack; default: sequence_length
    learning_rate: float = 1e-5
    min_learning_rate: float = 0.0
    lr_scheduler_type: str = "cosine"  # cosine | linear | constant | wsd
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None  # wins over warmup_ratio
    wsd_decay_ratio: float = 0.1
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0  # 0 = no clipping
    recompute: str = "none"  # none | selective | full
    eval_steps: int | None = None  # null = only at the end, when there is validation data
    save_steps: int | None = None  # null = only at the end
    logging_steps: int = 1
    log_samples: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """`checkpoint`: what is written for later."""

    save: bool = True
    async_save: bool = False
    keep_last: int | None = None
    keep_best: str | None = None
    verify: bool = False
    save_optimizer: bool = True
    hf_export: str = "final"  # none | final | every_save


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """`lora`: low-rank adapters; rank 0 = off."""

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=list)
    quantize_base: str = "none"  # none | nf4


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """`evaluation`: generation during training."""

    prompts: str | None = None
    metric_fn: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """`tracking`: where metrics go besides `steps.jsonl`."""

    backends: list[str] = field(default_factory=lambda: ["jsonl", "mlflow"])
    mlflow_uri: str | None = None  # default: sqlite file mlflow.db beside the run folders
    experiment: str = "roll_sft"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """`cluster`: the Ray cluster and its deadlines."""

    address: str | None = None  # null and no RAY_ADDRESS = a cluster of our own
    max_restarts: int = 0
    step_timeout_s: float = 1800.0
    setup_timeout_s: float = 900.0
    checkpoint_timeout_s: float = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything a run is told."""

    output_dir: str | None = None  # default: outputs/<run_name>
    run_name: str = "sft"
    seed: int = 42
    dry_run: bool = False
    prepare_only: bool = False
    deterministic: bool = False
    resume: str = "auto"  # auto | none | a step folder
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def schema() -> DictConfig:
    """The dataclasses as a mutable OmegaConf node: types and defaults, open to merging."""
    node: DictConfig = OmegaConf.structured(RunConfig)
    _unfreeze(node)
    return node


def build_config(composed: DictConfig | dict[str, Any]) -> RunConfig:
    """Merge `composed` into the dataclasses.

    Raises `ConfigError` for unknown keys and wrong types.
    """
    mapping = composed if isinstance(composed, DictConfig) else OmegaConf.create(composed)
    unknown = list(_unknown_keys(mapping))
    if unknown:
        raise ConfigError("; ".join(unknown))
    try:
        config = OmegaConf.to_object(OmegaConf.merge(schema(), mapping))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "configuration"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, RunConfig), f"merge gave {type(config)}"
    return config


def layout_of(parallel: ParallelConfig) -> ParallelLayout:
    """The rank grid that `parallel` asks for."""
    return ParallelLayout(
        world_size=parallel.num_workers,
        tensor_size=parallel.tensor_model_parallel_size,
        pipeline_size=parallel.pipeline_model_parallel_size,
        context_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
    )


def all_keys(cls: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys, `data.train.path` standing for the entries of the list."""
    for name, nested in _fields(cls):
        yield f"{prefix}{name}"
        if nested is not None:
            yield from all_keys(nested, f"{prefix}{name}.")


def nearest_key(key: str) -> str:
    """`; did you mean ...` for an unknown dotted key, or an empty string."""
    known = list(all_keys())
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if not matches:  # right name in the wrong section, or a typo in the last part alone
        leaf = key.rsplit(".", 1)[-1]
        leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
        matches = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)]
    return f"; did you mean `{matches[0]}`?" if matches else ""


def _fields(cls: Any) -> Iterator[tuple[str, Any]]:
    """(name, nested dataclass or None) of each field; a list of dataclasses counts as nested."""
    for item in dataclasses.fields(cls):
        kind: Any = item.type
        inner = getattr(kind, "__args__", (None,))[0] if not isinstance(kind, type) else kind
        if getattr(kind, "__origin__", None) is list:
            inner = kind.__args__[0]
        yield item.name, inner if dataclasses.is_dataclass(inner) else None


def _unfreeze(node: Any) -> None:
    # OmegaConf makes a frozen dataclass a read-only node, which then refuses the merge itself.
    if isinstance(node, DictConfig | ListConfig):
        OmegaConf.set_readonly(node, None)
        if isinstance(node, DictConfig) and not node._is_none():
            for key in node:
                _unfreeze(node._get_node(key))


def _unknown_keys(node: DictConfig, cls: type = RunConfig, prefix: str = "") -> Iterator[str]:
    known = dict(_fields(cls))
    for key in node:
        name = str(key)
        full = f"{prefix}{name}"
        if name not in known:
            yield f"{full}: no such key{nearest_key(full)}"
            continue
        nested, child = known[name], node._get_node(key)
        if nested is None:
            continue
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _unknown_keys(child, nested, f"{full}.")
        elif isinstance(child, ListConfig):
            for entry in child._iter_ex(resolve=False):
                if isinstance(entry, DictConfig):
                    yield from _unknown_keys(entry, nested, f"{full}.")


def source_name(source: SourceConfig) -> str:
    """The name of a source in reports and logs: its own, or the stem of its file."""
    return source.name or re.sub(r"\.\w+$", "", (source.path or "").rstrip("/").split("/")[-1])
