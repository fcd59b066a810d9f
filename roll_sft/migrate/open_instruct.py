"""open-instruct's `finetune.py` and `olmo_core_finetune.py`: command lines, and YAML.

https://allenai.github.io/open-instruct/
"""

from typing import Any

from roll_sft.migrate import hf_arguments, meanings
from roll_sft.migrate.draft import OFF, Draft
from roll_sft.migrate.given import Given

NAME = "open-instruct"
_HUB = "upload the folder hf/ with huggingface_hub"
_EVALS = "evaluate the exported model"
NOT_NEEDED = {
    "low_cpu_mem_usage": "each rank reads its own part of the weights",
    "use_fast": "tokenizers are always fast ones",
    "use_slow_tokenizer": "tokenizers are always fast ones",
    "get_tokenizer_fn": "the tokenizer is used as its folder has it",
    "dataset_target_columns": "columns that are not used are named in the report of the data",
    "target_columns": "columns that are not used are named in the report of the data",
    "dataset_cache_mode": "the token cache is made anew where anything changed",
    "dataset_config_hash": "the token cache is made anew where anything changed",
    "dataset_mix_dir": "the token cache is made anew where anything changed",
    "dataset_skip_cache": "the token cache is made anew where anything changed",
    "skip_cache": "the token cache is made anew where anything changed",
    "overwrite_cache": "the token cache is made anew where anything changed",
    "do_not_randomize_output_dir": "a run's folder has no time in its name",
    "fused_optimizer": "AdamW is fused where it can be",
    "sync_each_batch": "gradients are reduced once a step",
    "use_liger_kernel": "the loss is computed in chunks, and kernels are fused here too",
    "timeout": "the section cluster has deadlines",
    "wandb_entity": "set WANDB_ENTITY",
    "verbose": "steps.jsonl has every step",
    "use_flash_attn": "the fastest kernel that works is taken",
    "hf_metadata_dataset": "evaluations are not published",
    "(accelerate).*": "the workers are Ray's",
}
UNSUPPORTED = {
    "model_revision": "download that revision, and give its folder as model.path",
    "config_name": "give the model's own folder as model.path",
    "additional_model_arguments": "the model is built from its config.json",
    "tokenizer_revision": "download that revision, and give it as model.tokenizer_path",
    "add_bos": "the chat template decides it; see data.chat_template",
    "dataset_config_name": "give the files of that subset as data.train paths",
    "use_8bit_optimizer": "AdamW's states are fp32",
    "load_balancing_loss": "set moe.aux_loss_coef",
    "load_balancing_weight": "set moe.aux_loss_coef",
    "clean_checkpoints_at_end": "remove checkpoints/ when you do not need it",
    "push_to_hub": _HUB,
    "hf_*": _HUB,
    "save_to_hub": _HUB,
    "gs_bucket_path": "copy the run's folder yourself",
    "try_launch_beaker_eval_jobs": _EVALS,
    "try_auto_save_to_beaker": _EVALS,
    "oe_eval_*": _EVALS,
    "ephemeral_save_interval": "set train.save_minutes",
    "activation_memory_budget": "set train.recompute",
}
_TRANSFORMS = {
    "sft_tulu_tokenize_and_truncate_v1": ("assistant", "truncate"),
    "sft_tulu_tokenize_without_truncation_v1": ("assistant", "drop"),
    "last_turn_tulu_tokenize_and_truncate_v1": ("last_assistant", "truncate"),
    "sft_tokenize_v1": ("all", "drop"),
    "sft_tokenize_mask_out_prompt_v1": ("assistant", "drop"),
}
_TEMPLATES = ("tulu", "simple_chat", "zephyr", "chatml", "llama3", "qwen")


def translate(given: Given, draft: Draft, *, gpus: int | None) -> None:
    """Map what has a meaning here."""
    is_olmo = "olmo_core" in given.command or "mixer_list" in given
    draft.copy(
        given,
        {
            "model.path": "model_name_or_path",
            "model.tokenizer_path": ("tokenizer_name_or_path", "tokenizer_name"),
            "model.trust_remote_code": "trust_remote_code",
            "model.compile": "compile_model",
            "data.messages_key": "sft_messages_key",
            "data.num_proc": "preprocessing_num_workers",
            "data.cache_dir": "dataset_local_cache_dir",
            "data.sequence_length": "max_seq_length",
            "data.packing": "packing",
            "prepare_only": "cache_dataset_only",
            "parallel.context_parallel_size": ("sequence_parallel_size", "cp_degree"),
            "train.weight_decay": "weight_decay",
            "train.logging_steps": "logging_steps",
            "tracking.experiment": ("wandb_project_name", "wandb_project"),
            "seed": "seed",
        },
        {"data.sequence_length": 4096, "data.packing": is_olmo},
    )
    _sources(draft, given)
    _training(draft, given, gpus, is_olmo=is_olmo)
    _lora(draft, given)
    default = ["wandb"] if given.take("with_tracking") not in OFF else ["none"]
    if default == ["none"]:
        given.take("report_to")
    meanings.trackers(draft, given, "report_to", default=default)
    if default == ["none"]:
        draft.set("tracking.backends", ["jsonl"], "with_tracking is not set")
    meanings.run_folder(draft, given, "output_dir", given.name_of("exp_name", "run_name"))
    draft.set("model.dtype", "bf16", "open-instruct trains in bf16")
    if (path := given.take("resume_from_checkpoint")) not in (*OFF, True):
        draft.cannot("resume_from_checkpoint", path, "their checkpoints cannot be read")


def _sources(draft: Draft, given: Given) -> None:
    entries = _mixture(given)
    count = given.take("max_train_samples")
    splits = given.take("dataset_mixer_list_splits", "mixer_list_splits", default=["train"])
    splits = [splits] if isinstance(splits, str) else splits
    for index, entry in enumerate(entries):
        entry["split"] = str(splits[index if index < len(splits) else -1])
    if count is not None and len(entries) == 1:
        entries = [
            {"path": entries[0]["path"], "split": entries[0]["split"], "samples": int(count)}
        ]
    elif count is not None:
        draft.cannot("max_train_samples", count, "of all sources; set samples of each")
    if entries:
        draft.set("data.train", entries, "dataset mixer")
    template = given.take("chat_template_name")
    if template in _TEMPLATES:
        draft.set("data.chat_template", template, f"chat_template_name: {template}")
    elif template is not None:
        draft.cannot(
            "chat_template_name",
            template,
            "null takes the tokenizer's own; or give a Jinja file as data.chat_template",
        )
    _transforms(draft, given)


def _mixture(given: Given) -> list[dict[str, Any]]:
    """The sources: a list of names and shares in turn, a mapping, or one data set."""
    mixer = given.take("dataset_mixer_list", "mixer_list")
    if isinstance(mixer, list):
        pairs = zip(mixer[::2], mixer[1::2], strict=False)
        return [_entry(str(path), share) for path, share in pairs]
    names = [each for each in given.left() if each.startswith("dataset_mixer.")]
    entries = [_entry(name.removeprefix("dataset_mixer."), given.take(name)) for name in names]
    name = given.take("dataset_name")
    return [*entries, {"path": str(name)}] if name else entries


def _transforms(draft: Draft, given: Given) -> None:
    """Which turns are trained on, and what becomes of long samples, by the name of a function."""
    named = given.take("dataset_transform_fn", "transform_fn")
    names = [named] if isinstance(named, str) else named or ["sft_tulu_tokenize_and_truncate_v1"]
    for name in names:
        if name in _TRANSFORMS:
            turns, long = _TRANSFORMS[name]
            draft.set("data.train_on", turns, f"dataset_transform_fn: {name}")
            draft.set("data.overlong", long, f"dataset_transform_fn: {name}")
        elif not str(name).endswith("filter_v1"):
            draft.cannot("dataset_transform_fn", name, "see data.train_on and data.overlong")


def _entry(path: str, share: Any) -> dict[str, Any]:
    """A share with a dot is a multiple of what there is, a whole number a count."""
    text = str(share)
    if "." in text:
        return {"path": path} if float(text) == 1 else {"path": path, "weight": float(text)}
    return {"path": path, "samples": int(text)}


def _training(draft: Draft, given: Given, gpus: int | None, *, is_olmo: bool) -> None:
    rate = 8e-5 if is_olmo else 2e-5
    meanings.learning_rate(draft, given, "learning_rate", default=rate)
    meanings.clip(draft, given, "clip_grad_norm", "max_grad_norm", default=-1.0)
    meanings.schedule(draft, given, "lr_scheduler_type", default="linear")
    meanings.min_rate(draft, given, "final_lr_ratio")
    meanings.warmup(draft, given, steps="warmup_steps", ratio="warmup_ratio", default=0.03)
    meanings.epochs(draft, given, "num_train_epochs", "num_epochs", default=3 if is_olmo else 2)
    meanings.max_steps(draft, given, "max_train_steps")
    meanings.recompute(draft, given, "gradient_checkpointing", default=False)
    meanings.attention(draft, given, "attn_implementation")
    reduction = given.take("reduce_loss", default="mean")
    if reduction == "sum":
        draft.set("train.loss_reduction", "sum", "reduce_loss: sum")
    meanings.keep_last(draft, given, "keep_last_n_checkpoints")
    steps = given.take("checkpointing_steps", default=500 if is_olmo else None)
    if steps == "epoch":
        draft.cannot("checkpointing_steps", steps, "set train.save_steps to the steps of an epoch")
    elif steps is not None:
        draft.set("train.save_steps", int(steps), f"checkpointing_steps: {steps}")
    counts = hf_arguments.device_rows(given, 8)
    meanings.rows_by_device(draft, given, counts, gpus, packed=is_olmo)


def _lora(draft: Draft, given: Given) -> None:
    is_quantized = given.take("use_qlora") not in OFF
    if given.take("use_lora") in OFF and not is_quantized:
        names = ("lora_rank", "lora_alpha", "lora_dropout")
        meanings.leave(draft, given, names, "use_lora is not set")
        return
    meanings.adapters(
        draft,
        given,
        rank=("lora_rank", 64),
        alpha=("lora_alpha", 16),
        dropout=("lora_dropout", 0.1),
    )
    draft.set("lora.target_modules", ["all-linear"], "open-instruct adapts every projection")
    if is_quantized:
        draft.set("lora.quantize_base", "nf4", "use_qlora: true")
