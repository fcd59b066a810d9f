"""What configuration values may be, alone and together: every check that needs no machine.

All problems are reported at once, one line each: value, rule, remedy. Keys reserve more than is
built; `AVAILABLE` holds what works today, and the rest is refused by name.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

from roll_sft.config import DataConfig, ParallelConfig, RunConfig, SourceConfig, source_name
from roll_sft.errors import refuse

CHOICES = {
    "model.dtype": ("fp32", "bf16", "fp16"),
    "model.attention_backend": ("auto", "te", "flash", "varlen", "sdpa"),
    "data.overlong": ("drop", "truncate", "error"),
    "data.train_on": ("assistant", "last_assistant", "all"),
    "data.on_bad_row": ("error", "skip"),
    "parallel.device": ("auto", "cpu", "cuda"),
    "train.lr_scheduler_type": ("cosine", "linear", "constant", "wsd"),
    "train.recompute": ("none", "selective", "full"),
    "checkpoint.hf_export": ("none", "final", "every_save"),
    "lora.quantize_base": ("none", "nf4"),
}

# The values that work today, for keys that reserve more than is built.
AVAILABLE: dict[str, tuple[object, ...]] = {
    "model.dtype": ("fp32", "bf16"),
    "parallel.expert_model_parallel_size": (1,),
    "checkpoint.hf_export": ("none", "final"),
    "lora.rank": (0,),
    "lora.quantize_base": ("none",),
    "evaluation.prompts": (None,),
    "evaluation.metric_fn": (None,),
    "cluster.max_restarts": (0,),
}
# Parts of what is not available, which would change nothing in silence.
DEFAULT_ONLY = (
    "lora.alpha",
    "lora.dropout",
    "lora.target_modules",
    "evaluation.max_new_tokens",
    "evaluation.temperature",
)
# What may differ between a checkpoint and the run that goes on from it, if it is asked for.
RESUME_CHANGES = (
    "data", "tokenizer", "chat_template", "sequence_length", "global_batch_size", "seed",
    "schedule", "optimizer",
)  # fmt: skip
AVAILABLE_BACKENDS = ("jsonl", "mlflow")
RESERVED_BACKENDS = ("tensorboard", "wandb")

# key -> (smallest, is the smallest allowed); checked where the value is not None
LOWER_BOUNDS: dict[str, tuple[float, bool]] = {
    "seed": (0, True),
    "data.sequence_length": (2, True),
    "data.max_bad_fraction": (0, True),
    "data.num_proc": (1, True),
    "parallel.num_workers": (1, True),
    "parallel.tensor_model_parallel_size": (1, True),
    "parallel.pipeline_model_parallel_size": (1, True),
    "parallel.virtual_pipeline_model_parallel_size": (1, True),
    "parallel.context_parallel_size": (1, True),
    "parallel.cpus_per_worker": (1, True),
    "parallel.placement_timeout_s": (0, False),
    "train.num_train_epochs": (1, True),
    "train.max_steps": (1, True),
    "train.global_batch_size": (1, True),
    "train.global_batch_tokens": (1, True),
    "train.micro_batch_tokens": (1, True),
    "train.learning_rate": (0, False),
    "train.min_learning_rate": (0, True),
    "train.warmup_ratio": (0, True),
    "train.warmup_steps": (0, True),
    "train.wsd_decay_ratio": (0, True),
    "train.weight_decay": (0, True),
    "train.adam_beta1": (0, True),
    "train.adam_beta2": (0, True),
    "train.adam_eps": (0, False),
    "train.max_grad_norm": (0, True),
    "train.eval_steps": (1, True),
    "train.save_steps": (1, True),
    "train.save_minutes": (0, False),
    "train.logging_steps": (1, True),
    "checkpoint.keep_last": (2, True),  # the newest may be the one that a crash damages
    "cluster.step_timeout_s": (0, False),
    "cluster.setup_timeout_s": (0, False),
    "cluster.checkpoint_timeout_s": (0, False),
}
UPPER_BOUNDS = {  # exclusive for the betas, see below
    "seed": 2**32 - 1,  # what random generators take everywhere
    "data.max_bad_fraction": 1.0,
    "train.warmup_ratio": 1.0,
    "train.wsd_decay_ratio": 1.0,
}


def check_config(config: RunConfig) -> None:
    """Raise `ConfigError` with one line per value that cannot run, if there is any.

    What degrees may be together is in `layout_problems`, which joins the model's own limits.
    """
    refuse(list(_value_problems(config)))


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _value_problems(config: RunConfig) -> Iterator[str]:
    for key, allowed in CHOICES.items():
        if (value := _value(config, key)) not in allowed:
            yield f"{key}: {value!r} is not one of {', '.join(allowed)}"
    for key, available in AVAILABLE.items():
        value = _value(config, key)
        if value not in available and value in CHOICES.get(key, (value,)):
            yield f"{key}: {value!r} is not available in this version; use {available[0]!r}"
    for key in DEFAULT_ONLY:
        if (value := _value(config, key)) != (default := _value(RunConfig(), key)):
            yield f"{key}: {value!r} is not available in this version; leave it at {default!r}"
    yield from _bound_problems(config)
    yield from _other_problems(config)


def _bound_problems(config: RunConfig) -> Iterator[str]:
    for key, (bound, inclusive) in LOWER_BOUNDS.items():
        value = _value(config, key)
        if value is None:
            continue
        if not (value >= bound if inclusive else value > bound):
            yield f"{key}: {value} must be {'at least' if inclusive else 'above'} {bound:g}"
        elif math.isinf(value):
            yield f"{key}: {value} must be finite"
    for key, bound in UPPER_BOUNDS.items():
        if (value := _value(config, key)) > bound:
            yield f"{key}: {value} must be at most {bound}"


def _other_problems(config: RunConfig) -> Iterator[str]:
    train, data = config.train, config.data
    for key in ("adam_beta1", "adam_beta2"):
        if getattr(train, key) >= 1:
            yield f"train.{key}: {getattr(train, key)} must be below 1"
    if train.min_learning_rate > train.learning_rate:
        yield (
            f"train.min_learning_rate: {train.min_learning_rate} exceeds train.learning_rate"
            f" {train.learning_rate}; lower it"
        )
    if config.model.path is None:
        yield "model.path: missing; give a local folder with config.json and a tokenizer"
    if not data.train:
        yield "data.train: empty; give a list such as data.train=[{path: my.jsonl}]"
    if train.micro_batch_tokens is not None and train.micro_batch_tokens < data.sequence_length:
        yield (
            f"train.micro_batch_tokens: {train.micro_batch_tokens} is below data.sequence_length"
            f" {data.sequence_length}, so the longest sample would not fit; raise it"
        )
    if not re.fullmatch(r"[\w][\w.\-]*", config.run_name):
        yield f"run_name: {config.run_name!r} must be letters, digits, dot, dash and underscore"
    yield from _checkpoint_problems(config)
    yield from _backend_problems(config)
    yield from _source_problems(data)
    yield from _tracking_problems(config.tracking.backends)


def _checkpoint_problems(config: RunConfig) -> Iterator[str]:
    checkpoint, sets = config.checkpoint, [source_name(each) for each in config.data.validation]
    for name in checkpoint.allow_changes:
        if name not in RESUME_CHANGES:
            yield (f"checkpoint.allow_changes: {name!r} is not one of {', '.join(RESUME_CHANGES)}")
    if checkpoint.keep_best is not None and checkpoint.keep_best not in sets:
        known = ", ".join(sets) or "none is given"
        yield (
            f"checkpoint.keep_best: {checkpoint.keep_best!r} is no validation set ({known}); name"
            " one of data.validation"
        )
    if checkpoint.keep_best is not None and checkpoint.keep_last is None:
        yield (
            "checkpoint.keep_best: without checkpoint.keep_last every checkpoint is kept; set it,"
            " to 2 or more"
        )


def _tracking_problems(backends: list[str]) -> Iterator[str]:
    for name in backends:
        if name in RESERVED_BACKENDS:
            yield f"tracking.backends: {name!r} is not available in this version; use 'mlflow'"
        elif name not in AVAILABLE_BACKENDS:
            yield f"tracking.backends: {name!r} is not one of {', '.join(AVAILABLE_BACKENDS)}"


def _backend_problems(config: RunConfig) -> Iterator[str]:
    backend = config.model.attention_backend
    if backend not in ("te", "flash", "varlen"):
        return
    for key, value, wanted in (
        ("model.dtype", config.model.dtype, "bf16"),
        ("parallel.device", config.parallel.device, "cuda"),
    ):
        if value in ("fp32", "cpu"):
            yield (
                f"model.attention_backend: {backend!r} does not run with {key}={value}; choose"
                f" {key}={wanted}, or sdpa"
            )


def _source_problems(data: DataConfig) -> Iterator[str]:
    for group in ("train", "validation"):
        names: set[str] = set()
        for index, source in enumerate(getattr(data, group)):
            where = f"data.{group}[{index}]"
            if not source.path:
                yield f"{where}.path: missing; give a file, a folder or a hub dataset"
                continue
            yield from _share_problems(source, where=where, is_trained=group == "train")
            name = source_name(source)
            if name in names:
                yield f"{where}.name: {name!r} is used twice; give each source its own name"
            names.add(name)


def _share_problems(source: SourceConfig, *, where: str, is_trained: bool) -> Iterator[str]:
    """What is wrong with how much of a source an epoch draws."""
    if not (source.weight > 0 and math.isfinite(source.weight)):
        yield f"{where}.weight: {source.weight} must be above 0 and finite; leave the source out"
    if source.samples is not None and source.samples < 1:
        yield f"{where}.samples: {source.samples} must be at least 1; leave the source out"
    if source.weight != 1.0 and source.samples is not None:
        yield (
            f"{where}: weight={source.weight} and samples={source.samples} both say how much an"
            " epoch draws of it; set one of them"
        )
    if not is_trained and (source.weight != 1.0 or source.samples is not None):
        key = "weight" if source.weight != 1.0 else "samples"
        yield (
            f"{where}.{key}: {getattr(source, key)} is for data.train; a validation set is always"
            " used whole, so leave it out"
        )


def layout_problems(parallel: ParallelConfig) -> Iterator[str]:
    """What is wrong with the degrees of `parallel` by themselves."""
    degrees = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "cp": parallel.context_parallel_size,
    }
    if min(degrees.values()) < 1 or parallel.num_workers < 1:
        return  # reported as lower bounds
    product = degrees["tp"] * degrees["pp"] * degrees["cp"]
    if parallel.num_workers % product:
        yield (
            f"parallel: tp*pp*cp = {product} does not divide num_workers {parallel.num_workers};"
            f" choose degrees whose product divides {parallel.num_workers}, or set"
            f" parallel.num_workers to a multiple of {product}"
        )
    if parallel.sequence_parallel and degrees["tp"] == 1:
        yield (
            "parallel.sequence_parallel: true needs tensor_model_parallel_size above 1, which is 1;"
            " raise it or set sequence_parallel=false"
        )
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual is not None and virtual > 1 and degrees["pp"] == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size: {virtual} interleaves the stages of a"
            " pipeline, and pipeline_model_parallel_size is 1; raise it or set the virtual one null"
        )
