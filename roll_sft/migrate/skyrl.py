"""SkyRL's `skyrl.train.main_sft`: YAML and overrides.

https://docs.skyrl.ai/docs/sft/overview
"""

from roll_sft.migrate import meanings
from roll_sft.migrate.draft import Draft
from roll_sft.migrate.given import Given

NAME = "SkyRL"
NOT_NEEDED = {
    "strategy": "training is Megatron-Core's here",
    "placement.*": "workers are placed by Ray",
    "remove_microbatch_padding": "packs have no padding between samples",
}
UNSUPPORTED = {
    "eval_before_train": "the first evaluation is after train.eval_steps",
    "pretokenized_dataset_paths": "rows of token ids are not read; give texts",
    "sampler*": "samples are shuffled by seed",
    "model.lora.*": "set the section lora",
}


def translate(given: Given, draft: Draft, *, gpus: int | None) -> None:
    """Map what has a meaning here."""
    section = "megatron_config."
    draft.copy(
        given,
        {
            "model.path": "model.path",
            "data.sequence_length": "max_length",
            "data.num_proc": "num_workers",
            "data.cache_dir": "cache_dir",
            "data.messages_key": "messages_key",
            "data.tools_key": "tools_key",
            "data.system_key": "system_key",
            "train.eval_steps": "eval_interval",
            "train.save_steps": "ckpt_interval",
            "train.weight_decay": "optimizer_config.weight_decay",
            "train.warmup_steps": "optimizer_config.num_warmup_steps",
            "parallel.tensor_model_parallel_size": f"{section}tensor_model_parallel_size",
            "parallel.pipeline_model_parallel_size": f"{section}pipeline_model_parallel_size",
            "parallel.expert_model_parallel_size": f"{section}expert_model_parallel_size",
            "parallel.context_parallel_size": (
                f"{section}context_parallel_size",
                "sequence_parallel_size",
            ),
            "tracking.experiment": "project_name",
            "seed": "seed",
        },
    )
    for key, theirs, part in (
        ("data.train", "train_datasets", "train_dataset_splits"),
        ("data.validation", "eval_dataset_name", "eval_dataset_split"),
    ):
        names, splits = given.take(theirs), given.take(part)
        listed = [names] if isinstance(names, str) else names or []
        parts = [splits] if isinstance(splits, str) else splits or []
        entries = [
            {"path": str(path)} | ({"split": str(parts[index])} if index < len(parts) else {})
            for index, path in enumerate(listed)
        ]
        if entries:
            draft.set(key, entries, theirs)
    turns = given.take("train_on_what", default="last_assistant_message")
    last = "last_assistant" if str(turns).startswith("last") else "assistant"
    draft.set("data.train_on", last, f"train_on_what: {turns}")
    meanings.learning_rate(draft, given, "optimizer_config.lr", default=1e-6)
    meanings.clip(draft, given, "optimizer_config.max_grad_norm")
    meanings.schedule(draft, given, "optimizer_config.scheduler", default="constant_with_warmup")
    meanings.max_steps(draft, given, "num_steps")
    meanings.epochs(draft, given, "num_epochs", default=1)
    names = {"each": "placement.num_gpus_per_node", "nodes": "placement.num_nodes"}
    meanings.nodes_of_file(draft, given, gpus, **names)
    meanings.batch(
        draft,
        int(given.number("batch_size", default=4)),
        "batch_size",
        micro_rows=int(given.number("micro_train_batch_size_per_gpu", default=1)),
        drops_last=True,
    )
    meanings.trackers(draft, given, "logger", default=["console"])
    meanings.run_folder(draft, given, "ckpt_path", given.name_of("run_name"))
