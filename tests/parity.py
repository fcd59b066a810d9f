"""A plain transformers + AdamW loop over the same samples, and our engine beside it.

The model is small but telling: norms and biases away from their initial values, weights large
enough that attention matters, a RoPE base and an epsilon that are not the defaults.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from roll_sft.config.build import build_config
from roll_sft.config.schema import RunConfig
from roll_sft.data.steps.objective import TOLD
from roll_sft.job.in_process import prepare_job
from roll_sft.job.job import Job
from roll_sft.parity.measurement import RankParity
from roll_sft.parity.oracle import Facts, read_facts, token_losses, write_reference
from roll_sft.parity.task import ParityTask
from roll_sft.parity.verdict import Verdict, judge
from tests.families import FAMILIES
from tests.faults import planted
from tests.pool import RankPool
from tests.tiny import tiny_tokenizer

NUM_ROWS, SAMPLES_PER_STEP, EPOCHS = 24, 7, 2
SIGMOID = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}
# Kind -> its experts; narrower than the MLP of other kinds, and the loss of their load is telling.
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 40, "router_aux_loss_coef": 0.3},
    "glm4moe": {
        **SIGMOID,
        "use_qk_norm": True,
        "attention_bias": True,
        "head_dim": 24,
    },
    "deepseekv3": {
        **SIGMOID,
        "num_key_value_heads": 4,
        "q_lora_rank": 28,
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
    },
    "gptoss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 40,
        "head_dim": 24,
        "sliding_window": 24,
        "swiglu_limit": 2.0,
        "router_aux_loss_coef": 0.3,
    },
    "olmoe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 40,
        "router_aux_loss_coef": 0.0,
        "eos_token_id": None,
    },
    "qwen2moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
        "router_aux_loss_coef": 0.3,
    },
    "qwen3moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "head_dim": 24,
        "router_aux_loss_coef": 0.3,
    },
}


# Kind -> what it has beside a base.
ROPE: dict[str, dict[str, Any]] = {
    "llama3": {  # an original length that Megatron's own scaling would take for 8192
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "glm4moe": {"partial_rotary_factor": 0.5},
    "gptoss": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
    "deepseekv3": {
        "rope_type": "yarn",
        "factor": 4.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "original_max_position_embeddings": 64,
    },
}


def model_config(kind: str, *, num_layers: int) -> PreTrainedConfig:
    """Configuration of a tiny model; `kind` is a family, `-tied`, or what else is special."""
    family, _, variant = kind.partition("-")
    shared: dict[str, Any] = {
        "vocab_size": 403,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 1 if variant == "one_kv_head" else 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 3e-5,
        "initializer_range": 0.15,
        "tie_word_embeddings": variant == "tied",
        "pad_token_id": None,  # transformers would not train that row, which text may use here
        "rope_parameters": {"rope_type": "default", "rope_theta": 70_000.0},
    }
    rope = shared["rope_parameters"] | ROPE.get(family, {})
    shared["rope_parameters"] = rope
    if family == "qwen3":
        shared["head_dim"] = 24
    if variant == "wide":  # inputs of whole blocks of NF4, also where two tensor ranks cut them
        shared |= {"hidden_size": 128, "intermediate_size": 256}
    if family in ("mistral", "mixtral"):
        shared["sliding_window"] = None
    if family in FAMILIES:
        return FAMILIES[family](**shared)
    if family in EXPERTS:
        shared |= EXPERTS[family]
    if variant == "plain":  # no vector of queries, no scaling, halves of a head rotated together
        plain = {"rope_type": "default", "rope_theta": 70_000.0}
        shared |= {"q_lora_rank": None, "rope_interleave": False, "rope_parameters": plain}
    if family == "gptoss":
        shared["max_position_embeddings"] = 256
    classes: dict[str, type[PreTrainedConfig]] = {
        "deepseekv3": DeepseekV3Config,
        "glm4moe": Glm4MoeConfig,
        "gptoss": GptOssConfig,
        "mixtral": MixtralConfig,
        "olmoe": OlmoeConfig,
        "qwen2moe": Qwen2MoeConfig,
        "qwen3moe": Qwen3MoeConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "llama": LlamaConfig,
        "llama3": LlamaConfig,
        "mistral": MistralConfig,
        "olmo2": Olmo2Config,
    }
    return classes[family](**shared)


def write_model(folder: Path, *, kind: str = "qwen2", num_layers: int = 4) -> Path:
    """A tiny model with telling weights and its tokenizer, saved as transformers saves models."""
    # With 7, two scores of its router differ by 1e-7 in step 6, and kernels decide which is larger.
    torch.manual_seed(8 if kind.startswith("deepseekv3") else 7)
    config = model_config(kind, num_layers=num_layers)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            if name.endswith("sinks"):
                parameter.normal_(0.5, 1.0)
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
    # transformers writes published layouts, each expert by itself, or its own.
    model.save_pretrained(folder, save_original_format=not kind.endswith("-fused"))
    if kind.endswith("-mtp"):
        add_prediction_layer(folder, config)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def add_prediction_layer(folder: Path, config: PreTrainedConfig) -> None:
    """Give the model in `folder` a layer for multi-token prediction, as published files have it."""
    tensors = load_file(folder / "model.safetensors")
    last, ours = (f"model.layers.{config.num_hidden_layers - 1 + each}." for each in (0, 1))
    layer = {
        ours + name.removeprefix(last): torch.randn_like(each)
        for name, each in tensors.items()
        if name.startswith(last)
    }
    for name, sizes in (("enorm", (64,)), ("hnorm", (64,)), ("eh_proj", (64, 128))):
        layer[f"{ours}{name}.weight"] = torch.randn(sizes)
    for name in ("embed_tokens", "shared_head.head"):
        layer[f"{ours}{name}.weight"] = tensors["model.embed_tokens.weight"].clone()
    layer[f"{ours}shared_head.norm.weight"] = torch.randn(64)
    save_file(tensors | layer, folder / "model.safetensors", metadata={"format": "pt"})


def write_rows(path: Path, *, num_rows: int = NUM_ROWS) -> Path:
    """Rows of very different lengths, one and several turns."""
    generator = np.random.default_rng(5)
    words = [
        "the",
        "sum",
        "of",
        "two",
        "numbers",
        "is",
        "given",
        "in",
        "this",
        "list",
        "and",
        "returns",
        "largest",
        "value",
        "item",
    ]
    lines = []
    for row in range(num_rows):
        lengths = (3 + 17 * row % 40, 2 + 29 * row % 50)
        question, answer = (" ".join(generator.choice(words, size=n)) for n in lengths)
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        if row % 3 == 0:
            messages += [
                {"role": "user", "content": "one more"},
                {"role": "assistant", "content": f"row {row}"},
            ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


def home_of(root: Path, kind: str, *, num_layers: int = 4) -> Path:
    """The folder `root`/`kind`, made once: a model of that kind beside the rows of `root`."""
    home = root / kind
    if not home.exists():
        home.mkdir()
        write_model(home / "model", kind=kind, num_layers=num_layers)
        (home / "rows.jsonl").symlink_to(root / "rows.jsonl")
    return home


def worst(steps: list[dict[str, float]], wanted: list[dict[str, float]], key: str) -> float:
    """The largest relative difference of `key` over all steps."""
    assert len(steps) == len(wanted)
    return max(abs(a[key] / b[key] - 1) for a, b in zip(steps, wanted, strict=True))


def parity_config(
    folder: Path, *, deterministic: bool = False, **sections: dict[str, Any]
) -> RunConfig:
    """The run of the parity test; `sections` override keys section by section."""
    base: dict[str, Any] = {
        "deterministic": deterministic,
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {
            "train": [{"path": str(folder / "rows.jsonl")}],
            "sequence_length": 200,
            "cache_dir": str(folder / "cache"),
        },
        "train": {
            "num_train_epochs": EPOCHS,
            "global_batch_size": SAMPLES_PER_STEP,
            "learning_rate": 5e-4,
            "min_learning_rate": 5e-5,
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "log_samples": True,
        },
        "tracking": {"backends": ["jsonl"]},
        "parallel": {"device": "cpu"},
    }
    for name, values in sections.items():
        base.setdefault(name, {}).update(values)
    return build_config(base)


def reference_run(
    job: Job, dtype: torch.dtype = torch.float32
) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Loss and gradient norm of each step, and logits after the last, from transformers alone.

    All in `dtype`, float32 or float64.
    """
    path, train = job.config.model.path, job.config.train
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").to(dtype)
    if job.source.shape.experts is not None:  # the other has no float64
        model.set_experts_implementation("eager")
    # The biases of experts are vectors, which transformers 5 keeps in one tensor.
    is_decayed = {p: p.ndim >= 2 and "bias" not in name for name, p in model.named_parameters()}
    decayed = [p for p, decays in is_decayed.items() if decays]
    others = [p for p, decays in is_decayed.items() if not decays]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": train.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_eps,
    )
    with in_float64() if dtype == torch.float64 else contextlib.nullcontext():
        return reference_steps(job, model, optimizer), model_logits(model)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """What transformers computes in float32 whatever the dtype of the model, it does in float64."""
    with contextlib.ExitStack() as stack:
        for name in ("float32", "float"):
            stack.enter_context(patch.object(torch, name, torch.float64))
        stack.enter_context(patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield


def reference_steps(
    job: Job,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    before: Callable[[int, int], None] = lambda step, sample: None,
) -> list[dict[str, float]]:
    """Loss and gradient norm of each step of `job`; trains what `optimizer` holds of `model`.

    `before` is called with the step and the sample before the forward of each sample.
    """
    trained = [each for group in optimizer.param_groups for each in group["params"]]
    steps = []
    for step in range(1, job.total_steps + 1):
        plan = job.planner.step(step)
        optimizer.zero_grad()
        total, z_loss = 0.0, 0.0
        if is_balanced := bool(balance_coefficient(job) or job.config.moe.z_loss_coef):
            total, z_loss = balanced_backward(job, model, plan.sample_ids, plan.supervised_tokens)
        for index in () if is_balanced else plan.sample_ids:
            before(step, int(index))
            loss_sum = token_losses(model, *job.data.train.sample(index)).sum()
            (loss_sum / plan.supervised_tokens).backward()
            total += loss_sum.item()
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, job.config.train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = job.schedule.at(step)
        optimizer.step()
        steps.append({"loss": total / plan.supervised_tokens, "grad_norm": float(grad_norm)})
        if job.config.moe.z_loss_coef:
            steps[-1]["z_loss"] = z_loss
    return steps


def balance_coefficient(job: Job) -> float:
    """Of the auxiliary loss; 0 without experts."""
    experts, given = job.source.shape.experts, job.config.moe.aux_loss_coef
    return 0.0 if experts is None else experts.aux_loss_coef if given is None else given


def balanced_backward(
    job: Job, model: Any, sample_ids: Sequence[int], supervised_tokens: int
) -> tuple[float, float]:
    """Backward of the loss, the auxiliary loss and the z-loss of one forward over all samples.

    Returns the sum of the samples' losses, and the z-loss without its coefficient.
    """
    samples = [job.data.train.sample(index) for index in sample_ids]
    longest = max(tokens.size for tokens, _ in samples)
    ids, mask = (torch.zeros(len(samples), longest, dtype=torch.long) for _ in range(2))
    for row, (tokens, _) in enumerate(samples):
        ids[row, : tokens.size] = torch.from_numpy(tokens.astype(np.int64))
        mask[row, : tokens.size] = 1
    output = model(ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    losses = []
    for row, (tokens, label_mask) in enumerate(samples):
        rows = torch.from_numpy(np.flatnonzero(label_mask))
        labels = torch.from_numpy(tokens.astype(np.int64))[rows + 1]
        losses.append(F.cross_entropy(output.logits[row, rows], labels, reduction="sum"))
    loss_sum = torch.stack(losses).sum()
    loss = loss_sum / supervised_tokens + balance_coefficient(job) * output.aux_loss
    logits = torch.cat([each[mask.flatten() == 1] for each in output.router_logits])
    z_loss = logits.logsumexp(-1).square().mean()
    (loss + job.config.moe.z_loss_coef * z_loss).backward()
    return loss_sum.item(), z_loss.item()


def model_logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits [32, V] of a fixed input."""
    ids = torch.arange(32)[None] * 11 % 400
    with torch.no_grad():
        return model(ids.to(next(model.parameters()).device)).logits[0].cpu()


def engine_run(
    config: RunConfig, checkpoint: Path | None, loads: Path | None = None, last: int | None = None
) -> list[dict[str, float]] | None:
    """Steps of `config` on this rank's engine, metrics on the reporting rank. In a pool.

    From the checkpoint `loads` on, or from the first; to step `last`, or the end. Then the state is
    saved into `checkpoint`.
    """
    import torch.distributed as dist

    from roll_sft.checkpoint.manifest import read_manifest
    from roll_sft.engine.engine import Engine

    job = prepare_job(config)
    with small_buckets():
        engine = Engine(config, source=job.source, data=job.data, checkpoint=loads)
    data_rank = job.layout.coordinate(dist.get_rank()).data_rank
    first = 1 if loads is None else read_manifest(loads).state.step + 1
    steps = []
    for step in range(first, (last or job.total_steps) + 1):
        plan = job.planner.step(step)
        metrics = engine.train_step(plan.work_for(data_rank, learning_rate=job.schedule.at(step)))
        if metrics is not None:
            loss = metrics.loss_sum / metrics.supervised_tokens
            told = [value / metrics.supervised_tokens for value in metrics.told]
            steps.append(
                {
                    "loss": loss,
                    "grad_norm": metrics.grad_norm,
                    **dict(zip(TOLD, told, strict=False)),
                }
            )
            if metrics.experts is not None and metrics.experts.expert_z_loss is not None:
                steps[-1]["z_loss"] = metrics.experts.expert_z_loss
    if checkpoint is not None:
        engine.save(checkpoint)
    return steps or None


@contextlib.contextmanager
def small_buckets() -> Iterator[None]:
    """Where exchanges overlap, cut the buffers of these small models into several buckets, too."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from roll_sft.engine import build

    small = functools.partial(DistributedDataParallelConfig, bucket_size=10_000)
    with patch.object(build, "DistributedDataParallelConfig", small):
        yield


def published(job: Job, staging: Path, step: int) -> Path:
    """The step folder of what `engine_run` saved in `staging`."""
    from roll_sft.checkpoint.publish import publish_step

    return publish_step(
        job.state, job.planner.step(step), staging=staging, save_assets=job.save_assets
    )


def export_run(job: Job, staging: Path, output: Path) -> torch.nn.Module:
    """Publish what `engine_run` saved in `staging`, convert it, load it with transformers."""
    from roll_sft.convert.to_hf import export

    export(published(job, staging, job.total_steps), output, dtype=None, replace=False)
    return AutoModelForCausalLM.from_pretrained(output, attn_implementation="eager")


def write_reference_of(job: Job, folder: Path) -> Facts:
    """What the oracle makes of step 1, in the new `folder`."""
    folder.mkdir(parents=True)
    write_reference(_task(job, folder), device=torch.device("cpu"))
    return read_facts(folder)


def compared(job: Job, pool: RankPool, reference: Path, fault: str | None = None) -> Verdict:
    """Step 1 of `job` on all ranks of its layout, with `fault`, beside the oracle's `reference`."""
    ranks = pool.run(measure, job.layout, job.config, reference, fault)
    facts = read_facts(reference)
    return judge(ranks, facts, source=job.source, dtype=job.config.model.dtype)


def measure(config: RunConfig, reference: Path, fault: str | None = None) -> RankParity:
    """This rank's errors beside the oracle's `reference`, with `fault` planted. In a pool."""
    from roll_sft.engine.engine import Engine
    from roll_sft.parity import compare

    job = prepare_job(config)
    with planted(fault):
        engine = Engine(config, source=job.source, data=job.data)
        return compare.measure(engine, _task(job, reference))


def _task(job: Job, folder: Path) -> ParityTask:
    return ParityTask(job.config, job.source, job.data.train, job.planner.step(1), folder)
