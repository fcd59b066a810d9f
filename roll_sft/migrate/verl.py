"""verl's `sft_trainer_engine.yaml`, and the overrides of its command line.

https://verl.readthedocs.io/
"""

from roll_sft.migrate import meanings
from roll_sft.migrate.draft import OFF, Draft
from roll_sft.migrate.given import Given

NAME = "verl"
_FUSED = "kernels are fused here too"
NOT_NEEDED = {
    "hydra.*": "Hydra's own",
    "defaults": "Hydra's own",
    "engine": "a group of Hydra's; training is Megatron-Core's here",
    "model": "a group of Hydra's",
    "optim": "a group of Hydra's",
    "_target_": "verl's classes",
    "*._target_": "verl's classes",
    "model.use_liger": _FUSED,
    "model.use_fused_kernels": _FUSED,
    "model.fused_kernel_options*": _FUSED,
    "model.use_remove_padding": "packs have no padding between samples",
    "model.use_shm": "each rank reads its own part of the weights",
    "model.enable_activation_offload": "set train.recompute",
    "data.use_shm": "tokens are mapped from the cache",
    "data.num_workers": "batches come from a token cache",
    "data.balance_dp_token": "the plan balances data-parallel ranks",
    "data.ignore_input_ids_mismatch": "chats are rendered whole",
    "data.val_max_samples": "a validation set is evaluated whole",
    "optim.optimizer_impl": "AdamW is torch's",
    "optim.use_precision_aware_optimizer": "AdamW's states are fp32",
    "checkpoint.load_contents*": "a checkpoint is loaded whole",
    "checkpoint.async_save": "see checkpoint.async_save",
    "trainer.balance_batch": "the plan balances data-parallel ranks",
    "trainer.n_gpus_per_node": "workers are placed by Ray",
    "trainer.log_val_generations": "evaluation.prompts are logged",
    "engine.strategy": "training is Megatron-Core's here",
    "engine.fsdp_size": "the distributed optimizer splits optimizer states",
    "engine.wrap_policy*": "weights are not split over data-parallel ranks",
    "engine.reshard_after_forward": "weights are not split over data-parallel ranks",
    "engine.forward_prefetch": "weights are not split over data-parallel ranks",
    "engine.model_dtype": "model.dtype decides",
    "engine.mixed_precision*": "model.dtype decides",
    "engine.use_dist_checkpointing": "checkpoints are torch_dist",
    "engine.use_mbridge": "weights are mapped by family",
    "engine.vanilla_mbridge": "weights are mapped by family",
    "engine.use_remove_padding": "packs have no padding between samples",
}
UNSUPPORTED = {
    "model.hf_config_path": "give the model's own folder as model.path",
    "model.override_config*": "the model is built from its config.json",
    "model.external_lib": "no code of others is loaded",
    "model.tiled_mlp*": "set train.recompute",
    "model.mtp*": "layers of multi-token prediction are not trained",
    "data.custom_cls*": "write the rows to a file",
    "data.enable_thinking_key": "set data.template_kwargs.enable_thinking",
    "data.enable_thinking_default": "set data.template_kwargs.enable_thinking",
    "optim.override_optimizer_config*": "AdamW's parameters have keys of their own",
    "optim.muon_*": "AdamW is the only optimizer here",
    "optim.lr_wsd_*": "set train.wsd_decay_ratio; the decay is linear here",
    "optim.lr_warmup_init": "the learning rate rises from 0",
    "optim.num_cycles": "cosine falls once here",
    "optim.zero_indexed_step": "the first step has number 1",
    "engine.expert_tensor_parallel_size": "set parallel.expert_model_parallel_size",
    "engine.*offload*": "set train.recompute, or more GPUs",
    "engine.dynamic_context_parallel": "set parallel.context_parallel_size",
    "engine.use_megatron_fsdp": "the distributed optimizer splits optimizer states",
    "engine.qat*": "choose bf16",
    "engine.router_replay*": "experts are chosen anew in each pass",
    "engine.override_*": "set the keys that are here by their own names",
    "trainer.default_hdfs_dir": "copy the run's folder yourself",
    "trainer.profile_interval": "steps.jsonl has times and memory",
    "profiler*": "steps.jsonl has times and memory",
}


def translate(given: Given, draft: Draft, *, gpus: int | None) -> None:
    """Map what has a meaning here."""
    sizes = ("tensor", "pipeline", "virtual_pipeline", "expert")
    draft.copy(
        given,
        {
            "model.path": "model.path",
            "model.tokenizer_path": "model.tokenizer_path",
            "model.trust_remote_code": "model.trust_remote_code",
            "data.messages_key": "data.messages_key",
            "data.tools_key": "data.tools_key",
            "data.sequence_length": "data.max_length",
            "train.weight_decay": "optim.weight_decay",
            "parallel.context_parallel_size": (
                "engine.context_parallel_size",
                "engine.ulysses_sequence_parallel_size",
            ),
            "parallel.sequence_parallel": "engine.sequence_parallel",
            "parallel.use_distributed_optimizer": "engine.use_distributed_optimizer",
            "tracking.experiment": "trainer.project_name",
            "seed": ("trainer.seed", "engine.seed"),
        }
        | {
            f"parallel.{size}_model_parallel_size": f"engine.{size}_model_parallel_size"
            for size in sizes
        },
        {"data.sequence_length": 1024, "train.weight_decay": 0.01, "seed": 1},
    )
    if draft.value("parallel.tensor_model_parallel_size") == 1:
        draft.lines.pop("parallel.sequence_parallel", None)
    _sources(draft, given)
    meanings.dtype(draft, given, "engine.dtype", default="bfloat16")
    meanings.nodes_of_file(
        draft, given, gpus, each="trainer.n_gpus_per_node", nodes="trainer.nnodes"
    )
    _training(draft, given)
    _lora(draft, given)
    meanings.trackers(draft, given, "trainer.logger", default=["console"])
    meanings.run_folder(draft, given, "trainer.default_local_dir", "trainer.experiment_name")
    mode, path = given.take("trainer.resume_mode"), given.take("trainer.resume_from_path")
    if mode == "disable":
        draft.set("resume", "none", "resume_mode: disable")
    elif mode == "resume_path" or path not in OFF:
        draft.cannot("trainer.resume_from_path", path, "their checkpoints cannot be read")
    if (device := given.take("trainer.device")) not in (None, "cuda", "cpu"):
        draft.cannot("trainer.device", device, "GPUs and CPUs alone")


def _sources(draft: Draft, given: Given) -> None:
    count = given.take("data.train_max_samples", default=-1)
    for key, theirs in (("data.train", "data.train_files"), ("data.validation", "data.val_files")):
        files = given.take(theirs)
        if files not in OFF:
            also = {"samples": int(count)} if int(count) > 0 and key == "data.train" else {}
            meanings.sources(draft, key, files, theirs, **also)
    template = given.take("model.custom_chat_template")
    if template is not None:
        draft.cannot(
            "model.custom_chat_template",
            template,
            "write it to a .jinja file for data.chat_template",
        )
    for name in [each for each in given.left() if each.startswith("data.apply_chat_template_kw")]:
        value = given.take(name)
        if value not in OFF:
            kwargs = {**draft.value("data.template_kwargs"), name.rpartition(".")[2]: value}
            draft.set("data.template_kwargs", kwargs, "apply_chat_template_kwargs")
    long = given.take("data.truncation", default="error")
    if long == "left":
        draft.cannot("data.truncation", long, "samples are cut at their end, or dropped")
    else:
        ours = {"error": "error", "right": "truncate"}.get(str(long), str(long))
        draft.set("data.overlong", ours, f"truncation: {long}")
    mode = given.take("data.pad_mode", default="no_padding")
    draft.set("data.packing", mode == "no_padding", f"pad_mode: {mode}")


def _training(draft: Draft, given: Given) -> None:
    meanings.learning_rate(draft, given, "optim.lr", default=1e-3)
    meanings.betas(draft, given, "optim.betas", default=(0.9, 0.999))
    meanings.clip(draft, given, "optim.clip_grad")
    kind = given.take("optim.optimizer")
    if kind is not None and not str(kind).lower().startswith("adam"):
        draft.cannot("optim.optimizer", kind, "AdamW is the only optimizer here")
    meanings.schedule(
        draft, given, "optim.lr_scheduler_type", "optim.lr_decay_style", default="constant"
    )
    draft.copy(given, {"train.min_learning_rate": "optim.min_lr"})
    meanings.min_rate(draft, given, "optim.min_lr_ratio")
    meanings.warmup(
        draft, given, steps="optim.lr_warmup_steps", ratio="optim.lr_warmup_steps_ratio"
    )
    meanings.epochs(draft, given, "trainer.total_epochs", default=4)
    meanings.max_steps(draft, given, "trainer.total_training_steps")
    for theirs, ours in (("save_freq", "train.save_steps"), ("test_freq", "train.eval_steps")):
        steps = given.take(f"trainer.{theirs}", default=-1)
        if isinstance(steps, int) and steps > 0:
            draft.set(ours, steps, f"trainer.{theirs}: {steps}")
        elif isinstance(steps, str):
            draft.cannot(f"trainer.{theirs}", steps, f"set {ours} to a number of steps")
    meanings.keep_last(draft, given, "trainer.max_ckpt_to_keep")
    saved = given.take("checkpoint.save_contents")
    if isinstance(saved, list):
        if "optimizer" not in saved:
            draft.set("checkpoint.save_optimizer", False, f"save_contents: {saved}")
        if "hf_model" in saved:
            draft.set("checkpoint.hf_export", "every_save", f"save_contents: {saved}")
    meanings.recompute(draft, given, "model.enable_gradient_checkpointing", default=True)
    part = given.take("engine.override_transformer_config.recompute_granularity")
    if part is not None:
        draft.set("train.recompute", str(part), f"recompute_granularity: {part}")
    _batch(draft, given)


def _batch(draft: Draft, given: Given) -> None:
    rows = int(given.number("data.train_batch_size", default=256))
    each = int(given.number("data.micro_batch_size_per_gpu", default=4))
    dynamic = given.take("data.use_dynamic_bsz", default=True)
    tokens = given.take("data.max_token_len_per_gpu", default=8192)
    meanings.batch(
        draft,
        rows,
        "data.train_batch_size",
        micro_rows=1 if dynamic else each,
        drops_last=True,
    )
    if dynamic:
        context = int(draft.value("parallel.context_parallel_size"))
        draft.set(
            "train.micro_batch_tokens",
            max(int(tokens) * context, int(draft.value("data.sequence_length"))),
            f"max_token_len_per_gpu: {tokens}, times {context} context ranks",
        )


def _lora(draft: Draft, given: Given) -> None:
    section = "model.lora." if given.has_below("model.lora") else "model."
    rank_key = "model.lora.rank" if section == "model.lora." else "model.lora_rank"
    rank = int(given.number(rank_key, default=0))
    names = ("lora_alpha", "target_modules", "lora.alpha", "lora.dropout", "lora.target_modules")
    if not rank:
        for name in names:
            given.take(f"model.{name}")
        return
    draft.set("lora.rank", rank, f"{rank_key}: {rank}")
    meanings.adapters(
        draft,
        given,
        alpha=("model.lora.alpha" if section == "model.lora." else "model.lora_alpha", 16),
        dropout=("model.lora.dropout", None),
        target_modules=(f"{section}target_modules", "all-linear"),
    )
