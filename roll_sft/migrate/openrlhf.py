"""OpenRLHF's `openrlhf.cli.train_sft`: dotted flags, and the flat ones of older scripts.

https://openrlhf.readthedocs.io/
"""

from roll_sft.migrate import meanings
from roll_sft.migrate.draft import OFF, Draft
from roll_sft.migrate.given import Given

NAME = "OpenRLHF"
_DEEPSPEED = "the distributed optimizer splits optimizer states over data-parallel ranks"
NOT_NEEDED = {
    "ds.zero_stage": _DEEPSPEED,
    "zero_stage": _DEEPSPEED,
    "ds.zpg": _DEEPSPEED,
    "zpg": _DEEPSPEED,
    "*overlap_comm": "gradients are reduced during the backward pass on several GPUs",
    "*grad_accum_dtype": "gradients are summed in fp32",
    "ds.deepcompile": "model.compile compiles element-wise operations",
    "ds.use_universal_ckpt": "a checkpoint loads on any layout",
    "*use_liger_kernel": "the loss is computed in chunks, and kernels are fused here too",
    "local_rank": "the workers are Ray's",
    "ckpt.path": "checkpoints lie in <output_dir>/checkpoints",
    "ckpt_path": "checkpoints lie in <output_dir>/checkpoints",
    "*gradient_checkpointing*reentrant": "layers are recomputed as Megatron-Core does it",
    "*ring_attn_head_stride": "context ranks exchange keys by head here",
    "*experts_implementation": "experts are Megatron-Core's",
    "*disable_fast_tokenizer": "tokenizers are always fast ones",
    "*dataloader_num_workers": "batches come from a token cache",
    "muon.*": "AdamW is what trains here",
    "logger.wandb.group": "set WANDB_RUN_GROUP",
    "logger.wandb.org": "set WANDB_ENTITY",
    "*wandb_group": "set WANDB_RUN_GROUP",
    "*wandb_org": "set WANDB_ENTITY",
    "logger.tensorboard_dir": "events lie in the run's folder",
    "use_tensorboard": "events lie in the run's folder",
}
UNSUPPORTED = {
    "*adam_offload": "set train.recompute, or more GPUs",
    "*aux_loss_coef": "set moe.aux_loss_coef",
    "ckpt.max_mem": "set checkpoint.keep_last",
    "max_ckpt_mem": "set checkpoint.keep_last",
    "use_ms": "download the model, and give its folder as model.path",
    "*input_template": "write it as a Jinja file for data.chat_template",
    "*tokenizer_chat_template": "write it to a Jinja file for data.chat_template",
}


def translate(given: Given, draft: Draft, *, gpus: int | None) -> None:
    """Map what has a meaning here."""
    draft.copy(
        given,
        {
            "model.path": ("model.model_name_or_path", "pretrain"),
            "data.sequence_length": ("data.max_len", "max_len"),
            "data.packing": ("ds.packing_samples", "packing_samples"),
            "data.response_key": ("data.output_key", "output_key"),
            "parallel.context_parallel_size": ("ds.ring_attn_size", "ring_attn_size"),
            "parallel.tensor_model_parallel_size": (
                "ds.tensor_parallel_size",
                "ds_tensor_parallel_size",
            ),
            "train.weight_decay": ("adam.weight_decay", "l2"),
            "train.adam_eps": "adam.eps",
            "train.logging_steps": ("logger.logging_steps", "logging_steps"),
            "tracking.experiment": ("logger.wandb.project", "wandb_project"),
            "seed": ("train.seed", "seed"),
            "deterministic": ("train.full_determinism_enable", "full_determinism"),
        },
        {"data.sequence_length": 2048, "data.packing": False},
    )
    _sources(draft, given)
    draft.set("data.overlong", "truncate", "OpenRLHF cuts long samples")
    draft.notes.append(
        "OpenRLHF drops samples whose prompt alone is too long, and ends a cut sample with EOS;"
        " here a sample is cut, and left out where nothing of its answer remains"
    )
    if given.take("bf16"):  # the older flag
        draft.set("model.dtype", "bf16", "bf16: true")
    else:
        meanings.dtype(draft, given, "ds.param_dtype", "param_dtype", default="bf16")
    meanings.attention(draft, given, "ds.attn_implementation", "attn_implementation")
    if given.take("flash_attn"):
        draft.set("model.attention_backend", "flash", "flash_attn: true")
    _training(draft, given, gpus)
    _saves(draft, given)
    _lora(draft, given)
    wandb = given.name_of("logger.wandb.key", "use_wandb")
    if given.take("logger.wandb.key", "use_wandb") is not None:
        draft.secrets.append(str(wandb))
    board = given.name_of("logger.tensorboard_dir", "use_tensorboard")
    named = [tracker for tracker, on in (("wandb", wandb), ("tensorboard", board)) if on]
    draft.set("tracking.backends", ["jsonl", *named], "trackers that are named")
    run_name = given.name_of("logger.wandb.run_name", "wandb_run_name")
    output = given.name_of("ckpt.output_dir", "save_path") or "ckpt.output_dir"
    meanings.run_folder(draft, given, output, run_name)


def _sources(draft: Draft, given: Given) -> None:
    names = given.take("data.dataset", "dataset")
    split = given.take("data.dataset_split", "dataset_split", "train_split", default="train")
    chances = given.take("data.dataset_probs", "dataset_probs")
    count = given.take("data.max_samples", "max_samples")
    if names is not None:
        paths = str(names).split(",")
        meanings.sources(
            draft, "data.train", paths, f"dataset: {names}", **({"split": split} if split else {})
        )
        if chances is not None and len(paths) > 1:
            draft.cannot(
                "dataset_probs",
                chances,
                "shares of the mix; set weight of each source, which multiplies its own samples",
            )
        if count is not None and len(paths) == 1:
            value, origin = draft.lines["data.train"]
            draft.set("data.train", [{**value[0], "samples": int(count)}], origin)
        elif count is not None:
            draft.cannot("max_samples", count, "of all sources; set samples of each")
    held = given.take("eval.dataset", "eval_dataset")
    held_split = given.take("eval.split", "eval_split", default=None)
    if held is not None:
        also = {"split": str(held_split)} if held_split else {}
        meanings.sources(draft, "data.validation", str(held).split(","), f"dataset: {held}", **also)
    is_chat = given.take("data.apply_chat_template", "apply_chat_template")
    key = given.take("data.input_key", "input_key", default="input")
    has_answer = "data.response_key" in draft.lines
    of_text = given.take("model.pretrain_mode_enable", "pretrain_mode")
    if of_text:
        draft.set("data.text_key", str(key), f"input_key: {key}, of plain text")
        draft.set("data.train_on", "all", "pretrain mode")
        return
    draft.set(
        "data.messages_key" if is_chat and not has_answer else "data.prompt_key",
        str(key),
        f"input_key: {key}",
    )
    many = given.take("data.multiturn", "multiturn")
    draft.set(
        "data.train_on", "assistant" if many else "last_assistant", f"multiturn is {bool(many)}"
    )
    if not is_chat and not given.name_of("data.input_template", "input_template"):
        draft.notes.append(
            "without apply_chat_template OpenRLHF writes 'User: ...\\nAssistant: '; here the"
            " tokenizer's chat template is used, unless data.chat_template names another"
        )


def _training(draft: Draft, given: Given, gpus: int | None) -> None:
    meanings.learning_rate(draft, given, "adam.lr", "learning_rate", default=5e-6)
    meanings.betas(draft, given, "adam.betas", "adam_betas", default=(0.9, 0.95))
    meanings.clip(draft, given, "max_norm")
    meanings.optimizer(draft, given, "optim")
    meanings.schedule(draft, given, "lr_scheduler", default="cosine_with_min_lr")
    meanings.min_rate(draft, given, "min_lr_ratio", default=0.1)
    meanings.warmup(draft, given, steps="lr_warmup_steps", ratio="lr_warmup_ratio", default=0.03)
    meanings.epochs(draft, given, "train.max_epochs", "max_epochs", default=2)
    meanings.recompute(
        draft,
        given,
        "model.gradient_checkpointing_enable",
        "gradient_checkpointing",
        default=False,
    )
    steps = given.take("eval.steps", "eval_steps", default=-1)
    if int(steps) > 0:
        draft.set("train.eval_steps", int(steps), f"eval_steps: {steps}")
    rows = int(given.number("train.batch_size", "train_batch_size", default=128))
    each = int(given.number("train.micro_batch_size", "micro_train_batch_size", default=8))
    meanings.world_size(draft, given, gpus)
    meanings.batch(draft, rows, "train.batch_size", micro_rows=each, drops_last=True)


def _saves(draft: Draft, given: Given) -> None:
    steps = given.take("ckpt.save_steps", "save_steps", default=-1)
    if int(steps) > 0:
        draft.set("train.save_steps", int(steps), f"save_steps: {steps}")
    meanings.keep_last(draft, given, "ckpt.max_num", "max_ckpt_num")
    if given.take("ckpt.save_hf", "save_hf_ckpt") not in OFF:
        draft.set("checkpoint.hf_export", "every_save", "save_hf: true")
    if given.take("ckpt.disable_ds", "disable_ds_ckpt") not in OFF:
        draft.set("checkpoint.save", False, "disable_ds: true")
    is_on = given.take("ckpt.load_enable", "load_checkpoint") not in OFF
    if not is_on:
        draft.notes.append("resume: auto goes on with the newest checkpoint; theirs starts anew")


def _lora(draft: Draft, given: Given) -> None:
    dotted = given.name_of("ds.lora.rank") is not None
    name = "ds.lora." if dotted else "lora_"
    rank = given.take(f"{name}rank", default=0)
    if not int(rank):
        for each in ("alpha", "target_modules", "dropout"):
            given.take(f"ds.lora.{each}", f"lora_{each}", "target_modules")
        return
    draft.set("lora.rank", int(rank), f"{name}rank: {rank}")
    targets = f"{name}target_modules" if dotted else "target_modules"
    meanings.adapters(
        draft,
        given,
        alpha=(f"{name}alpha", 16),
        dropout=(f"{name}dropout", None),
        target_modules=(targets, "all-linear"),
    )
    if given.take("ds.load_in_4bit", "load_in_4bit") not in OFF:
        draft.set("lora.quantize_base", "nf4", "load_in_4bit: true")
