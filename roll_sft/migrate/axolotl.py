"""axolotl's YAML.

https://docs.axolotl.ai/docs/config-reference.html
"""

from typing import Any

from roll_sft.migrate import meanings
from roll_sft.migrate.draft import OFF, Draft
from roll_sft.migrate.given import Given

NAME = "axolotl"
NOT_NEEDED = {
    "streaming": "data is always streamed",
    "eval_sample_packing": "evaluation packs as training does",
    "sample_packing_*": "packs are planned over the whole epoch",
    "pad_to_sequence_len": "packs are padded as the layout needs",
    "multipack_real_batches": "packs are planned over the whole epoch",
    "batch_flattening": "packs have no padding between samples",
    "eval_batch_size": "evaluation packs as training does",
    "tf32": "torch's default",
    "gradient_checkpointing_kwargs*": "layers are recomputed as Megatron-Core does it",
    "fsdp*": "the distributed optimizer splits optimizer states over data-parallel ranks",
    "dp_*": "what the layout leaves is data parallel",
    "deepspeed": "the distributed optimizer splits optimizer states over data-parallel ranks",
    "ddp_*": "gradients are reduced as Megatron-Core does it",
    "experts_implementation": "experts are Megatron-Core's",
    "hf_mlflow_log_artifacts": "artifacts lie in the run's folder",
    "save_safetensors": "models are exported as safetensors",
    "plugins": "the loss is computed in chunks, and kernels are fused here too",
    "liger_*": "the loss is computed in chunks, and kernels are fused here too",
    "cut_cross_entropy": "the loss is computed in chunks",
    "model_type": "config.json names the family",
    "tokenizer_type": "tokenizers are always fast ones",
    "is_*_derived_model": "config.json names the family",
    "group_by_length": "packs hold samples of any length",
    "dataloader_*": "batches come from a token cache",
    "low_cpu_mem_usage": "each rank reads its own part of the weights",
    "strict": "every key of theirs is accounted for here",
    "local_rank": "the workers are Ray's",
    "logging_dir": "logs lie in the run's folder",
    "heads_k_stride": "context ranks exchange keys by head here",
    "ring_attn_func": "context ranks exchange keys by head here",
    "use_tensorboard": "read as a tracker",
    "lora_mlp_kernel": "adapters have kernels of their own here",
    "lora_qkv_kernel": "adapters have kernels of their own here",
    "lora_o_kernel": "adapters have kernels of their own here",
    "lora_embedding_kernel": "adapters have kernels of their own here",
    "special_tokens.pad_token": "packs are padded with any token, which no loss covers",
}
UNSUPPORTED = {
    "base_model_config": "give the model's own folder as model.path",
    "revision_of_model": "download that revision, and give its folder as model.path",
    "default_system_message": "give rows a system message",
    "eot_tokens": "the chat template decides how a turn ends",
    "special_tokens*": "change tokenizer_config.json, and give it as model.tokenizer_path",
    "tokens": "write the larger embedding first",
    "added_tokens_overrides*": "change tokenizer.json, and give it as model.tokenizer_path",
    "val_set_size": "write a file of its own for validation",
    "dataset_exact_deduplication": "remove equal rows from the files first",
    "skip_prepare_dataset": "rows of token ids are not read; give texts",
    "min_sample_len": "remove short rows from the files first",
    "max_prompt_len": "remove long rows from the files first",
    "evals_per_epoch": "set train.eval_steps to a number of steps",
    "saves_per_epoch": "set train.save_steps to a number of steps",
    "cosine_constant_lr_ratio": "choose train.lr_scheduler_type=wsd",
    "early_stopping_patience": "set train.early_stopping to a validation set, and its patience",
    "activation_offloading": "set train.recompute",
    "lora_target_parameters": "routed experts have no adapters here; leave it out",
    "peft_use_dora": "not LoRA; leave it out",
    "loraplus_*": "set train.learning_rate_factors",
    "relora*": "not LoRA; leave it out",
    "lora_model_dir": "set lora.adapter_path",
    "expert_parallel*": "set parallel.expert_model_parallel_size",
    "quantize_moe_experts": "experts are not quantised",
    "load_in_8bit": "set lora.quantize_base=nf4",
    "use_comet": "choose a tracker of tracking.backends",
    "comet_*": "choose a tracker of tracking.backends",
    "wandb_entity": "set WANDB_ENTITY",
    "wandb_watch": "gradients are not sent to trackers",
    "wandb_log_model": "the export lies in the run's folder",
    "hub_*": "upload the folder hf/ with huggingface_hub",
    "push_dataset_to_hub": "upload the data yourself",
    "neftune_noise_alpha": "set train.neftune_noise_alpha",
    "loss_watchdog_*": "set train.on_nan",
    "curriculum_sampling": "samples are shuffled by seed",
    "use_eaft": "the loss is cross-entropy",
    "unfrozen_parameters": "set train.freeze by patterns of modules",
    "lr_groups": "set train.learning_rate_factors",
    "embedding_lr*": "set train.learning_rate_factors={embeddings: FACTOR}",
    "generate_samples": "set evaluation.prompts",
    "rl": "supervised fine-tuning alone is trained here",
    "roles*": "messages have the roles of the chat template",
}
_FIELDS = {
    "field_messages": "data.messages_key",
    "field_tools": "data.tools_key",
    "field_instruction": "data.prompt_key",
    "field_input": "data.query_key",
    "field_output": "data.response_key",
    "field_system": "data.system_key",
}
_OF_SOURCE = {"path", "data_files", "split", "type", "ds_type", "field", "roles_to_train"}
_OF_SOURCE |= {"train_on_eos", "train_on_eot", "chat_template", *_FIELDS}
_OF_SOURCE |= {"message_property_mappings"}
# What messages call role and content, as both are read here.
_KNOWN_NAMES = (
    None,
    {"role": "from", "content": "value"},
    {"role": "role", "content": "content"},
)


def translate(given: Given, draft: Draft, *, gpus: int | None) -> None:
    """Map what has a meaning here."""
    draft.copy(
        given,
        {
            "model.path": "base_model",
            "model.tokenizer_path": "tokenizer_config",
            "model.trust_remote_code": "trust_remote_code",
            "data.sequence_length": "sequence_len",
            "data.cache_dir": "dataset_prepared_path",
            "data.shuffle": "shuffle_merged_datasets",
            "data.num_proc": ("dataset_num_proc", "dataset_processes"),
            "data.packing": "sample_packing",
            "parallel.context_parallel_size": (
                "context_parallel_size",
                "sequence_parallel_degree",
            ),
            "parallel.tensor_model_parallel_size": "tensor_parallel_size",
            "train.weight_decay": "weight_decay",
            "train.adam_beta1": "adam_beta1",
            "train.adam_beta2": "adam_beta2",
            "train.adam_eps": "adam_epsilon",
            "train.eval_steps": "eval_steps",
            "train.logging_steps": "logging_steps",
            "tracking.mlflow_uri": "mlflow_tracking_uri",
            "tracking.experiment": ("mlflow_experiment_name", "wandb_project"),
            "model.compile": "torch_compile",
            "seed": "seed",
        },
        {"data.sequence_length": 512, "data.packing": False},
    )
    _sources(draft, given)
    long = given.take("excess_length_strategy", default="drop")
    ours = {"drop": "drop", "truncate": "truncate", "raise": "error"}.get(str(long), str(long))
    draft.set("data.overlong", ours, f"excess_length_strategy: {long}")
    _training(draft, given)
    _rows(draft, given, gpus)
    _adapters(draft, given)
    _trackers(draft, given)
    meanings.run_folder(draft, given, "output_dir", given.name_of("wandb_name", "mlflow_run_name"))


def _sources(draft: Draft, given: Given) -> None:
    for key, theirs in (("data.train", "datasets"), ("data.validation", "test_datasets")):
        listed = given.take(theirs)
        if not isinstance(listed, list):
            continue
        entries = [_source(draft, each, f"{theirs}[{index}]") for index, each in enumerate(listed)]
        draft.set(key, entries, theirs)
    pretraining = given.take("pretraining_dataset")
    if isinstance(pretraining, str):
        meanings.sources(draft, "data.train", pretraining, f"pretraining_dataset: {pretraining}")
    template = given.take("chat_template_jinja") or given.take("chat_template")
    if template not in (None, "tokenizer_default"):
        _template(draft, template)
    if given.take("train_on_inputs"):
        draft.set("data.train_on", "all", "train_on_inputs: true")
    kwargs = {
        name.removeprefix("chat_template_kwargs."): given.take(name)
        for name in given.left()
        if name.startswith("chat_template_kwargs.")
    }
    if kwargs:
        draft.set("data.template_kwargs", kwargs, "chat_template_kwargs")


def _source(draft: Draft, about: dict[str, Any], where: str) -> dict[str, Any]:
    """The entry of one source; its columns become keys of `data`, which hold for all sources."""
    kind = about.get("type")
    columns = {**about, **kind} if isinstance(kind, dict) else about
    if kind == "completion":
        draft.set("data.text_key", str(about.get("field") or "text"), f"{where}.field")
    elif kind not in (None, "alpaca", "chat_template", "sharegpt") and columns is about:
        draft.cannot(f"{where}.type", kind, "write the rows as messages, or prompt and answer")
    for theirs, ours in _FIELDS.items():
        if columns.get(theirs):
            draft.set(ours, str(columns[theirs]), f"{where}.{theirs}")
    if about.get("chat_template") not in (None, "tokenizer_default"):
        _template(draft, about["chat_template"])
    _refuse_parts(draft, about, where)
    path = about.get("data_files") or about.get("path")
    path = path[0] if isinstance(path, list) and len(path) == 1 else path
    if isinstance(path, list):
        draft.cannot(f"{where}.data_files", path, "give each file an entry, or a pattern")
    entry = {"path": str(path)}
    return entry | ({"split": str(about["split"])} if about.get("split") else {})


def _refuse_parts(draft: Draft, about: dict[str, Any], where: str) -> None:
    """What a source asks for that has no counterpart."""
    for name, known, why in (
        ("roles_to_train", (None, ["assistant"], ["gpt", "assistant"]), "see data.train_on"),
        ("train_on_eos", (None, "turn", "all"), "each trained turn ends with its token"),
        ("train_on_eot", (None, "turn", "all"), "each trained turn ends with its token"),
        ("message_property_mappings", _KNOWN_NAMES, "rename the properties in the rows"),
    ):
        if about.get(name) not in known:
            draft.cannot(f"{where}.{name}", about[name], why)
    for name, value in about.items():
        if name not in _OF_SOURCE and value not in OFF:
            draft.cannot(f"{where}.{name}", value, "no counterpart for one source")


def _template(draft: Draft, name: Any) -> None:
    text = str(name)
    if "{%" in text or "{{" in text:
        draft.cannot("chat_template", text, "write it to a .jinja file for data.chat_template")
        return
    known = {"qwen_25": "qwen", "qwen3": "qwen", "qwen2": "qwen", "mistral_v1": "mistral"}
    draft.set("data.chat_template", known.get(text, text), f"chat_template: {text}")


def _training(draft: Draft, given: Given) -> None:
    meanings.learning_rate(draft, given, "learning_rate", default=None)
    meanings.clip(draft, given, "max_grad_norm")
    meanings.optimizer(draft, given, "optimizer")
    meanings.schedule(draft, given, "lr_scheduler", default="cosine")
    meanings.min_rate(draft, given, "cosine_min_lr_ratio")
    meanings.warmup(draft, given, steps="warmup_steps", ratio="warmup_ratio")
    meanings.epochs(draft, given, "num_epochs", default=1.0)
    meanings.max_steps(draft, given, "max_steps")
    meanings.keep_last(draft, given, "save_total_limit")
    strategy, steps = given.take("save_strategy"), given.take("save_steps")
    if strategy in ("no", False):
        draft.set("checkpoint.save", False, "save_strategy: no")
    elif isinstance(steps, int):
        draft.set("train.save_steps", steps, f"save_steps: {steps}")
    elif strategy not in (None, "steps", "best") or steps is not None:
        draft.cannot("save_strategy", strategy or steps, "set train.save_steps")
    if given.take("eval_strategy") == "epoch":
        draft.cannot("eval_strategy", "epoch", "set train.eval_steps to the steps of an epoch")
    if given.take("save_only_model"):
        draft.set("checkpoint.save_optimizer", False, "save_only_model: true")
    if given.take("load_best_model_at_end"):
        draft.notes.append(
            "load_best_model_at_end: set checkpoint.keep_best to the name of a validation set"
        )
    for name in ("resume_from_checkpoint", "auto_resume_from_checkpoints"):
        if (value := given.take(name)) not in (*OFF, True):
            draft.cannot(name, value, "their checkpoints cannot be read; give the exported model")
    _kernels(draft, given)


def _kernels(draft: Draft, given: Given) -> None:
    """Types, attention and recomputation."""
    if given.take("float32") not in OFF:
        draft.set("model.dtype", "fp32", "float32: true")
    else:
        meanings.dtype_flags(draft, given)
    names = ("flash_attention", "sdp_attention", "flex_attention", "xformers_attention")
    meanings.attention(draft, given, "attn_implementation", "attention")
    for name, kernel in zip(names, ("flash", "sdpa", "auto", "auto"), strict=True):
        if given.take(name) not in OFF:
            draft.set("model.attention_backend", kernel, f"{name}: true")
    offload = given.values.get("gradient_checkpointing")
    if isinstance(offload, str):
        draft.cannot("gradient_checkpointing", offload, "layers are recomputed, not offloaded")
    meanings.recompute(draft, given, "gradient_checkpointing", default=False)


def _rows(draft: Draft, given: Given, gpus: int | None) -> None:
    each = int(given.number("micro_batch_size", default=1))
    accumulated, whole = given.take("gradient_accumulation_steps"), given.take("batch_size")
    if accumulated is None and whole is not None:
        accumulated = int(whole) // each
    counts = each, int(accumulated or 1)
    meanings.rows_by_device(draft, given, counts, gpus, packed=bool(draft.value("data.packing")))


def _adapters(draft: Draft, given: Given) -> None:
    kind = given.take("adapter")
    names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_linear")
    if kind in OFF:
        more = ("lora_modules_to_save", "peft_use_rslora", "load_in_4bit")
        meanings.leave(draft, given, (*names, *more), "no adapter is set")
        return
    if kind not in ("lora", "qlora"):
        draft.cannot("adapter", kind, "lora and qlora alone")
        return
    meanings.adapters(
        draft,
        given,
        rank=("lora_r", 8),
        alpha=("lora_alpha", 16),
        dropout=("lora_dropout", None),
        target_modules=("lora_target_modules", None),
        modules_to_save=("lora_modules_to_save", None),
        use_rslora=("peft_use_rslora", None),
    )
    if given.take("lora_target_linear"):
        draft.set("lora.target_modules", ["all-linear"], "lora_target_linear: true")
    if given.take("load_in_4bit") not in OFF or kind == "qlora":
        draft.set("lora.quantize_base", "nf4", f"adapter: {kind}")


def _trackers(draft: Draft, given: Given) -> None:
    named = {"mlflow": "use_mlflow", "tensorboard": "use_tensorboard", "wandb": "use_wandb"}
    ours = [tracker for tracker, flag in named.items() if given.take(flag) not in OFF]
    if draft.lines.get("tracking.experiment", (None, ""))[1].startswith("wandb_project"):
        ours.append("wandb")
    if "tracking.mlflow_uri" in draft.lines and "mlflow" not in ours:
        ours.append("mlflow")
    draft.set("tracking.backends", ["jsonl", *dict.fromkeys(ours)], "trackers that are named")
