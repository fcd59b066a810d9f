"""What several trainers say in the same way: schedules, batches, dtypes, adapters, trackers."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from roll_sft.base.errors import ConfigError
from roll_sft.migrate.draft import OFF, Batch, Draft, shown_value
from roll_sft.migrate.given import WORLD, Given

_SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "cosine_with_restarts": "cosine_with_restarts",
    "inverse_sqrt": "inverse_sqrt",
    "inverse-square-root": "inverse_sqrt",
    "polynomial": "polynomial",
    "warmup_stable_decay": "wsd",
    "wsd": "wsd",
}
_DTYPES = {"bfloat16": "bf16", "bf16": "bf16", "float32": "fp32", "fp32": "fp32", "auto": "auto"}
_DTYPES |= {"float16": "fp16", "fp16": "fp16"}
_ATTENTION = {
    "flash_attention_2": "flash",
    "flash_attention_3": "fa3",
    "flash_attn": "flash",
    "flash": "flash",
    "fa2": "flash",
    "fa3": "fa3",
    "flash_2": "flash",
    "flash_3": "fa3",
    "sdpa": "sdpa",
    "torch": "sdpa",
}
# Fused projections of Megatron-Core -> Hugging Face's.
_FUSED_MODULES = {
    "linear_qkv": ["q_proj", "k_proj", "v_proj"],
    "linear_proj": ["o_proj"],
    "linear_fc1": ["gate_proj", "up_proj"],
    "linear_fc2": ["down_proj"],
}
OPTIMIZERS = ("adamw", "adam", "adamw_torch", "adamw_torch_fused", "adamw_hf", "AdamW", "Adam")
_SECRET = re.compile(r"(^|[._])(api_?key|key|token|hub_token|password|secret|passwd)$", re.I)


def is_secret(name: str) -> bool:
    """Whether a key of theirs holds a credential, by its name."""
    return bool(_SECRET.search(name)) and not name.endswith(("pad_token", "eos_token"))


def schedule(draft: Draft, given: Given, *names: str, default: str) -> None:
    """The learning rate's schedule; `default` is theirs."""
    name, kind = given.name_of(*names), given.take(*names, default=default)
    ours = _SCHEDULES.get(str(kind).lower())
    if ours is None:
        draft.cannot(
            name or names[0],
            kind,
            f"no such schedule here; choose one of {', '.join(sorted(set(_SCHEDULES.values())))}",
        )
    elif name is not None:
        draft.set("train.lr_scheduler_type", ours, f"{name}: {kind}")
    else:
        draft.set_default("train.lr_scheduler_type", ours, names[0])
    if kind == "polynomial":  # of transformers, which ends at 1e-7
        draft.set("train.min_learning_rate", 1e-7, "polynomial of transformers ends there")


def warmup(draft: Draft, given: Given, *, steps: str, ratio: str, default: float = 0.0) -> None:
    """Warm-up steps win over a ratio, if they are given and not 0; below 1 they are a ratio."""
    count, share = given.take(steps), given.take(ratio)
    if isinstance(count, int | float) and 0 < count < 1:
        draft.set("train.warmup_ratio", float(count), f"{steps}: {count}, a ratio")
    elif isinstance(count, int | float) and count > 0:
        draft.set("train.warmup_steps", int(count), f"{steps}: {count}")
    elif share is not None:
        draft.set("train.warmup_ratio", float(share), f"{ratio}: {share}")
    else:
        draft.set_default("train.warmup_ratio", default, steps)


def min_rate(draft: Draft, given: Given, ratio: str, *, default: float = 0.0) -> None:
    """The last learning rate, where theirs is a ratio of the highest."""
    share, is_given = given.number(ratio, default=default), ratio in given
    if share:
        rate = float(f"{float(share) * draft.value('train.learning_rate'):.12g}")
        origin = f"{ratio}: {share}" if is_given else f"{draft.rival}'s default of {ratio}: {share}"
        draft.set("train.min_learning_rate", rate, f"{origin}, times the learning rate")


def epochs(draft: Draft, given: Given, *names: str, default: float) -> None:
    """Whole epochs; a fraction has no counterpart."""
    name, count = given.name_of(*names), given.number(*names, default=default)
    if float(count) != int(float(count)):
        draft.cannot(name or names[0], count, "epochs are whole here; set train.max_steps instead")
    elif name is None:
        draft.set_default("train.num_train_epochs", int(float(count)), names[0])
    else:
        draft.set("train.num_train_epochs", int(float(count)), f"{name}: {count}")


def max_steps(draft: Draft, given: Given, *names: str) -> None:
    """A number of steps, which wins over epochs there as here; -1 and 0 are none."""
    name, count = given.name_of(*names), given.take(*names)
    if name is not None and isinstance(count, int | float) and count > 0:
        draft.set("train.max_steps", int(count), f"{name}: {count}")


def optimizer(draft: Draft, given: Given, *names: str) -> None:
    """AdamW is the only optimizer here."""
    name, kind = given.name_of(*names), given.take(*names)
    if name is not None and kind not in OPTIMIZERS:
        draft.cannot(name, kind, "AdamW is the only optimizer here; the loss curve will differ")
    elif name is not None:
        draft.not_needed[f"{name}: {kind}"] = "AdamW is what trains here"


def learning_rate(draft: Draft, given: Given, *names: str, default: float | None) -> None:
    """The highest learning rate."""
    name, rate = given.name_of(*names), given.number(*names, default=default)
    if rate is None:
        raise ConfigError(f"{names[0]}: missing, and {draft.rival} has no default; add it")
    if name is None:
        draft.set_default("train.learning_rate", float(rate), names[0])
    else:
        draft.set("train.learning_rate", float(rate), f"{name}: {rate}")


def clip(draft: Draft, given: Given, *names: str, default: float = 1.0) -> None:
    """The largest gradient norm; 0 and below do not clip."""
    name, norm = given.name_of(*names), float(given.number(*names, default=default))
    if name is None:
        draft.set_default("train.max_grad_norm", max(norm, 0.0), names[0])
    else:
        draft.set("train.max_grad_norm", max(norm, 0.0), f"{name}: {norm:g}")


def dtype(draft: Draft, given: Given, *names: str, default: str) -> None:
    """The type of weights and activations, by a name such as bfloat16."""
    name, kind = given.name_of(*names), given.take(*names, default=default)
    draft.set(
        "model.dtype",
        _DTYPES.get(str(kind).lower(), str(kind)),
        f"{name}: {kind}" if name else f"{draft.rival}'s default of {names[0]}",
    )


def dtype_flags(draft: Draft, given: Given) -> None:
    """The type by flags `bf16` and `fp16`, as transformers' trainers have them."""
    for flag in ("fp16", "bf16"):
        if given.take(flag) not in (*OFF, "auto"):
            draft.set("model.dtype", flag, f"{flag}: true")
    if "model.dtype" not in draft.lines:
        draft.set("model.dtype", "bf16", f"{draft.rival} trains in bf16 where neither is set")


def attention(draft: Draft, given: Given, *names: str) -> None:
    """The attention kernel; one that is not known here becomes auto."""
    name, kind = given.name_of(*names), given.take(*names)
    if name is not None:
        ours = _ATTENTION.get(str(kind).lower().replace("-", "_"), "auto")
        draft.set("model.attention_backend", ours, f"{name}: {kind}")


def recompute(draft: Draft, given: Given, *names: str, default: bool) -> None:
    """Gradient checkpointing of whole layers."""
    name, is_on = given.name_of(*names), given.take(*names, default=default)
    if name is not None:
        draft.set("train.recompute", "full" if is_on else "none", f"{name}: {shown_value(is_on)}")
    else:
        draft.set_default("train.recompute", "full" if is_on else "none", names[0])


def trackers(draft: Draft, given: Given, *names: str, default: list[str]) -> None:
    """Trackers by name; an own console or file is what steps.jsonl is."""
    name, wanted = given.name_of(*names), given.take(*names, default=default)
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    if wanted == ["all"]:
        wanted = ["tensorboard", "wandb", "mlflow"]
    files = ("console", "stdout", "file", "jsonl", *OFF)
    ours = ["jsonl", *(each for each in wanted if each not in files)]
    origin = f"{name}: {shown_value(given.values[name])}" if name else f"{draft.rival}'s default"
    draft.set("tracking.backends", ours, origin)


def world_of_file(draft: Draft, gpus: int | None, count: int | None, origin: str) -> None:
    """The GPUs where the file says `count` of them; those of the command line win."""
    if gpus is not None:
        draft.set("parallel.num_workers", gpus, "--gpus")
    elif count:
        draft.set("parallel.num_workers", count, origin)


def nodes_of_file(draft: Draft, given: Given, gpus: int | None, *, each: str, nodes: str) -> None:
    """The GPUs where the file has a number of nodes and of GPUs on `each`."""
    count, number = given.number(each), int(given.number(nodes, default=1))
    world_of_file(draft, gpus, count and int(count) * number, f"{number} nodes x {count} GPUs")
    world_size(draft, given, gpus)


def world_size(draft: Draft, given: Given, gpus: int | None) -> int:
    """The GPUs that train: of the command line, the launcher or the file.

    Raises `ConfigError` where nothing says it.
    """
    if "parallel.num_workers" in draft.lines:
        return int(draft.value("parallel.num_workers"))
    nodes = _number(given.take(f"{WORLD}nnodes", f"{WORLD}num_nodes", f"{WORLD}NNODES"), 1)
    each = given.take(
        f"{WORLD}nproc_per_node", f"{WORLD}num_gpus", f"{WORLD}NPROC_PER_NODE", default=None
    )
    total = given.take(f"{WORLD}num_processes")  # accelerate's counts all nodes
    visible = given.take(f"{WORLD}CUDA_VISIBLE_DEVICES")
    if gpus is not None:
        found, origin = gpus, "--gpus"
    elif total is not None and f"{WORLD}num_nodes" in given:  # mason.py's, which starts each node
        found, origin = nodes * _number(total, 1), f"{nodes} nodes x {total} processes"
    elif total is not None:
        found, origin = _number(total, 1), f"num_processes: {total}"
    elif each is not None:
        found, origin = nodes * _number(each, 1), f"{nodes} nodes x {each} processes"
    elif visible is not None:
        found = nodes * len(str(visible).split(","))
        origin = f"CUDA_VISIBLE_DEVICES={visible}"
    else:
        raise ConfigError(
            f"--gpus: {draft.rival} counts a batch for each GPU, and the file does not say on how"
            " many it runs; add --gpus N"
        )
    draft.set("parallel.num_workers", found, origin)
    return found


def data_parallel(draft: Draft, given: Given, gpus: int | None) -> int:
    """Data-parallel ranks: the GPUs over the sizes of the layout that was mapped before."""
    world = world_size(draft, given, gpus)
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    model = math.prod(draft.value(f"parallel.{name}") for name in names)
    if world % model:
        raise ConfigError(
            f"--gpus: {world} GPUs cannot hold a layout of {model}; give a multiple of {model}"
        )
    return world // int(model)


def batch(
    draft: Draft,
    rows: int,
    origin: str,
    *,
    packed: bool = False,
    micro_rows: int = 1,
    drops_last: bool = False,
) -> None:
    """The batch of a step: `rows` samples, or packs of `data.sequence_length` tokens.

    `micro_rows` go through a GPU at once; the most tokens of a pack here follow from it.
    """
    length = int(draft.value("data.sequence_length"))
    if packed:
        draft.set(
            "train.global_batch_tokens",
            rows * length,
            f"{origin} = {rows} packed rows of {length} tokens",
        )
    else:
        draft.set("train.global_batch_size", rows, f"{origin} = {rows} samples")
    context = int(draft.value("parallel.context_parallel_size"))
    if micro_rows > 1:
        draft.set(
            "train.micro_batch_tokens",
            micro_rows * length,
            f"{micro_rows} rows at once, of {length} tokens"
            + (f", on {context} context ranks" if context > 1 else ""),
        )
    draft.batch = Batch(rows, length if packed else None, drops_last)


def rows_by_device(
    draft: Draft,
    given: Given,
    counts: tuple[int, int],
    gpus: int | None,
    *,
    packed: bool = False,
    drops_last: bool = False,
) -> None:
    """The batch where it is counted for each device; `counts`: rows at once, accumulated."""
    each, accumulated = counts
    ranks = data_parallel(draft, given, gpus)
    batch(
        draft,
        each * accumulated * ranks,
        f"{each} per device x {accumulated} accumulated x {ranks} data-parallel",
        packed=packed,
        micro_rows=each,
        drops_last=drops_last,
    )


def betas(draft: Draft, given: Given, *names: str, default: tuple[float, float]) -> None:
    """AdamW's two decays, which are one key there."""
    pair = given.take(*names, default=list(default))
    for key, value in zip(("train.adam_beta1", "train.adam_beta2"), pair, strict=True):
        draft.set(key, float(value), f"betas: {pair}")


def leave(draft: Draft, given: Given, names: Sequence[str], why: str) -> None:
    """Keys that say nothing where a switch is off."""
    for name in names:
        if name in given:
            given.take(name)
            draft.not_needed[name] = why


def gpus_of_mapping(text: str) -> int | None:
    """Devices of ROLL's `list(range(0,8))` or `[0, 1]`, read and not evaluated."""
    numbers = [int(each) for each in re.findall(r"\d+", text)]
    if re.fullmatch(r"\s*list\(\s*range\(.*\)\s*\)\s*", text):
        return len(range(*numbers)) if 1 <= len(numbers) <= 3 else None
    return len(numbers) if re.fullmatch(r"\s*\[[\d,\s]*\]\s*", text) else None


def sources(draft: Draft, key: str, paths: Any, origin: str, **also: Any) -> None:
    """`data.train` or `data.validation` of a path, or of several."""
    listed = [paths] if isinstance(paths, str) else list(paths)
    entries = [{"path": str(path), **also} for path in listed]
    draft.set(key, entries, origin)


def run_folder(draft: Draft, given: Given, output: str, name: str | None = None) -> None:
    """The folder of results, and a run's name in our letters."""
    folder = given.take(output)
    if folder is not None:
        draft.set("output_dir", str(folder), f"{output}: {folder}")
    called = given.take(name) if name else None
    if called is None and folder is not None:
        called, name = Path(str(folder)).name, output
    if called is not None:
        ours = re.sub(r"[^A-Za-z0-9._-]+", "-", str(called)).strip("-.") or "sft"
        draft.set("run_name", ours, f"{name}: {called}")


def keep_last(draft: Draft, given: Given, *names: str) -> None:
    """Checkpoints to keep; at least 2 here, and none or 0 keeps all."""
    name, count = given.name_of(*names), given.take(*names)
    if name is None:
        draft.set_default("checkpoint.keep_last", None, names[0])
    elif isinstance(count, int | float) and count >= 1:
        draft.set("checkpoint.keep_last", max(2, int(count)), f"{name}: {count}")
        if count < 2:
            draft.notes.append(
                "checkpoint.keep_last: 2 is the least here; while the newest is written, the one"
                " before it must be whole"
            )
    else:
        draft.set("checkpoint.keep_last", None, f"{name}: {count}, which keeps all")


def adapters(draft: Draft, given: Given, **names: tuple[str, Any]) -> None:
    """Keys of LoRA: our name -> (their key, their default)."""
    for ours, (theirs, default) in names.items():
        value, is_given = given.take(theirs, default=default), theirs in given
        if value is None:
            continue
        if ours in ("target_modules", "modules_to_save"):
            value = modules(value)
        origin = f"{theirs}: {shown_value(value)}"
        draft.set(
            f"lora.{ours}", value, origin if is_given else f"{draft.rival}'s default of {theirs}"
        )


def modules(value: Any) -> list[str]:
    """Projections by Hugging Face's names, of a text with commas or a list of names."""
    listed = re.split(r"[,\s]+", value.strip()) if isinstance(value, str) else list(value)
    named = ["all-linear" if each in ("all", "all-linear") else str(each) for each in listed]
    return [ours for each in named for ours in _FUSED_MODULES.get(each, [each])]


def _number(value: Any, default: int) -> int:
    """A launcher's count; one that only its environment knows counts as `default`."""
    return int(value) if re.fullmatch(r"\d+", str(value)) else default
