"""TRL's `SFTConfig`, `ModelConfig` and `ScriptArguments`: YAML, and `trl sft` or `sft.py`.

https://huggingface.co/docs/trl/sft_trainer
"""

from typing import Any

from roll_sft.migrate import hf_arguments, meanings
from roll_sft.migrate.draft import OFF, Draft
from roll_sft.migrate.given import Given

NAME = "TRL"
_READERS = ("json", "parquet", "arrow")  # paths of `datasets` that say how `data_files` are read
NOT_NEEDED = hf_arguments.NOT_NEEDED | {
    "dataset_streaming": "data is always streamed",
    "streaming": "data is always streamed",
    "datasets": "read entry by entry",
    "columns": "columns that are not used are named in the report of the data",
    "pad_token": "packs are padded with any token, which no loss covers",
    "pad_to_multiple_of": "packs are padded as the layout needs",
    "eval_packing": "evaluation packs as training does",
    "padding_free": "packs have no padding between samples",
    "loss_type": "the loss is the negative log-likelihood, computed in chunks",
    "packing_strategy": "packs hold whole samples",
    "gradient_checkpointing_use_reentrant": "layers are recomputed as Megatron-Core does it",
    "lora_task_type": "a causal language model is what is trained",
    "use_bnb_nested_quant": "NF4 always has double quantisation here",
    "config": "the file itself",
    "shuffle_dataset": "samples are shuffled by seed in each epoch, as TRL's sampler does",
    "dataset_batch_size": "rows are read as they come",
    "experts_implementation": "experts are Megatron-Core's",
}
UNSUPPORTED = hf_arguments.UNSUPPORTED | {
    "model_revision": "download that revision, and give its folder as model.path",
    "model_init_kwargs*": "the model is built from its config.json",
    "dataset_config": "give the files of that subset as data.train paths",
    "test_split_size": "write a file of its own for validation",
    "dataset_kwargs*": "rows of token ids are not read; give texts",
    "eos_token": "the chat template decides how a turn ends",
    "activation_offloading": "set train.recompute",
    "lora_target_parameters": "routed experts have no adapters here; leave it out",
    "use_dora": "not LoRA; leave it out",
    "load_in_8bit": "set lora.quantize_base=nf4",
    "trackio_space_id": "choose a tracker of tracking.backends",
    "router_aux_loss_coef": "set moe.aux_loss_coef",
}


def translate(given: Given, draft: Draft, *, gpus: int | None) -> None:
    """Map what has a meaning here."""
    draft.copy(
        given,
        {
            "model.path": "model_name_or_path",
            "data.text_key": "dataset_text_field",
            "data.num_proc": "dataset_num_proc",
            "data.chat_template": "chat_template_path",
            "data.sequence_length": ("max_length", "max_seq_length"),
            "data.packing": "packing",
            "parallel.tensor_model_parallel_size": "parallelism_config.tp_size",
            "parallel.context_parallel_size": "parallelism_config.cp_size",
        },
        {"data.sequence_length": 1024, "data.packing": False},
    )
    _dtype(draft, given)
    meanings.attention(draft, given, "attn_implementation")
    _sources(draft, given)
    _supervised(draft, given)
    side = given.take("truncation_mode", default="keep_start")
    if side == "keep_start":
        draft.set("data.overlong", "truncate", "truncation_mode: keep_start, TRL's default")
    else:
        draft.cannot("truncation_mode", side, "samples are cut at their end; or drop them")
    strategy = given.take("packing_strategy", default="bfd")
    if draft.value("data.packing") and strategy != "bfd":
        draft.cannot("packing_strategy", strategy, "samples are packed whole, as bfd does")
    hf_arguments.training(draft, given, rate=2e-5)
    meanings.recompute(
        draft, given, "gradient_checkpointing", "activation_checkpointing", default=True
    )
    meanings.trackers(draft, given, "report_to", default=["none"])
    draft.copy(given, {"tracking.experiment": "project"})
    meanings.run_folder(draft, given, "output_dir", "run_name")
    hf_arguments.rows(draft, given, micro=8, gpus=gpus, packed=bool(draft.value("data.packing")))
    _lora(draft, given)


def _dtype(draft: Draft, given: Given) -> None:
    name = given.take("dtype", "torch_dtype")
    meanings.dtype_flags(draft, given)
    if name not in (None, "auto", draft.value("model.dtype")):
        draft.notes.append(f"dtype: {name} is of TRL's weights; here master weights are fp32")


def _sources(draft: Draft, given: Given) -> None:
    mixture = given.take("datasets")
    if isinstance(mixture, list):
        entries = []
        for index, each in enumerate(mixture):
            path, files = each.get("path"), each.get("data_files")
            is_file = path in _READERS and isinstance(files, str)
            entry: dict[str, Any] = {"path": str(files if is_file else path)}
            for theirs, ours in (("split", "split"), ("fraction", "weight")):
                if each.get(theirs) is not None:
                    entry[ours] = each[theirs]
            entries.append(entry)
            for key in ("name", "data_dir", "data_files"):
                if each.get(key) is not None and not (is_file and key == "data_files"):
                    draft.cannot(
                        f"datasets[{index}].{key}", each[key], "join it to the path of the source"
                    )
        draft.set("data.train", entries, "datasets")
        return
    name, split = given.take("dataset_name"), given.take("dataset_train_split", default="train")
    if name is not None:
        meanings.sources(draft, "data.train", name, f"dataset_name: {name}", split=str(split))
    test = given.take("dataset_test_split")
    strategy = given.values.get("eval_strategy", "no")
    if name is not None and strategy not in ("no", False):
        meanings.sources(
            draft,
            "data.validation",
            name,
            f"eval_strategy: {strategy}",
            split=str(test or "test"),
        )


def _supervised(draft: Draft, given: Given) -> None:
    """TRL trains on whole conversations unless it is told otherwise."""
    completion, assistant = given.take("completion_only_loss"), given.take("assistant_only_loss")
    if assistant:
        draft.set("data.train_on", "assistant", "assistant_only_loss: true")
    elif completion is False:
        draft.set("data.train_on", "all", "completion_only_loss: false")
    elif completion:
        draft.set("data.train_on", "assistant", "completion_only_loss: true")
    else:
        draft.set("data.train_on", "all", "assistant_only_loss is false by default")
        draft.notes.append(
            "data.train_on: all is TRL's default for conversations and texts; rows of prompt and"
            " completion train on the completion there: set assistant for these"
        )


def _lora(draft: Draft, given: Given) -> None:
    names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save")
    if given.take("use_peft") in OFF:
        more = ("use_rslora", "load_in_4bit", "bnb_4bit_quant_type")
        meanings.leave(draft, given, (*names, *more), "use_peft is not set")
        return
    meanings.adapters(
        draft,
        given,
        rank=("lora_r", 16),
        alpha=("lora_alpha", 32),
        dropout=("lora_dropout", 0.05),
        target_modules=("lora_target_modules", None),
        modules_to_save=("lora_modules_to_save", None),
        use_rslora=("use_rslora", None),
    )
    if "lora.target_modules" not in draft.lines:
        draft.set("lora.target_modules", ["q_proj", "v_proj"], "PEFT's own list for most families")
    kind = given.take("bnb_4bit_quant_type", default="nf4")
    if given.take("load_in_4bit") not in OFF:
        draft.set("lora.quantize_base", str(kind), f"load_in_4bit: true, {kind}")
