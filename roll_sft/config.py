"""The configuration of a run: frozen dataclasses and a strict build from a composed mapping.

Each key has one owner dataclass and one default, here; YAML overrides it and code never supplies
another. `build_config` puts a composed mapping into the dataclasses; it refuses unknown keys at
every level with the nearest real name, and wrong types, all of them at once. What the values may
be, alone and together, is in `checks.py`.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from roll_sft.errors import ConfigError
from roll_sft.layout import ParallelLayout

if TYPE_CHECKING:
    from omegaconf import DictConfig

# What people call some keys -> the key; too short for a search by likeness.
ABBREVIATIONS = {
    "lr": "train.learning_rate",
    "gbs": "train.global_batch_size",
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "world_size": "parallel.num_workers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """`model`: what is trained."""

    path: str | None = None  # local folder with config.json, safetensors and tokenizer
    tokenizer_path: str | None = None  # default: model.path
    dtype: str = "fp32"  # fp32 | bf16 (fp32 master weights and gradients)
    random_init: bool = False  # weights from the config and the seed alone
    trust_remote_code: bool = False
    attention_backend: str = "auto"  # auto | te | flash | varlen | sdpa
    compile: bool | None = None  # torch.compile of what is elementwise; null = where a GPU is


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One entry of `data.train` or `data.validation`."""

    path: str | None = None
    name: str | None = None  # default: the file's stem
    split: str | None = None
    weight: float = 1.0  # samples per epoch, as a multiple of those there are
    samples: int | None = None  # samples per epoch, as a number


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
    chat_template: str | None = (
        None  # null = the tokenizer's own; a Jinja file; a name: chatml, ...
    )
    sequence_length: int = 4096  # longest sample, unpadded tokens
    overlong: str = "drop"  # drop | truncate | error
    train_on: str = "assistant"  # assistant | last_assistant | all
    packing: bool = True
    num_proc: int | None = None  # processes that prepare data; null = by cores and size
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
    global_batch_tokens: int | None = None  # unpadded tokens per step; wins over global_batch_size
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
    save_steps: int | None = None  # null = by time alone, and at the end
    save_minutes: float | None = 30.0  # a checkpoint at least so often; null = by steps alone
    logging_steps: int = 1
    log_samples: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """`checkpoint`: what is written for later."""

    save: bool = True
    async_save: bool = False  # write in the background; training waits for a copy alone
    keep_last: int | None = 3  # newest checkpoints that are kept; null = all
    keep_best: str | None = None  # also the one with the lowest loss on this validation set
    verify: bool = True  # compare every file's SHA-256 before resuming; sizes always
    allow_changes: list[str] = field(default_factory=list)  # of the run, to go on all the same
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


def schema() -> "DictConfig":
    """Every key with its default, for Hydra to compose on.

    Without types: Hydra would stop at the first wrong one, and forgets where in a list it is.
    """
    from omegaconf import OmegaConf  # here and below: workers and GPU machines live without it

    node: DictConfig = OmegaConf.create(dataclasses.asdict(RunConfig()))
    return node


def build_config(composed: "DictConfig | dict[str, Any]") -> RunConfig:
    """The dataclasses with the values of `composed`, interpolations resolved.

    Raises one `ConfigError` with a line for each unknown key and each wrong type.
    """
    problems: list[str] = []
    config: RunConfig = _build(RunConfig, _resolved(composed), prefix="", problems=problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def plain_config(values: dict[str, Any]) -> RunConfig:
    """`build_config` in plain Python, for values that it has accepted before.

    They are those of `--cfg job --resolve`. Raises `ConfigError` for an unknown key; types are
    taken as they are.
    """
    config: RunConfig = _plain(RunConfig, values)
    return config


def layout_of(parallel: ParallelConfig) -> ParallelLayout:
    """The rank grid that `parallel` asks for."""
    return ParallelLayout(
        world_size=parallel.num_workers,
        tensor_size=parallel.tensor_model_parallel_size,
        pipeline_size=parallel.pipeline_model_parallel_size,
        context_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        virtual_size=parallel.virtual_pipeline_model_parallel_size or 1,
    )


def all_keys(cls: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys, `data.train.path` standing for the entries of the list."""
    for name, nested in _fields(cls):
        yield f"{prefix}{name}"
        if nested is not None:
            yield from all_keys(nested, f"{prefix}{name}.")


def nearest_key(key: str) -> str:
    """What to write instead of an unknown dotted key: the nearest real one, if any is near."""
    section, _, leaf = key.rpartition(".")
    if leaf in ABBREVIATIONS:
        return f"; did you mean `{ABBREVIATIONS[leaf]}`?"
    within = re.sub(r"\[\d+\]", "", section)  # all entries of a list have the same keys
    known = list(all_keys())
    siblings = [name for name in known if name.rpartition(".")[0] == within]
    # Where the section is right, a long one must not outweigh the part that is wrong.
    nearby = (leaf, _by_leaf(siblings)) if siblings else (key, {name: name for name in known})
    for word, candidates in (nearby, (leaf, _by_leaf(known))):
        if matches := difflib.get_close_matches(word, candidates, n=1, cutoff=0.5):
            found = candidates[matches[0]]
            is_sibling = found.startswith(f"{within}.")
            shown = f"{section}{found.removeprefix(within)}" if is_sibling else found
            return f"; did you mean `{shown}`?"
    return "; `--cfg job` prints all keys"


def _plain(cls: Any, values: Any) -> Any:
    nested, known = dict(_fields(cls)), {}
    kinds = {item.name: item.type for item in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in nested:
            raise ConfigError(f"{name}: no such key{nearest_key(name)}")
        if nested[name] is None:
            known[name] = float(value) if kinds[name] is float else value  # YAML reads 1e-8 as text
        elif isinstance(value, list):
            known[name] = [_plain(nested[name], entry) for entry in value]
        else:
            known[name] = _plain(nested[name], value)
    return cls(**known)


def _by_leaf(names: list[str]) -> dict[str, str]:
    """Last part of each dotted name -> the first name that ends with it."""
    return {name.rpartition(".")[2]: name for name in reversed(names)}


def _fields(cls: Any) -> Iterator[tuple[str, Any]]:
    """(name, nested dataclass or None) of each field; a list of dataclasses counts as nested."""
    for item in dataclasses.fields(cls):
        kind: Any = item.type
        inner = kind.__args__[0] if _is_list(kind) else kind
        yield item.name, inner if dataclasses.is_dataclass(inner) else None


def _is_list(kind: Any) -> bool:
    return getattr(kind, "__origin__", None) is list


def _resolved(composed: "DictConfig | dict[str, Any]") -> Any:
    """Plain values with interpolations resolved, over all defaults, which they may refer to."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    node = composed if isinstance(composed, DictConfig) else OmegaConf.create(composed)
    given: Any = OmegaConf.to_container(node, resolve=False)
    try:
        full = OmegaConf.create(_over(dataclasses.asdict(RunConfig()), given))
        return OmegaConf.to_container(full, resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "configuration"
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{key}: {reason}; mend the reference or write the value") from error


def _over(defaults: Any, values: Any) -> Any:
    """`values` over `defaults`, section by section; anything that is no section replaces."""
    if not (isinstance(defaults, dict) and isinstance(values, dict)):
        return values
    return {**defaults, **{key: _over(defaults.get(key), values[key]) for key in values}}


def _build(cls: Any, values: dict[Any, Any], *, prefix: str, problems: list[str]) -> Any:
    """An instance of `cls` with `values` over its defaults; adds what is wrong to `problems`."""
    from omegaconf import OmegaConf

    node = OmegaConf.structured(cls)
    OmegaConf.set_readonly(node, False)  # OmegaConf makes a frozen dataclass read-only
    kinds: dict[str, Any] = {item.name: item.type for item in dataclasses.fields(cls)}
    known, nested = dict(_fields(cls)), {}
    for name, value in values.items():
        full = f"{prefix}{name}"
        if name not in known:
            problems.append(f"{full}: no such key{nearest_key(full)}")
        elif known[name] is None:
            if not _fits(node, name, value=value, kind=kinds[name]):
                problems.append(f"{full}: {value!r} is not {_wanted(kinds[name])}")
        elif not _is_list(kinds[name]):
            nested[name] = _section(known[name], value, full=full, problems=problems)
        elif isinstance(value, list):
            nested[name] = [
                _section(known[name], entry, full=f"{full}[{index}]", problems=problems)
                for index, entry in enumerate(value)
            ]
        else:
            problems.append(f"{full}: {value!r} is not a list such as [{{path: my.jsonl}}]")
    built: Any = OmegaConf.to_object(node)
    return dataclasses.replace(built, **nested)


def _fits(node: "DictConfig", name: str, *, value: object, kind: Any) -> bool:
    """Put `value` into the typed `node`, if its type is right or can be read as the right one."""
    from omegaconf.errors import OmegaConfBaseException

    if value == "???" or (kind is bool and isinstance(value, int) and value not in (0, 1)):
        return False  # a blank to fill in, and a number that OmegaConf would read as true
    try:
        node[name] = value
    except OmegaConfBaseException:
        return False
    return True


def _section(cls: Any, value: Any, *, full: str, problems: list[str]) -> Any:
    if isinstance(value, dict):
        return _build(cls, value, prefix=f"{full}.", problems=problems)
    keys = ", ".join(name for name, _ in _fields(cls))
    problems.append(f"{full}: {value!r} is not a mapping; its keys are {keys}")
    return cls()


def _wanted(kind: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    parts = getattr(kind, "__args__", (kind,))
    if _is_list(kind):
        return f"a list of {names[parts[0]]}"
    return " or ".join(names.get(part, "null") for part in parts)


def source_name(source: SourceConfig) -> str:
    """The name of a source in reports and logs: its own, or what its path ends in.

    That is the last part that is no pattern, without the suffixes of a file.
    """
    parts = [
        part for part in (source.path or "").split("/") if part and not re.search(r"[*?[]", part)
    ]
    last = parts[-1] if parts else "data"
    return source.name or re.sub(r"(\.\w+)?\.(gz|zst)$|\.\w+$", "", last) or last
