"""The configuration of a run: frozen dataclasses, one for each section.

Each key stands here once, with its type, its default, its bounds and one sentence that says what it
does. YAML overrides a default; code never supplies another. `docs/configuration.md` and `--help`
are generated from these lines.
"""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from roll_sft.base.layout import ParallelLayout
from roll_sft.base.text import without_credentials
from roll_sft.config.cluster import ClusterConfig
from roll_sft.config.debug import DebugConfig
from roll_sft.config.evaluation import EvaluationConfig
from roll_sft.config.export import ExportConfig
from roll_sft.config.keys import key
from roll_sft.config.lora import LoraConfig
from roll_sft.config.moe import MoeConfig
from roll_sft.config.recipes import RecipeKeys, ScheduleKind
from roll_sft.config.tracking import TrackingConfig

RecomputeModule: TypeAlias = Literal["core_attn", "mlp", "layernorm"]  # of Megatron's
# What may differ between a checkpoint and the run that goes on from it, if it is asked for.
ResumeChange: TypeAlias = Literal[
    "data", "tokenizer", "chat_template", "template_kwargs", "sequence_length",
    "global_batch_size", "seed", "schedule", "optimizer",
]  # fmt: skip
RESUME_CHANGES: tuple[str, ...] = get_args(ResumeChange)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model that is trained."""

    path: str | None = key(
        None, "Local folder with config.json, safetensors and a tokenizer, or a hub id; required."
    )
    tokenizer_path: str | None = key(None, "Folder or hub id of the tokenizer; null: model.path.")
    dtype: Literal["auto", "fp32", "bf16"] = key(
        "auto",
        "Type of weights and activations: auto is bf16 on GPUs and fp32 on CPUs; gradients and"
        " master weights are always fp32.",
    )
    random_init: bool = key(False, "Start from random weights, of config.json and seed alone.")
    trust_remote_code: bool = key(
        False, "Run Python code that the model's folder brings; needs a local folder."
    )
    attention_backend: Literal["auto", "te", "fa3", "flash", "varlen", "sdpa"] = key(
        "auto",
        "Attention kernel: Transformer Engine, flash-attention 3 or 2, torch's varlen or SDPA;"
        " auto takes the first that works.",
    )
    compile: bool | None = key(None, "Compile element-wise operations; null: on GPUs only.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """The keys of each entry of data.train and data.validation."""

    path: str | None = key(
        None,
        "File, folder, pattern or URL of JSON(L), Parquet or Arrow, or a hub dataset; required.",
    )
    name: str | None = key(
        None, "Name in reports, logs and metrics; null takes the last part of the path."
    )
    split: str | None = key(None, "Split to read of a dataset that has several.")
    weight: float = key(
        1.0,
        "Samples that an epoch draws, as a multiple of those there are; data.train only.",
        above=0,
        at_most=1000,
    )
    samples: int | None = key(
        None,
        "Samples that an epoch draws, as a number; data.train only, excludes weight.",
        unit="samples",
        at_least=1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The data, and how rows become samples."""

    train: list[SourceConfig] = key([], "Sources to train on; required.")
    validation: list[SourceConfig] = key([], "Sources to evaluate on, each with its own loss.")
    prompt_key: str | None = key(None, "Column of the user's prompt; null detects it.")
    query_key: str | None = key(None, "Column that follows it on a new line; null detects it.")
    response_key: str | None = key(None, "Column of the answer; null detects it.")
    system_key: str | None = key(None, "Column of the system message; null detects it.")
    messages_key: str | None = key(None, "Column of whole conversations; null detects it.")
    text_key: str | None = key(None, "Column of plain text to train on whole; null detects it.")
    tools_key: str | None = key(None, "Column of tool definitions; null detects it.")
    chat_template: str | None = key(
        None, "Jinja file or the name of a built-in template; null takes the tokenizer's own."
    )
    template_kwargs: dict[str, Any] = key(
        {}, "Variables of the chat template, such as enable_thinking; those of a row win."
    )
    sequence_length: int = key(4096, "Longest sample, without padding.", unit="tokens", at_least=2)
    overlong: Literal["drop", "truncate", "error"] = key(
        "drop", "What happens to samples longer than sequence_length."
    )
    train_on: Literal["assistant", "last_assistant", "all"] = key(
        "assistant", "Turns that the loss covers."
    )
    packing: bool = key(
        True, "Put several samples into a micro-batch; false changes speed, never the loss."
    )
    num_proc: int | None = key(
        None,
        "Processes that prepare data; null decides by cores and size.",
        unit="processes",
        at_least=1,
    )
    cache_dir: str | None = key(
        None,
        "Folder of tokens that all nodes see; null takes ~/.cache/roll_sft, on a joined cluster"
        " .token_cache beside output_dir.",
    )
    on_bad_row: Literal["error", "skip"] = key("error", "What happens at a malformed row.")
    max_bad_fraction: float = key(
        0.01,
        "Largest share of malformed rows under on_bad_row=skip before the run stops.",
        at_least=0,
        at_most=1,
    )
    shuffle: bool = key(True, "Shuffle the samples anew in each epoch, by seed.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the model and the data are spread over workers."""

    num_workers: int = key(1, "World size; a GPU or CPUs each.", unit="workers", at_least=1)
    tensor_model_parallel_size: int = key(1, "Ranks that share a matrix.", unit="ranks", at_least=1)
    pipeline_model_parallel_size: int = key(1, "Stages of the layers.", unit="stages", at_least=1)
    virtual_pipeline_model_parallel_size: int | None = key(
        None,
        "Interleaved chunks of layers on each stage; null does not interleave.",
        unit="chunks",
        at_least=1,
    )
    context_parallel_size: int = key(1, "Ranks that share each sequence.", unit="ranks", at_least=1)
    expert_model_parallel_size: int = key(1, "Ranks that share experts.", unit="ranks", at_least=1)
    sequence_parallel: bool = key(
        False, "Split norms and residuals over tensor ranks too; needs tensor parallelism."
    )
    use_distributed_optimizer: bool = key(
        True, "Split master weights and Adam moments over data-parallel ranks."
    )
    overlap_grad_reduce: bool | None = key(
        None, "Reduce gradients during the backward pass; null on GPUs with data parallelism."
    )
    overlap_param_gather: bool | None = key(
        None, "Gather updated weights during the forward pass; null as overlap_grad_reduce."
    )
    device: Literal["auto", "cpu", "cuda"] = key(
        "auto", "Device of the workers; auto takes GPUs where the cluster has any."
    )
    cpus_per_worker: int = key(
        1, "CPUs that each worker reserves, and its number of threads.", unit="CPUs", at_least=1
    )
    placement_timeout_s: float = key(
        120.0, "Longest wait for resources of other jobs.", unit="seconds", above=0, at_most=1e7
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(RecipeKeys):
    """The optimization, and when to evaluate and save."""

    num_train_epochs: int = key(1, "Passes over the training data.", unit="epochs", at_least=1)
    max_steps: int | None = key(
        None, "Optimizer steps of the run; wins over num_train_epochs.", unit="steps", at_least=1
    )
    global_batch_size: int = key(128, "Samples of an optimizer step.", unit="samples", at_least=1)
    global_batch_tokens: int | None = key(
        None,
        "Tokens of one optimizer step, without padding; wins over global_batch_size.",
        unit="tokens",
        at_least=1,
    )
    micro_batch_tokens: int | None = key(
        None,
        "Most tokens of one micro-batch, with padding; null takes data.sequence_length.",
        unit="tokens",
        at_least=1,
    )
    learning_rate: float = key(1e-5, "Highest learning rate, after warmup.", above=0, at_most=1e30)
    min_learning_rate: float = key(0.0, "Learning rate at the end.", at_least=0, at_most=1e30)
    lr_scheduler_type: ScheduleKind = key(
        "cosine", "Schedule after warmup; wsd is constant with a decay at the end."
    )
    warmup_ratio: float = key(
        0.03, "Share of all steps over which the learning rate rises.", at_least=0, at_most=1
    )
    warmup_steps: int | None = key(
        None,
        "Steps over which the learning rate rises; wins over warmup_ratio.",
        unit="steps",
        at_least=0,
    )
    weight_decay: float = key(
        0.0,
        "AdamW's weight decay, on parameters of two or more dimensions.",
        at_least=0,
        at_most=1e6,
    )
    adam_beta1: float = key(0.9, "Decay of AdamW's first moment; below 1.", at_least=0)
    adam_beta2: float = key(0.999, "Decay of AdamW's second moment; below 1.", at_least=0)
    adam_eps: float = key(1e-8, "Term added to AdamW's denominator.", at_least=1e-30, at_most=1)
    max_grad_norm: float = key(
        1.0, "Gradients are scaled down to this norm; 0 does not clip.", at_least=0, at_most=1e30
    )
    recompute: Literal["none", "selective", "full"] | list[RecomputeModule] = key(
        "none",
        "Activations to recompute in the backward pass: of parts of a layer (selective is"
        " [core_attn]), or of whole layers.",
    )
    eval_steps: int | None = key(
        None, "Evaluate every so many steps; null evaluates at the end.", unit="steps", at_least=1
    )
    save_steps: int | None = key(
        None,
        "Write a checkpoint every so many steps; null writes them by time, and at the end.",
        unit="steps",
        at_least=1,
    )
    save_minutes: float | None = key(
        30.0,
        "Write a checkpoint at least so often; null writes them by save_steps alone.",
        unit="minutes",
        above=0,
        at_most=1e6,
    )
    logging_steps: int = key(
        1,
        "Tell the console and the trackers every so many steps; steps.jsonl has every step.",
        unit="steps",
        at_least=1,
    )
    log_samples: bool = key(False, "Write the samples of each step to samples.jsonl.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run, and what a resumed run may change."""

    save: bool = key(True, "Write checkpoints.")
    async_save: bool = key(
        False, "Write checkpoints in the background; training waits for a copy in memory only."
    )
    keep_last: int | None = key(
        3, "Newest checkpoints to keep; null keeps all.", unit="checkpoints", at_least=2
    )
    keep_best: str | None = key(
        None, "Name of a validation set; the checkpoint of its lowest loss is kept as well."
    )
    verify: bool = key(
        True, "Compare the SHA-256 of every file before resuming; sizes are always compared."
    )
    allow_changes: list[ResumeChange] = key(
        [], "Settings that may differ from the checkpoint's when a run resumes."
    )
    save_optimizer: bool = key(
        True, "Keep optimizer state in checkpoints; a run cannot resume exactly without it."
    )
    hf_export: Literal["none", "final", "every_save", "adapter", "merged"] = key(
        "final",
        "Export of the final model, of LoRA of adapter and merged model both, or of one;"
        " every_save exports each checkpoint, too.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The run itself."""

    output_dir: str | None = key(
        None, "Folder of all results; null takes outputs/<run_name> under the current folder."
    )
    run_name: str = key("sft", "Name of the run: letters, digits, dot, dash and underscore.")
    seed: int = key(42, "Seed of shuffling and random weights.", at_least=0, at_most=2**32 - 1)
    dry_run: bool = key(False, "Print the plan and exit, without starting Ray.")
    prepare_only: bool = key(False, "Fill the token cache, write data_report.json and exit.")
    deterministic: bool = key(
        False, "Use deterministic kernels only: the same bits from run to run on GPUs too."
    )
    resume: str = key(
        "auto",
        "auto goes on from the newest checkpoint of output_dir, none starts anew, a step folder"
        " goes on from that one.",
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)

    @property
    def trains_part(self) -> bool:
        """Whether adapters or a part of the weights are trained, and not all of them."""
        return self.lora.rank > 0 or self.train.freezes

    def evolve(self, **changes: Any) -> "RunConfig":
        """A changed copy, as in `evolve(train=dict(learning_rate=1e-5))`; see `evolved`."""
        from roll_sft.config.evolve import evolved

        return evolved(self, changes)


def on_device(config: RunConfig, device: Literal["cpu", "cuda"]) -> RunConfig:
    """`config` with every `auto` decided for workers on `device`, or on the one that it names."""
    model, parallel = config.model, config.parallel
    if parallel.device == "auto":
        parallel = replace(parallel, device=device)
    if model.dtype == "auto":
        model = replace(model, dtype="bf16" if parallel.device == "cuda" else "fp32")
    return replace(config, model=model, parallel=parallel)


def cluster_address(config: RunConfig) -> str | None:
    """Address of the Ray cluster that a run joins; None for one of its own."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS") or None


def token_cache_folder(config: RunConfig) -> Path:
    """Where prepared tokens are kept: by default where every node of the run sees them."""
    shared = Path(config.output_dir or f"outputs/{config.run_name}").parent / ".token_cache"
    home = Path.home() / ".cache" / "roll_sft"
    return Path(config.data.cache_dir or (shared if cluster_address(config) else home))


def layout_of(parallel: ParallelConfig) -> ParallelLayout:
    """The rank grid that `parallel` asks for."""
    return ParallelLayout(
        world_size=parallel.num_workers,
        tensor_size=parallel.tensor_model_parallel_size,
        pipeline_size=parallel.pipeline_model_parallel_size,
        context_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        virtual_size=parallel.virtual_pipeline_model_parallel_size or 1,
        expert_size=parallel.expert_model_parallel_size,
    )


def source_name(source: SourceConfig) -> str:
    """The name of a source in reports and logs: its own, or the last part of its path."""
    path = without_credentials(source.path or "")  # a name is written to every file of a run
    if "://" in path:
        path = re.sub(r"^[^:]*://([^/]*@)?|[?#][^/]*$", "", path)
    parts = [part for part in path.split("/") if part and not re.search(r"[*?[]", part)]
    last = parts[-1] if parts else "data"
    return source.name or re.sub(r"(\.\w+)?\.(gz|zst)$|\.\w+$", "", last) or last
