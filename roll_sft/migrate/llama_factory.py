"""LLaMA-Factory's YAML, with `dataset_info.json` beside its data.

https://llamafactory.readthedocs.io/
"""

import json
from pathlib import Path
from typing import Any

from roll_sft.migrate import hf_arguments, meanings
from roll_sft.migrate.draft import OFF, Draft
from roll_sft.migrate.given import Given

NAME = "LLaMA-Factory"
_SUPERSEDED = "a switch of kernels or of memory that is not needed here"
NOT_NEEDED = hf_arguments.NOT_NEEDED | {
    "preprocessing_batch_size": "rows are read as they come",
    "overwrite_cache": "the token cache is made anew where anything changed",
    "plot_loss": "loss.png is always made",
    "eval_on_each_dataset": "each validation set has its own loss",
    "buffer_size": "data is always streamed",
    "streaming": "data is always streamed",
    "enable_liger_kernel": _SUPERSEDED,
    "use_unsloth*": _SUPERSEDED,
    "use_reentrant_gc": _SUPERSEDED,
    "upcast_*": "master weights and gradients are always fp32",
    "low_cpu_mem_usage": "each rank reads its own part of the weights",
    "include_effective_tokens_per_second": "steps.jsonl has tokens per second",
    "data_shared_file_system": "data.cache_dir says where tokens lie",
    "overlap_*": "gradients are reduced during the backward pass where there are several GPUs",
    "ddp_timeout": "cluster.step_timeout_s is the deadline of a step",
    "ray_*": "the workers are Ray's",
    "resources_per_worker*": "each worker takes one GPU",
    "placement_strategy": "workers of a tensor group share a node",
    "master_*": "the workers are Ray's",
    "quantization_method": "NF4 is bitsandbytes' here",
    "double_quantization": "NF4 always has double quantisation here",
    "loraplus_lr_embedding": "LoRA+ is not set",
    "cache_dir": "models and data are in the hub's own cache",
    "print_param_status": "the plan shows what is trained",
    "moe_aux_loss_coef": "off",
    "use_fast_tokenizer": "tokenizers are always fast ones",
    "predict_with_generate": "a prediction is no training",
}
UNSUPPORTED = hf_arguments.UNSUPPORTED | {
    "model_revision": "download that revision, and give its folder as model.path",
    "enable_thinking": "set data.template_kwargs.enable_thinking",
    "preserve_thinking": "set data.template_kwargs as the model's template names it",
    "default_system": "give rows a system message",
    "tool_format": "the chat template writes tools",
    "val_size": "write a file of its own for validation",
    "tokenized_path": "rows of token ids are not read; give texts",
    "mix_strategy": "set weight or samples of each source",
    "interleave_probs": "set weight or samples of each source, which count samples per epoch",
    "early_stopping_steps": "set train.early_stopping and its patience",
    "freeze_*": "set train.freeze by patterns of modules",
    "use_dora": "not LoRA; leave it out",
    "pissa_*": "set lora.init to default or gaussian",
    "loraplus_*": "set train.learning_rate_factors",
    "use_dft_loss": "the loss is cross-entropy",
    "use_asft_loss": "the loss is cross-entropy",
    "use_eaft_loss": "the loss is cross-entropy",
    "use_muon": "AdamW is the only optimizer here",
    "use_galore": "AdamW is the only optimizer here",
    "use_apollo": "AdamW is the only optimizer here",
    "use_badam": "AdamW is the only optimizer here",
    "use_adam_mini": "AdamW is the only optimizer here",
    "use_llama_pro": "write the wider model first",
    "shift_attn": "attention is the model's own",
    "rope_scaling": "change config.json of the model",
    "resize_vocab": "write the larger embedding first",
    "add_tokens": "write the larger embedding first",
    "add_special_tokens": "write the larger embedding first",
    "fp8*": "choose bf16",
    "export_*": "use `roll-sft convert` or `roll-sft merge-lora`",
    "megatron_pretrained_checkpoint": "give the Hugging Face folder as model.path",
    "extra_config*": "set the keys of Megatron-Core that are here by their own names",
}
_TEMPLATES = {"qwen": "qwen", "llama3": "llama3", "mistral": "mistral", "gemma": "gemma"}
_TEMPLATES |= {"chatml": "chatml", "zephyr": "zephyr", "vicuna": "vicuna", "alpaca": "alpaca"}
_COLUMNS = {
    "prompt": "data.prompt_key",
    "query": "data.query_key",
    "response": "data.response_key",
    "system": "data.system_key",
    "messages": "data.messages_key",
    "tools": "data.tools_key",
}


def translate(given: Given, draft: Draft, *, gpus: int | None) -> None:
    """Map what has a meaning here."""
    stage = given.take("stage", default="sft")
    if stage == "pt":
        draft.set("data.train_on", "all", "stage: pt")
    elif stage != "sft":
        draft.cannot("stage", stage, "supervised fine-tuning alone is trained here")
    draft.copy(
        given,
        {
            "model.path": "model_name_or_path",
            "data.sequence_length": "cutoff_len",
            "data.num_proc": "preprocessing_num_workers",
            "parallel.tensor_model_parallel_size": "tensor_model_parallel_size",
            "parallel.pipeline_model_parallel_size": "pipeline_model_parallel_size",
            "parallel.virtual_pipeline_model_parallel_size": "virtual_pipeline_model_parallel_size",
            "parallel.context_parallel_size": "context_parallel_size",
            "parallel.expert_model_parallel_size": "expert_model_parallel_size",
            "parallel.sequence_parallel": "sequence_parallel",
            "parallel.use_distributed_optimizer": "use_distributed_optimizer",
            "parallel.num_workers": "ray_num_workers",
            "cluster.address": "ray_init_kwargs.address",
        },
        {"data.sequence_length": 2048},
    )
    for name in ("use_mca", "use_megatron_bridge"):
        given.take(name)
    draft.set("data.overlong", "truncate", "cutoff_len cuts there")
    _template(draft, given)
    _sources(draft, given)
    if given.take("train_on_prompt"):
        draft.set("data.train_on", "all", "train_on_prompt: true")
    elif given.take("mask_history"):
        draft.set("data.train_on", "last_assistant", "mask_history: true")
    meanings.dtype_flags(draft, given)
    if given.take("pure_bf16"):
        draft.set("model.dtype", "bf16", "pure_bf16: true; master weights are fp32 here")
    meanings.attention(draft, given, "flash_attn")
    hf_arguments.training(draft, given, rate=5e-5)
    is_off = given.take("disable_gradient_checkpointing", default=False)
    draft.set(
        "train.recompute",
        "none" if is_off else "full",
        f"disable_gradient_checkpointing is {str(bool(is_off)).lower()}",
    )
    if (part := given.take("recompute_granularity")) is not None:
        draft.set("train.recompute", str(part), f"recompute_granularity: {part}")
    meanings.trackers(draft, given, "report_to", default=["none"])
    meanings.run_folder(draft, given, "output_dir", "run_name")
    packing = bool(given.take("packing", default=False)) or bool(given.take("neat_packing"))
    packing = packing or bool(given.take("use_packed_sequences"))
    draft.set("data.packing", packing, f"packing is {str(packing).lower()}")
    hf_arguments.rows(draft, given, micro=8, gpus=gpus, packed=packing)
    _adapters(draft, given)


def _template(draft: Draft, given: Given) -> None:
    name = given.take("template")
    ours = next((ours for theirs, ours in _TEMPLATES.items() if str(name).startswith(theirs)), None)
    if name in (None, "default", "empty"):
        return
    if ours is None:
        draft.cannot(
            "template",
            name,
            "no such template here; null takes the tokenizer's own, or give a"
            " Jinja file as data.chat_template",
        )
    else:
        draft.set("data.chat_template", ours, f"template: {name}")


def _sources(draft: Draft, given: Given) -> None:
    folder = Path(str(given.take("dataset_dir", default="data")))
    counts = given.take("max_samples")
    for key, names in (("data.train", "dataset"), ("data.validation", "eval_dataset")):
        listed = given.take(names)
        if listed is None:
            continue
        listed = str(listed).split(",") if isinstance(listed, str) else listed
        entries = [_source(draft, str(name).strip(), given.folder, folder) for name in listed]
        if counts is not None and key == "data.train":
            entries = [{**entry, "samples": int(counts)} for entry in entries]
        draft.set(key, entries, f"{names}: {', '.join(map(str, listed))}")


def _source(draft: Draft, name: str, beside: Path, folder: Path) -> dict[str, Any]:
    """The entry of a name in dataset_info.json, which lies in `folder`, seen from `beside`."""
    places = [folder, beside / folder, beside.parent / folder]
    info = next((each for each in places if (each / "dataset_info.json").is_file()), None)
    known = json.loads((info / "dataset_info.json").read_text("utf-8")) if info else {}
    about = known.get(name)
    if not isinstance(about, dict):
        draft.cannot("dataset", name, "not in dataset_info.json beside the file; set its path")
        return {"path": name}
    for theirs, column in (about.get("columns") or {}).items():
        if theirs in _COLUMNS and column not in OFF:
            draft.set(_COLUMNS[theirs], column, f"columns of {name} in dataset_info.json")
    path = about.get("hf_hub_url") or about.get("file_name")
    if path is None or "script_url" in about:
        draft.cannot("dataset", name, "a script; write its rows to a file, and set its path")
        return {"path": name}
    is_file = "hf_hub_url" not in about and info is not None
    entry: dict[str, Any] = {"path": str(info / str(path)) if is_file and info else str(path)}
    return entry | {"name": name} | ({"split": about["split"]} if "split" in about else {})


def _adapters(draft: Draft, given: Given) -> None:
    kind = given.take("finetuning_type", default="lora")
    names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target")
    if kind != "lora":
        if kind != "full":
            draft.cannot("finetuning_type", kind, "full or lora; train.freeze leaves modules out")
        meanings.leave(draft, given, (*names, "use_rslora"), f"finetuning_type is {kind}")
        return
    rank = int(given.values.get("lora_rank") or 8)
    meanings.adapters(
        draft,
        given,
        rank=("lora_rank", 8),
        alpha=("lora_alpha", 2 * rank),
        dropout=("lora_dropout", None),
        target_modules=("lora_target", "all"),
        modules_to_save=("additional_target", None),
        use_rslora=("use_rslora", None),
    )
    bits, quantization = given.take("quantization_bit"), given.take("quantization_type")
    if bits == 4 and quantization in (None, "nf4"):
        draft.set("lora.quantize_base", "nf4", "quantization_bit: 4")
    elif bits is not None:
        draft.cannot("quantization_bit", bits, "4 bits of type nf4 alone; lora.quantize_base=nf4")
