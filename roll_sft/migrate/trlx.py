"""trlX's `TRLConfig` with the method `SFTConfig`: YAML or JSON.

https://trlx.readthedocs.io/
"""

from roll_sft.migrate import meanings
from roll_sft.migrate.draft import OFF, Draft
from roll_sft.migrate.given import Given

NAME = "trlX"
NOT_NEEDED = {
    "train.pipeline": "data is read from data.train",
    "train.trainer": "training is Megatron-Core's here",
    "train.trainer_kwargs*": "training is Megatron-Core's here",
    "train.rollout_logging_dir": "nothing is sampled to train on",
    "train.minibatch_size": "packs hold as many samples as fit",
    "train.orchestrator": "nothing is sampled to train on",
    "train.entity_name": "set WANDB_ENTITY",
    "train.group_name": "set WANDB_RUN_GROUP",
    "train.logging_dir": "logs lie in the run's folder",
    "train.tags": "runs have names",
    "model.model_arch_type": "causal language models alone",
    "model.model_extra_configs*": "the model is built from its config.json",
    "tokenizer.padding_side": "packs have no padding between samples",
    "tokenizer.tokenizer_extra_configs*": "the tokenizer is used as its folder has it",
    "method.name": "supervised fine-tuning",
    "optimizer.name": "AdamW is what trains here",
}
UNSUPPORTED = {
    "model.delta_kwargs": "set the section lora",
    "train.save_best": "set checkpoint.keep_best to the name of a validation set",
    "train.resume_from_checkpoint": "their checkpoints cannot be read",
    "method.gen_kwargs.*": "set evaluation.max_new_tokens, temperature, top_p, top_k",
    "method.gen_experience_kwargs*": "nothing is sampled to train on",
    "train.seed_*": "one seed decides all; set seed",
}


def translate(given: Given, draft: Draft, *, gpus: int | None) -> None:
    """Map what has a meaning here."""
    draft.copy(
        given,
        {
            "model.path": "model.model_path",
            "model.tokenizer_path": "tokenizer.tokenizer_path",
            "data.sequence_length": "train.seq_length",
            "train.num_layers_unfrozen": "model.num_layers_unfrozen",
            "train.eval_steps": "train.eval_interval",
            "train.save_steps": "train.checkpoint_interval",
            "train.weight_decay": "optimizer.kwargs.weight_decay",
            "train.adam_eps": "optimizer.kwargs.eps",
            "tracking.experiment": "train.project_name",
            "seed": "train.seed",
        },
        {"train.num_layers_unfrozen": -1, "seed": 1000},
    )
    if draft.value("model.tokenizer_path") == draft.value("model.path"):
        draft.lines.pop("model.tokenizer_path", None)
    draft.set("data.overlong", "truncate", "trlX cuts long samples")
    if (side := given.take("tokenizer.truncation_side")) not in (None, "right"):
        draft.cannot("tokenizer.truncation_side", side, "samples are cut at their end")
    name = given.take("optimizer.name", default="adamw")
    if "adam" not in str(name).lower() or "8bit" in str(name):
        draft.cannot("optimizer.name", name, "AdamW with fp32 states is the only optimizer here")
    meanings.learning_rate(draft, given, "optimizer.kwargs.lr", default=1e-4)
    meanings.betas(draft, given, "optimizer.kwargs.betas", default=(0.9, 0.999))
    draft.set("train.max_grad_norm", 0.0, "trlX does not clip gradients")
    _schedule(draft, given)
    meanings.epochs(draft, given, "train.epochs", default=1)
    meanings.max_steps(draft, given, "train.total_steps")
    draft.notes.append(
        "the smaller of epochs and total_steps ends a run there; here train.max_steps wins"
    )
    each = int(given.number("train.batch_size", default=32))
    accumulated = int(given.number("train.gradient_accumulation_steps", default=1))
    ranks = meanings.data_parallel(draft, given, gpus)
    meanings.batch(
        draft,
        each * accumulated * ranks,
        f"{each} per device x {accumulated} accumulated x {ranks} data-parallel",
        micro_rows=1,
    )
    draft.set("data.packing", True, "packing changes speed, never the loss")
    meanings.trackers(draft, given, "train.tracker", default=["wandb"])
    meanings.run_folder(draft, given, "train.checkpoint_dir", given.name_of("train.run_name"))
    draft.notes.append(
        "trlx.train was given samples in Python; here they are a file in data.train, or"
        " roll_sft.train(samples=...)"
    )
    _adapters(draft, given)


def _schedule(draft: Draft, given: Given) -> None:
    """torch's CosineAnnealingLR, whose length is T_max, or a constant rate."""
    name = str(given.take("scheduler.name", default="cosine_annealing"))
    length, last = given.take("scheduler.kwargs.T_max"), given.take("scheduler.kwargs.eta_min")
    draft.set_default("train.warmup_ratio", 0.0, "scheduler")
    if name == "cosine_annealing" and isinstance(length, int | float) and length < 1e9:
        draft.set("train.lr_scheduler_type", "cosine", f"scheduler.name: {name}")
        draft.set("train.min_learning_rate", float(last or 0), f"eta_min: {last}")
        draft.notes.append(f"T_max: {length}; here the cosine ends with the run's last step")
    elif name in ("cosine_annealing", "linear", "constant"):
        # A T_max beyond any run keeps the rate where it is, which is how trlX's examples use it.
        ours = "linear" if name == "linear" else "constant"
        draft.set("train.lr_scheduler_type", ours, f"scheduler.name: {name}, T_max: {length}")
    else:
        draft.cannot("scheduler.name", name, "see train.lr_scheduler_type")


def _adapters(draft: Draft, given: Given) -> None:
    if str(given.take("model.peft_config.peft_type", default="")).upper() != "LORA":
        return
    given.take("model.peft_config.task_type")
    meanings.adapters(
        draft,
        given,
        rank=("model.peft_config.r", 8),
        alpha=("model.peft_config.lora_alpha", 8),
        dropout=("model.peft_config.lora_dropout", None),
        target_modules=("model.peft_config.target_modules", ["q_proj", "v_proj"]),
    )
    if draft.value("train.num_layers_unfrozen") not in (None, *OFF):
        draft.lines.pop("train.num_layers_unfrozen", None)
