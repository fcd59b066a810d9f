"""What trainers on transformers' TrainingArguments have in common: TRL and LLaMA-Factory.

https://huggingface.co/docs/transformers/main_classes/trainer
"""

from typing import Any

from roll_sft.migrate import meanings
from roll_sft.migrate.draft import OFF, Draft
from roll_sft.migrate.given import Given

NOT_NEEDED = {
    "do_train": "a run trains",
    "do_eval": "validation sets are evaluated where they are given",
    "per_device_eval_batch_size": "evaluation packs as training does",
    "eval_accumulation_steps": "evaluation keeps no logits",
    "eval_do_concat_batches": "evaluation keeps no logits",
    "prediction_loss_only": "evaluation keeps no logits",
    "gradient_checkpointing_kwargs": "layers are recomputed as Megatron-Core does it",
    "activation_checkpointing_kwargs": "layers are recomputed as Megatron-Core does it",
    "dataloader_*": "batches come from a token cache",
    "remove_unused_columns": "columns that are not used are named in the report of the data",
    "group_by_length": "packs hold samples of any length",
    "train_sampling_strategy": "packs hold samples of any length",
    "length_column_name": "packs hold samples of any length",
    "use_liger_kernel": "the loss is computed in chunks, and kernels are fused here too",
    "liger_kernel_config": "the loss is computed in chunks, and kernels are fused here too",
    "tf32": "torch's default",
    "fsdp*": "the distributed optimizer splits optimizer states over data-parallel ranks",
    "deepspeed": "the distributed optimizer splits optimizer states over data-parallel ranks",
    "ddp_*": "gradients are reduced as Megatron-Core does it",
    "accelerator_config*": "the workers are Ray's",
    "local_rank": "the workers are Ray's",
    "overwrite_output_dir": "the same command goes on from the newest checkpoint",
    "ignore_data_skip": "a resumed run goes on with the next sample",
    "restore_callback_states_from_checkpoint": "a resumed run goes on by itself",
    "save_safetensors": "models are exported as safetensors",
    "logging_strategy": "steps.jsonl has every step",
    "logging_first_step": "steps.jsonl has every step",
    "logging_dir": "logs lie in the run's folder",
    "logging_nan_inf_filter": "a loss that is not finite ends a run",
    "log_level*": "logs lie in the run's folder",
    "disable_tqdm": "a terminal shows progress, a file gets lines",
    "include_num_input_tokens_seen": "steps.jsonl counts tokens",
    "include_tokens_per_second": "steps.jsonl has tokens per second",
    "skip_memory_metrics": "steps.jsonl has the peak of memory",
    "average_tokens_across_devices": "the loss is the mean over all tokens of the global batch",
    "greater_is_better": "a loss is better if it is lower",
    "optim_args": "AdamW's parameters have keys of their own",
    "torch_compile*": "model.compile compiles element-wise operations",
    "ray_scope": "the workers are Ray's",
    "use_cache": "training has no cache of keys",
}
UNSUPPORTED = {
    "data_seed": "one seed decides all; set seed",
    "eval_delay": "evaluation begins with the first train.eval_steps",
    "eval_on_start": "the first evaluation is after train.eval_steps",
    "auto_find_batch_size": "the memory of a step is known before; see `roll-sft plan`",
    "hub_*": "`roll-sft push` uploads an exported model",
    "parallelism_config*": "set the sizes of the section parallel",
}


def training(draft: Draft, given: Given, *, rate: float) -> None:
    """Optimizer, schedule, length and saves; `rate` is their default."""
    meanings.learning_rate(draft, given, "learning_rate", default=rate)
    draft.copy(
        given,
        {
            "train.weight_decay": "weight_decay",
            "train.adam_beta1": "adam_beta1",
            "train.adam_beta2": "adam_beta2",
            "train.adam_eps": "adam_epsilon",
            "train.label_smoothing": "label_smoothing_factor",
            "train.neftune_noise_alpha": "neftune_noise_alpha",
            "train.logging_steps": "logging_steps",
            "seed": "seed",
            "deterministic": "full_determinism",
            "model.trust_remote_code": "trust_remote_code",
        },
    )
    meanings.clip(draft, given, "max_grad_norm")
    meanings.optimizer(draft, given, "optim")
    meanings.schedule(draft, given, "lr_scheduler_type", default="linear")
    _scheduler_kwargs(draft, given)
    meanings.warmup(draft, given, steps="warmup_steps", ratio="warmup_ratio")
    meanings.epochs(draft, given, "num_train_epochs", default=3.0)
    meanings.max_steps(draft, given, "max_steps")
    meanings.keep_last(draft, given, "save_total_limit")
    if given.take("save_only_model"):
        draft.set("checkpoint.save_optimizer", False, "save_only_model: true")
    _intervals(draft, given)
    _push(draft, given)
    if (path := given.take("resume_from_checkpoint")) not in (*OFF, True, "true"):
        draft.cannot(
            "resume_from_checkpoint",
            path,
            "their checkpoints cannot be read; give the exported model as model.path",
        )


def _push(draft: Draft, given: Given) -> None:
    """A repository of the hub, which is public there unless it is told otherwise."""
    is_on, name = given.take("push_to_hub"), given.take("hub_model_id")
    is_private, when = given.take("hub_private_repo"), given.take("hub_strategy")
    if is_on in OFF:
        return
    if name is None:
        draft.cannot("push_to_hub", True, "set export.push_to_hub.repo_id, as USER/NAME")
        return
    draft.set("export.push_to_hub.repo_id", str(name), f"hub_model_id: {name}")
    origin = "hub_private_repo" if is_private is not None else "a new repository is public there"
    draft.set("export.push_to_hub.private", bool(is_private), origin)
    if when in ("every_save", "checkpoint", "all_checkpoints"):
        draft.set("checkpoint.hf_export", "every_save", f"hub_strategy: {when}")


def rows(draft: Draft, given: Given, *, micro: int, gpus: int | None, packed: bool) -> None:
    """The batch, from what each GPU takes at once; `micro` is their default of that."""
    counts = device_rows(given, micro)
    meanings.rows_by_device(draft, given, counts, gpus, packed=packed)


def device_rows(given: Given, micro: int) -> tuple[int, int]:
    """Rows of a device at once, `micro` by default, and how often they are accumulated."""
    each = int(given.number("per_device_train_batch_size", default=micro))
    return each, int(given.number("gradient_accumulation_steps", default=1))


def _scheduler_kwargs(draft: Draft, given: Given) -> None:
    keys = {
        "train.min_learning_rate": ("lr_scheduler_kwargs.min_lr", "lr_scheduler_kwargs.lr_end"),
        "train.polynomial_power": "lr_scheduler_kwargs.power",
        "train.inverse_sqrt_timescale": "lr_scheduler_kwargs.timescale",
    }
    draft.copy(given, keys)
    meanings.min_rate(draft, given, "lr_scheduler_kwargs.min_lr_rate")
    cycles = given.take("lr_scheduler_kwargs.num_cycles")
    if cycles is not None and draft.value("train.lr_scheduler_type") == "cosine_with_restarts":
        draft.set("train.cosine_cycles", int(cycles), f"num_cycles: {cycles}")
    elif cycles not in (None, 0.5):  # of a cosine, half a cycle
        draft.cannot("lr_scheduler_kwargs.num_cycles", cycles, "cosine falls once here")


def _intervals(draft: Draft, given: Given) -> None:
    """When to evaluate and when to save."""
    kind = given.take("save_strategy", default="steps")
    count = given.take("save_steps", default=500)
    if kind in ("no", False):  # YAML reads no as false
        draft.set("checkpoint.save", False, "save_strategy: no")
    elif kind == "steps":
        _steps(draft, "train.save_steps", "save_steps", count)
    else:
        draft.cannot("save_strategy", kind, "set train.save_steps to the steps of an epoch")
    if draft.lines.get("train.save_steps", (None, ""))[0] is not None:
        draft.set("train.save_minutes", None, "saves are by steps there")
    strategy = given.take("eval_strategy", "evaluation_strategy", default="no")
    steps = given.take("eval_steps", default=draft.value("train.logging_steps"))
    if strategy == "steps":
        _steps(draft, "train.eval_steps", "eval_steps", steps)
    elif strategy == "epoch":
        draft.cannot("eval_strategy", strategy, "set train.eval_steps to the steps of an epoch")
    is_best = given.take("load_best_model_at_end")
    metric = given.take("metric_for_best_model", default="eval_loss")
    if is_best and metric in ("loss", "eval_loss"):
        draft.notes.append(
            "load_best_model_at_end: set checkpoint.keep_best to the name of a validation set"
        )
    elif is_best:
        draft.cannot("metric_for_best_model", metric, "the best checkpoint is told by its loss")


def _steps(draft: Draft, ours: str, name: str, count: Any) -> None:
    """A number of steps; below 1 it is a share of all steps, which must be known."""
    total = draft.value("train.max_steps")
    if 0 < float(count) < 1:
        if total is None:
            draft.cannot(name, count, f"a share of all steps; set {ours} to a number of steps")
            return
        draft.set(ours, max(1, round(float(count) * total)), f"{name}: {count} of {total} steps")
    else:
        draft.set(ours, int(count), f"{name}: {int(count)}")
