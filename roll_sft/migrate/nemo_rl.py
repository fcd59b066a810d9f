"""NeMo-RL's `sft.yaml`, and the overrides of `run_sft.py`.

https://docs.nvidia.com/nemo/rl/
"""

from typing import Any

from roll_sft.migrate import meanings
from roll_sft.migrate.draft import OFF, Draft
from roll_sft.migrate.given import Given

NAME = "NeMo-RL"
_FUSED = "Megatron-Core's default, or done here"
_M, _D = "policy.megatron_cfg.", "policy.dtensor_cfg."
NOT_NEEDED = {
    "defaults": "read the file that it names first",
    "sft.val_at_end": "the last step is always evaluated",
    "sft.val_batches": "a validation set is evaluated whole",
    "sft.val_global_batch_size": "a validation set is evaluated whole",
    "sft.val_micro_batch_size": "a validation set is evaluated whole",
    "policy.dynamic_batching*": "packs are planned over the whole epoch",
    "policy.sequence_packing.algorithm": "packs are planned over the whole epoch",
    "policy.sequence_packing.*": "packs are planned over the whole epoch",
    "policy.make_sequence_length_divisible_by": "packs are padded as the layout needs",
    "policy.refit_buffer_size_gb": "weights are not sent to another engine",
    "policy.logprob_*": "no log-probabilities beside the loss",
    "policy.offload_optimizer_for_logprob": "no log-probabilities beside the loss",
    f"{_M}enabled": "training is Megatron-Core's here",
    f"{_D}enabled": "training is Megatron-Core's here",
    f"{_D}_v2": "training is Megatron-Core's here",
    f"{_M}num_layers_in_*": "stages may have unequal numbers of layers",
    f"{_M}distributed_data_parallel_config*": _FUSED,
    f"{_M}*_fusion": _FUSED,
    f"{_M}use_fused_linear_logprobs": _FUSED,
    f"{_M}defer_fp32_logits": _FUSED,
    f"{_M}pipeline_dtype": "model.dtype decides",
    f"{_M}converter_type": "weights are mapped by family",
    f"{_M}layernorm_epsilon": "config.json of the model decides",
    f"{_M}force_overwrite_initial_ckpt": "weights are read from safetensors",
    f"{_M}gradient_accumulation_fusion": _FUSED,
    f"{_M}empty_unused_memory_level": _FUSED,
    f"{_M}optimizer.optimizer": "AdamW is what trains here",
    f"{_M}optimizer.bf16": "model.dtype decides",
    f"{_M}optimizer.fp16": "model.dtype decides",
    f"{_M}optimizer.params_dtype": "master weights are fp32",
    f"{_M}optimizer.sgd_momentum": "AdamW is what trains here",
    f"{_M}optimizer.overlap_cpu_optimizer_d2h_h2d": "optimizer states stay on GPUs",
    f"{_M}scheduler.lr_decay_iters": "the decay ends with the run",
    f"{_M}scheduler.start_weight_decay": "weight decay is constant",
    f"{_M}scheduler.end_weight_decay": "weight decay is constant",
    f"{_M}moe_*": "experts are as config.json of the model says",
    "data.max_input_seq_length": "data.sequence_length decides",
    "data.add_*": "the chat template decides",
    "data.num_workers": "batches come from a token cache",
    "logger.log_dir": "logs lie in the run's folder",
    "logger.monitor_gpus": "steps.jsonl has the peak of memory",
    "logger.gpu_monitoring*": "steps.jsonl has the peak of memory",
    "logger.num_val_samples_to_print": "evaluation.prompts are logged",
    "logger.swanlab*": "choose a tracker of tracking.backends",
    "logger.*.name": "run_name names the run",
    "logger.*.run_name": "run_name names the run",
    "logger.*.log_dir": "logs lie in the run's folder",
    "cluster.*": "workers are placed by Ray",
    "policy.max_grad_norm": "the optimizer's clip_grad decides",
}
UNSUPPORTED = {
    "sft.val_at_start": "the first evaluation is after train.eval_steps",
    "checkpointing.checkpoint_must_save_by": "set train.max_duration",
    "policy.tokenizer.chat_template_kwargs*": "set data.template_kwargs",
    "policy.hf_config_overrides*": "the model is built from its config.json",
    "policy.scheduler*": "set train.lr_scheduler_type and warm-up",
    "policy.reward_model_cfg*": "supervised fine-tuning alone is trained here",
    f"{_M}expert_tensor_parallel_size": "set parallel.expert_model_parallel_size",
    f"{_M}optimizer.optimizer_cpu_offload": "set train.recompute, or more GPUs",
    f"{_M}optimizer.optimizer_offload_fraction": "set train.recompute, or more GPUs",
    f"{_M}optimizer.use_precision_aware_optimizer": "AdamW's states are fp32",
    f"{_M}scheduler.weight_decay_incr_style": "weight decay is constant",
    f"{_M}freeze_moe_router": "set train.freeze=[mlp.gate]",
    f"{_M}fp8_cfg*": "choose bf16",
    f"{_M}env_vars*": "set variables where Ray starts",
    f"{_M}peft.*": "set the section lora",
    f"{_D}cpu_offload": "set train.recompute, or more GPUs",
    f"{_D}custom_parallel_plan": "layers are cut as Megatron-Core cuts them",
    f"{_D}lora_cfg*": "set the section lora",
    f"{_D}env_vars*": "set variables where Ray starts",
    f"{_D}*": "training is Megatron-Core's here",
    "data.*": "give files of messages as data.train",
}


def translate(given: Given, draft: Draft, *, gpus: int | None) -> None:
    """Map what has a meaning here."""
    is_megatron = bool(given.values.get(f"{_M}enabled"))
    draft.copy(
        given,
        {
            "model.path": "policy.model_name",
            "model.tokenizer_path": "policy.tokenizer.name",
            "data.sequence_length": "policy.max_total_sequence_length",
            "data.packing": "policy.sequence_packing.enabled",
            "data.shuffle": "data.shuffle",
            "checkpoint.save": "checkpointing.enabled",
            "checkpoint.save_optimizer": "checkpointing.save_optimizer",
            "checkpoint.async_save": f"{_M}checkpoint.async_save",
            "train.save_steps": "checkpointing.save_period",
            "train.eval_steps": "sft.val_period",
            "tracking.experiment": (
                "logger.mlflow.experiment_name",
                "logger.wandb.project",
            ),
            "tracking.mlflow_uri": "logger.mlflow.tracking_uri",
            "seed": "sft.seed",
        },
        {"data.sequence_length": 1024, "data.packing": False},
    )
    if draft.value("model.tokenizer_path") == draft.value("model.path"):
        draft.lines.pop("model.tokenizer_path", None)
    if not draft.value("train.eval_steps"):
        draft.lines.pop("train.eval_steps", None)
    meanings.dtype(draft, given, "policy.precision", default="bfloat16")
    draft.set("data.overlong", "drop", "rows that are too long have no weight there")
    if given.take("sft.only_unmask_final"):
        draft.set("data.train_on", "last_assistant", "only_unmask_final: true")
    _template(draft, given)
    _sources(draft, given)
    _layout(draft, given, gpus, is_megatron=is_megatron)
    _optimizer(draft, given, is_megatron=is_megatron)
    _schedule(draft, given, is_megatron=is_megatron)
    _batch(draft, given)
    _saves(draft, given)
    section = f"{_M}peft." if is_megatron else f"{_D}lora_cfg."
    if given.take(f"{section}enabled"):
        _lora(draft, given, section)
    elif given.has_below(section.removesuffix(".")):
        _leave(draft, given, section, "LoRA is off")
    _trackers(draft, given)
    meanings.run_folder(
        draft,
        given,
        "checkpointing.checkpoint_dir",
        given.name_of("logger.wandb.name", "logger.mlflow.run_name"),
    )


def _template(draft: Draft, given: Given) -> None:
    is_given = "policy.tokenizer.chat_template" in given.values
    template = given.take("policy.tokenizer.chat_template")
    if is_given and template is None:
        draft.cannot(
            "policy.tokenizer.chat_template",
            None,
            "messages are concatenated without a template there; write that as a Jinja file for"
            " data.chat_template",
        )
    elif template not in (None, "default"):
        text = str(template)
        if text.endswith(".jinja"):
            draft.set("data.chat_template", text, "policy.tokenizer.chat_template")
        else:
            draft.cannot(
                "policy.tokenizer.chat_template",
                text,
                "write it to a .jinja file for data.chat_template",
            )


def _sources(draft: Draft, given: Given) -> None:
    keys = {
        "input_key": "data.prompt_key",
        "output_key": "data.response_key",
        "chat_key": "data.messages_key",
        "tool_key": "data.tools_key",
        "system_key": "data.system_key",
    }
    for ours, section in (("data.train", "data.train"), ("data.validation", "data.validation")):
        listed = given.take(section)
        if listed is None and given.has_below(section):
            below = [name for name in given.values if name.startswith(f"{section}.")]
            listed = [{name.removeprefix(f"{section}."): given.take(name) for name in below}]
        entries: list[dict[str, Any]] = []
        for about in listed if isinstance(listed, list) else []:
            path = about.get("data_path")
            if path is None:
                draft.cannot(
                    f"{section}.dataset_name",
                    about.get("dataset_name"),
                    "a class of theirs; write its rows as messages, and set its path",
                )
                path = about.get("dataset_name")
            entry = {"path": str(path)}
            entries.append(entry | ({"split": about["split"]} if about.get("split") else {}))
            for theirs, key in keys.items():
                if about.get(theirs):
                    draft.set(key, str(about[theirs]), f"{section}.{theirs}")
        if entries:
            draft.set(ours, entries, section)


def _layout(draft: Draft, given: Given, gpus: int | None, *, is_megatron: bool) -> None:
    if is_megatron:
        names = ("tensor", "pipeline", "expert")
        sizes = {f"parallel.{n}_model_parallel_size": f"{_M}{n}_model_parallel_size" for n in names}
        sizes |= {
            "parallel.context_parallel_size": f"{_M}context_parallel_size",
            "parallel.sequence_parallel": f"{_M}sequence_parallel",
            "parallel.use_distributed_optimizer": f"{_M}optimizer.use_distributed_optimizer",
        }
        draft.copy(given, sizes)
        is_on = given.take(f"{_M}activation_checkpointing", default=False)
        part = given.take(f"{_M}recompute_granularity", default="full")
        draft.set("train.recompute", str(part) if is_on else "none", "activation_checkpointing")
    else:
        draft.copy(
            given,
            {
                "parallel.tensor_model_parallel_size": f"{_D}tensor_parallel_size",
                "parallel.context_parallel_size": f"{_D}context_parallel_size",
                "parallel.sequence_parallel": f"{_D}sequence_parallel",
            },
        )
        meanings.recompute(draft, given, f"{_D}activation_checkpointing", default=False)
    if draft.value("parallel.tensor_model_parallel_size") == 1:
        draft.lines.pop("parallel.sequence_parallel", None)
    _leave(draft, given, _D if is_megatron else _M, "this backend is off")
    meanings.nodes_of_file(
        draft, given, gpus, each="cluster.gpus_per_node", nodes="cluster.num_nodes"
    )


def _leave(draft: Draft, given: Given, section: str, why: str) -> None:
    """A section that says nothing where its switch is off."""
    for name in [each for each in given.left() if each.startswith(section)]:
        given.take(name)
    draft.not_needed[f"{section}*"] = why


def _optimizer(draft: Draft, given: Given, *, is_megatron: bool) -> None:
    section = f"{_M}optimizer." if is_megatron else "policy.optimizer.kwargs."
    meanings.learning_rate(draft, given, f"{section}lr", default=5e-6)
    draft.copy(
        given,
        {
            "train.weight_decay": f"{section}weight_decay",
            "train.min_learning_rate": f"{section}min_lr",
            "train.adam_beta1": f"{section}adam_beta1",
            "train.adam_beta2": f"{section}adam_beta2",
            "train.adam_eps": (f"{section}adam_eps", f"{section}eps"),
        },
        {"train.weight_decay": 0.1, "train.adam_eps": 1e-5},
    )
    if "train.adam_beta1" not in draft.lines:
        meanings.betas(draft, given, f"{section}betas", default=(0.9, 0.98))
    names = (f"{section}clip_grad",) if is_megatron else ()
    meanings.clip(draft, given, *names, "policy.max_grad_norm")
    name = given.take("policy.optimizer.name")
    if name is not None and not str(name).rpartition(".")[2].lower().startswith("adam"):
        draft.cannot("policy.optimizer.name", name, "AdamW is the only optimizer here")
    if is_megatron:
        _leave(draft, given, "policy.optimizer.", "the optimizer of the other backend")
    for switch in ("foreach", "fused"):
        given.take(f"{section}{switch}")


def _schedule(draft: Draft, given: Given, *, is_megatron: bool) -> None:
    if is_megatron:
        meanings.schedule(draft, given, f"{_M}scheduler.lr_decay_style", default="constant")
        steps, start = given.take(f"{_M}scheduler.lr_warmup_iters", default=0), 0.0
        start = float(given.number(f"{_M}scheduler.lr_warmup_init", default=0.0))
        draft.set("train.warmup_steps", int(steps), f"lr_warmup_iters: {steps}")
        if start:
            draft.cannot(
                f"{_M}scheduler.lr_warmup_init",
                start,
                "the learning rate rises from 0; set train.warmup_steps=0 where it is the rate",
            )
        return
    draft.set("train.lr_scheduler_type", "constant", "NeMo-RL's default without a scheduler")
    draft.set_default("train.warmup_ratio", 0.0, "policy.scheduler")


def _batch(draft: Draft, given: Given) -> None:
    rows = int(given.number("policy.train_global_batch_size", default=32))
    each = int(given.number("policy.train_micro_batch_size", default=1))
    tokens = given.take("policy.sequence_packing.train_mb_tokens")
    meanings.batch(draft, rows, "policy.train_global_batch_size", micro_rows=each, drops_last=True)
    if draft.value("data.packing") and isinstance(tokens, int):
        draft.set("train.micro_batch_tokens", tokens, f"train_mb_tokens: {tokens}")
    elif tokens is not None and not isinstance(tokens, int):
        draft.not_needed["policy.sequence_packing.train_mb_tokens"] = "computed from other keys"
    meanings.epochs(draft, given, "sft.max_num_epochs", default=1)
    meanings.max_steps(draft, given, "sft.max_num_steps")
    if "train.max_steps" not in draft.lines:
        draft.set("train.max_steps", 60, "NeMo-RL's default of sft.max_num_steps")
    draft.notes.append(
        "the smaller of epochs and steps ends a run there; here train.max_steps wins: remove it"
        " where the epochs are fewer steps"
    )


def _saves(draft: Draft, given: Given) -> None:
    metric = given.take("checkpointing.metric_name")
    given.take("checkpointing.higher_is_better")
    kept = given.take("checkpointing.keep_top_k")
    if isinstance(kept, int):
        draft.set("checkpoint.keep_last", max(2, kept), f"keep_top_k: {kept}")
        draft.notes.append(
            f"keep_top_k keeps the best by {metric}; here the newest are kept, and with"
            " checkpoint.keep_best the best one"
        )


def _lora(draft: Draft, given: Given, section: str) -> None:
    meanings.adapters(
        draft,
        given,
        rank=(f"{section}dim", 8),
        alpha=(f"{section}alpha", 32),
        dropout=(f"{section}dropout", None),
    )
    modules = given.take(f"{section}target_modules") or ["all-linear"]
    draft.set("lora.target_modules", meanings.modules(modules), f"{section}target_modules")


def _trackers(draft: Draft, given: Given) -> None:
    named = []
    for tracker in ("wandb", "tensorboard", "mlflow", "swanlab"):
        is_on = given.take(f"logger.{tracker}_enabled", default=tracker in ("wandb", "tensorboard"))
        if is_on not in OFF:
            named.append(tracker)
    draft.set("tracking.backends", ["jsonl", *named], "trackers that are on")
