"""ms-swift's `megatron sft`: command lines and YAML.

https://swift.readthedocs.io/en/latest/Megatron-SWIFT/Command-line-parameters.html
"""

from roll_sft.migrate import meanings
from roll_sft.migrate.draft import OFF, Draft
from roll_sft.migrate.given import Given

NAME = "ms-swift"
_FUSED = "Megatron-Core's default, or done here"
NOT_NEEDED = {
    "*_fusion": _FUSED,
    "overlap_*": _FUSED,
    "cross_entropy_*": "the loss is computed in chunks",
    "padding_free": "packs have no padding between samples",
    "recompute_method": "whole layers are recomputed",
    "recompute_num_layers": "whole layers are recomputed",
    "recompute_modules": "the modules of selective are Megatron-Core's",
    "load_safetensors": "weights are read from safetensors",
    "no_save_rng": "a resumed run goes on exactly",
    "no_load_*": "a resumed run goes on exactly",
    "num_workers": "batches come from a token cache",
    "dataloader_*": "batches come from a token cache",
    "use_flash_attn": "the fastest kernel that works is taken",
    "finetune": "training begins from the weights of model.path",
    "moe_permute_fusion": _FUSED,
    "moe_grouped_gemm": _FUSED,
    "moe_shared_expert_overlap": _FUSED,
    "moe_token_dispatcher_type": "experts exchange tokens by all-to-all",
    "tensorboard_dir": "events lie in the run's folder",
    "model_type": "config.json names the family",
    "use_hf": "hub ids are Hugging Face's",
    "load_from_cache_file": "the token cache is made anew where anything changed",
    "strict": "data.on_bad_row decides",
    "torch_dtype": "model.dtype decides",
    "merge_lora": "checkpoint.hf_export decides",
    "split_dataset_ratio": "off",
    "logging_steps": "train.logging_steps",
    "save_strategy": "train.save_steps decides",
}
UNSUPPORTED = {
    "freeze_*": "set train.freeze by patterns of modules",
    "moe_aux_loss_coeff": "set moe.aux_loss_coef",
    "moe_*": "experts are as config.json of the model says",
    "mtp_*": "layers of multi-token prediction are not trained",
    "fp8*": "choose bf16",
    "optimizer": "AdamW is the only optimizer here",
    "enable_dft_loss": "the loss is cross-entropy",
    "enable_channel_loss": "the loss is of all sources together",
    "mcore_model": "their checkpoints cannot be read; give the Hugging Face folder as model.path",
    "load": "their checkpoints cannot be read; give the Hugging Face folder as model.path",
    "adapter_load": "set lora.adapter_path",
    "mcore_adapter": "set lora.adapter_path",
    "system": "give rows a system message",
    "model_author": "write it into the rows of self-cognition",
    "model_name": "write it into the rows of self-cognition",
    "agent_template": "the chat template writes tools",
    "split_dataset_ratio": "write a file of its own for validation",
    "streaming": "data is always streamed",
}
_SIZES = ("tensor", "pipeline", "virtual_pipeline", "expert")


def translate(given: Given, draft: Draft, *, gpus: int | None) -> None:
    """Map what has a meaning here."""
    packing = bool(given.take("packing", default=False))
    draft.copy(
        given,
        {
            "model.path": "model",
            "data.sequence_length": "max_length",
            "data.num_proc": "dataset_num_proc",
            "train.weight_decay": "weight_decay",
            "train.min_learning_rate": "min_lr",
            "train.adam_beta1": "adam_beta1",
            "train.adam_beta2": "adam_beta2",
            "train.adam_eps": "adam_eps",
            "train.logging_steps": ("logging_steps", "log_interval"),
            "parallel.context_parallel_size": "context_parallel_size",
            "parallel.sequence_parallel": "sequence_parallel",
            "parallel.use_distributed_optimizer": "use_distributed_optimizer",
            "checkpoint.async_save": "async_save",
            "tracking.experiment": ("wandb_project",),
            "seed": "seed",
        }
        | {
            f"parallel.{size}_model_parallel_size": f"{size}_model_parallel_size" for size in _SIZES
        },
        {"train.weight_decay": 0.1, "train.adam_beta2": 0.95},
    )
    draft.set("data.packing", packing, f"packing is {str(packing).lower()}")
    _sources(draft, given)
    meanings.dtype(draft, given, "torch_dtype", default="bf16")
    meanings.attention(draft, given, "attention_backend", "attn_impl")
    _training(draft, given)
    meanings.world_size(draft, given, gpus)
    meanings.batch(
        draft,
        int(given.number("global_batch_size", default=16)),
        "global_batch_size",
        packed=packing,
        micro_rows=int(given.number("micro_batch_size", default=1)),
        drops_last=True,
    )
    _lora(draft, given)
    meanings.trackers(draft, given, "report_to", default=["tensorboard"])
    output = given.name_of("output_dir", "save") or "output_dir"
    meanings.run_folder(draft, given, output, given.name_of("wandb_exp_name"))


def _sources(draft: Draft, given: Given) -> None:
    for key, theirs in (("data.train", "dataset"), ("data.validation", "val_dataset")):
        listed = given.take(theirs)
        if listed in OFF:
            continue
        entries = []
        for each in [listed] if isinstance(listed, str) else listed:
            path, _, count = str(each).partition("#")
            is_counted = count.isdigit() and key == "data.train"
            entries.append({"path": path} | ({"samples": int(count)} if is_counted else {}))
        draft.set(key, entries, f"{theirs}: {listed}")
    long = given.take("truncation_strategy", default="delete")
    ours = {"delete": "drop", "right": "truncate"}.get(str(long))
    if ours is None:
        draft.cannot("truncation_strategy", long, "samples are dropped, or cut at their end")
    else:
        draft.set("data.overlong", ours, f"truncation_strategy: {long}")
    turns = given.take("loss_scale", default="default")
    known = {"default": "assistant", "last_round": "last_assistant", "all": "all"}
    if turns in known:
        draft.set("data.train_on", known[str(turns)], f"loss_scale: {turns}")
    else:
        draft.cannot("loss_scale", turns, "give rows a weight; turns have none")


def _training(draft: Draft, given: Given) -> None:
    rate = (
        1e-4 if given.values.get("tuner_type", given.values.get("train_type")) == "lora" else 1e-5
    )
    meanings.learning_rate(draft, given, "lr", "learning_rate", default=rate)
    meanings.clip(draft, given, "clip_grad")
    meanings.schedule(draft, given, "lr_decay_style", default="cosine")
    meanings.warmup(draft, given, steps="lr_warmup_iters", ratio="lr_warmup_fraction")
    meanings.epochs(draft, given, "num_train_epochs", "max_epochs", default=1)
    meanings.max_steps(draft, given, "train_iters")
    meanings.keep_last(draft, given, "save_total_limit")
    for ours, names in (
        ("train.save_steps", ("save_steps", "save_interval")),
        ("train.eval_steps", ("eval_steps", "eval_interval")),
    ):
        draft.copy(given, {ours: names})
    part = given.take("recompute_granularity", default="selective")
    draft.set("train.recompute", str(part), f"recompute_granularity: {part}")
    if given.take("no_save_optim") not in OFF:
        draft.set("checkpoint.save_optimizer", False, "no_save_optim: true")
    is_exported = given.take("save_safetensors", default=True)
    draft.set("checkpoint.hf_export", "final" if is_exported else "none", "save_safetensors")


def _lora(draft: Draft, given: Given) -> None:
    if given.take("tuner_type", "train_type", default="full") != "lora":
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "target_modules"):
            given.take(name)
        return
    meanings.adapters(
        draft,
        given,
        rank=("lora_rank", 8),
        alpha=("lora_alpha", 32),
        dropout=("lora_dropout", 0.05),
        target_modules=("target_modules", "all-linear"),
        modules_to_save=("modules_to_save", None),
        use_rslora=("use_rslora", None),
    )
