"""ROLL's `sft_config.yaml`.

https://alibaba.github.io/ROLL/
"""

from roll_sft.base.errors import ConfigError
from roll_sft.migrate import meanings
from roll_sft.migrate.draft import OFF, Draft
from roll_sft.migrate.given import Given

NAME = "ROLL"
_T, _S, _M = "sft_train.", "sft_train.strategy_args.strategy_config.", "sft_train.model_args."
_A = "sft_train.training_args."
_DONE = "Megatron-Core's default, or done here"
NOT_NEEDED = {
    "hydra.*": "Hydra's own",
    "defaults": "Hydra's own",
    "logging_dir": "logs lie in the run's folder",
    "max_steps": "ROLL's SFT trains by epochs",
    "checkpoint_config.type": "checkpoints lie in the run's folder",
    "checkpoint_config.output_dir": "checkpoints lie in the run's folder",
    "num_gpus_per_node": "the workers are placed by Ray",
    "num_nodes": "the workers are placed by Ray",
    "*system_envs*": "set variables where Ray starts",
    "model_download_type": "models come from a folder or the hub",
    "rpc_timeout": "the section cluster has deadlines",
    "*profiler*": "steps.jsonl has times and memory",
    "is_offload_*": "states stay where they are in supervised fine-tuning",
    "*.infer_batch_size": "evaluation packs as training does",
    "*.apply_loss_scale": "bf16 needs no loss scaling",
    "*.backend_timeout": "the section cluster has deadlines",
    "*.logits_in_fp32": "the loss is computed in fp32",
    "*.dataloader_num_workers": "batches come from a token cache",
    "*.sequence_packing_args.algorithm": "packs are planned over the whole epoch",
    "*.sequence_packing_args.min_num_micro_batches": "packs are planned over the whole epoch",
    "*.use_dynamic_batching_in_train": "data.packing does it",
    "*.recompute_method": "whole layers are recomputed",
    "*.recompute_num_layers": "whole layers are recomputed",
    "*.recompute_modules": "the modules of selective are Megatron-Core's",
    "*.account_for_*": "stages may have unequal numbers of layers",
    "*.bias_activation_fusion": _DONE,
    "*.apply_rope_fusion": _DONE,
    "*.overlap_*": _DONE,
    "*.ddp_bucket_size": _DONE,
    "*.calculate_per_token_loss": _DONE,
    "*.variable_seq_lengths": _DONE,
    "*.batch_p2p_comm": _DONE,
    "*.accumulate_allreduce_grads_in_fp32": _DONE,
    "*.ckpt_format": _DONE,
    "*.transformer_impl": _DONE,
    "*.moe_token_dispatcher_type": "experts exchange tokens by all-to-all",
    "*.moe_grouped_gemm": _DONE,
    "*.moe_layer_recompute": "train.recompute decides",
    "*.fsdp_size": "the distributed optimizer splits optimizer states",
    "*.param_dtype": "model.dtype decides",
    "*.strategy_config.bf16": "model.dtype decides",
    "*.use_remove_padding": "packs have no padding between samples",
    "*.reduce_dtype": "gradients are summed in fp32",
    "*.offload_policy": "states stay where they are",
    "*.reshard_after_forward": "weights are not split over data-parallel ranks",
    "*.wrap_policy*": "weights are not split over data-parallel ranks",
    "validation.data_args.template": "ROLL itself does not read it",
    "validation.*": "validation runs on the workers that train",
    "tracker_kwargs.*": "tracking.experiment names the project",
}
UNSUPPORTED = {
    "*.data_seed": "one seed decides all; set seed",
    "*.freeze_module_prefix": "set train.freeze by patterns of modules",
    "*.moe_aux_loss_coef": "set moe.aux_loss_coef",
    "*.model_config_kwargs*": "the model is built from its config.json",
    "*.additional_target": "set lora.modules_to_save",
    "*.expert_tensor_parallel_size": "experts are split by parallel.expert_model_parallel_size",
    "*.pipeline_model_parallel_layout": "stages are cut evenly",
    "*.mtp_*": "layers of multi-token prediction are not trained",
    "*.fp8*": "choose bf16",
    "*.cuda_graph_*": "no CUDA graphs here",
    "*.optimizer_cpu_offload": "set train.recompute, or more GPUs",
    "*.additional_configs*": "set the keys that are here by their own names",
    "*.moe_*": "experts are as config.json of the model says",
}
_TEMPLATES = {"qwen2_5": "qwen", "qwen3": "qwen", "chatml": "chatml"}


def translate(given: Given, draft: Draft, *, gpus: int | None) -> None:
    """Map what has a meaning here."""
    draft.copy(
        given,
        {
            "model.path": ("pretrain", f"{_M}model_name_or_path"),
            "data.sequence_length": "sequence_length",
            "data.prompt_key": "prompt_key",
            "data.query_key": "query_key",
            "data.response_key": "response_key",
            "data.system_key": "system_key",
            "data.num_proc": f"{_T}data_args.preprocessing_num_workers",
            "train.logging_steps": "logging_steps",
            "train.weight_decay": f"{_A}weight_decay",
            "train.adam_beta1": f"{_A}adam_beta1",
            "train.adam_beta2": f"{_A}adam_beta2",
            "seed": "seed",
            "checkpoint.async_save": "checkpoint_config.async_upload",
        },
        {"data.prompt_key": "instruction", "data.response_key": "output"},
    )
    draft.set("data.overlong", "error", "ROLL neither cuts nor drops long samples")
    _sources(draft, given)
    _layout(draft, given, gpus)
    meanings.dtype(draft, given, f"{_M}dtype", default="bf16")
    meanings.attention(draft, given, f"{_M}attn_implementation", f"{_M}flash_attn")
    _training(draft, given)
    _lora(draft, given)
    meanings.trackers(draft, given, "track_with", default=["tensorboard"])
    draft.copy(given, {"tracking.experiment": "tracker_kwargs.project"})
    meanings.run_folder(draft, given, "output_dir", "exp_name")
    if (resume := given.take("resume_from_checkpoint")) not in (*OFF, True):
        draft.cannot("resume_from_checkpoint", resume, "their checkpoints cannot be read")


def _sources(draft: Draft, given: Given) -> None:
    files = given.take(f"{_T}data_args.file_name", f"{_T}data_args.dataset_dir")
    if files is None:
        raise ConfigError(f"{_T}data_args.file_name: missing; name the files to train on")
    meanings.sources(draft, "data.train", files, f"{_T}data_args.file_name")
    files = given.take("validation.data_args.file_name")
    if files is not None:
        meanings.sources(draft, "data.validation", files, "validation.data_args.file_name")
    name = given.take("global_template") or given.take(f"{_T}data_args.template")
    given.take(f"{_T}data_args.template")
    if name in _TEMPLATES:
        draft.set("data.chat_template", _TEMPLATES[str(name)], f"template: {name}")
    elif name not in (None, "native"):
        draft.cannot("template", name, "null takes the tokenizer's own; or give a Jinja file")


def _layout(draft: Draft, given: Given, gpus: int | None) -> None:
    name = given.take("sft_train.strategy_args.strategy_name", default="megatron_train")
    if name != "megatron_train":
        draft.not_needed[f"strategy_name: {name}"] = "training is Megatron-Core's here"
    draft.copy(
        given,
        {
            f"parallel.{size}": f"{_S}{size}"
            for size in (
                "tensor_model_parallel_size",
                "pipeline_model_parallel_size",
                "virtual_pipeline_model_parallel_size",
                "expert_model_parallel_size",
                "context_parallel_size",
                "sequence_parallel",
                "use_distributed_optimizer",
            )
        },
    )
    draft.copy(given, {"parallel.context_parallel_size": (f"{_M}ulysses_size",)})
    if draft.value("parallel.tensor_model_parallel_size") == 1:
        draft.lines.pop("parallel.sequence_parallel", None)
    mapping = given.take("sft_train.device_mapping")
    is_list = isinstance(mapping, list)
    count = len(mapping) if is_list else meanings.gpus_of_mapping(str(mapping))
    meanings.world_of_file(draft, gpus, count, f"device_mapping: {mapping}")


def _training(draft: Draft, given: Given) -> None:
    meanings.learning_rate(draft, given, f"{_A}learning_rate", default=5e-5)
    meanings.clip(draft, given, "max_grad_norm", f"{_A}max_grad_norm")
    meanings.schedule(draft, given, f"{_A}lr_scheduler_type", default="linear")
    meanings.warmup(draft, given, steps=f"{_A}warmup_steps", ratio=f"{_A}warmup_ratio")
    meanings.epochs(draft, given, f"{_A}num_train_epochs", default=1.0)
    meanings.keep_last(draft, given, "max_ckpt_to_keep")
    for theirs, ours in (("save_steps", "train.save_steps"), ("eval_steps", "train.eval_steps")):
        steps = given.take(theirs)
        if isinstance(steps, int) and steps > 0:
            draft.set(ours, steps, f"{theirs}: {steps}")
    part = given.take(f"{_S}recompute_granularity")
    is_off = given.take(f"{_M}disable_gradient_checkpointing", default=False)
    draft.set(
        "train.recompute",
        str(part) if part else ("none" if is_off else "full"),
        f"recompute_granularity: {part}" if part else "disable_gradient_checkpointing",
    )
    packing = bool(given.take(f"{_T}use_sequence_packing", default=False))
    draft.set("data.packing", packing, f"use_sequence_packing: {str(packing).lower()}")
    tokens = given.take(
        f"{_T}sequence_packing_args.max_packed_sequence_length_train",
        f"{_T}max_tokens_per_microbatch_in_train",
    )
    each = int(given.number(f"{_A}per_device_train_batch_size", default=8))
    accumulated = int(given.number(f"{_A}gradient_accumulation_steps", default=1))
    meanings.rows_by_device(draft, given, (each, accumulated), None, drops_last=True)
    if packing and tokens:
        draft.set("train.micro_batch_tokens", int(tokens), f"packs of {tokens} tokens")
    if given.take(f"{_S}save_only_model") not in OFF:
        draft.set("checkpoint.save_optimizer", False, "save_only_model: true")
    if given.take(f"{_A}save_hf_model") not in OFF:
        draft.set("checkpoint.hf_export", "every_save", "save_hf_model: true")


def _lora(draft: Draft, given: Given) -> None:
    if f"{_M}lora_target" not in given:
        names = (f"{_M}lora_rank", f"{_M}lora_alpha", f"{_M}lora_dropout")
        meanings.leave(draft, given, names, "lora_target is not set")
        return
    rank = int(given.values.get(f"{_M}lora_rank") or 8)
    meanings.adapters(
        draft,
        given,
        rank=(f"{_M}lora_rank", 8),
        alpha=(f"{_M}lora_alpha", 2 * rank),
        dropout=(f"{_M}lora_dropout", None),
        target_modules=(f"{_M}lora_target", None),
    )
