"""The model of a run: found, and checked against the layout and the length of samples."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from roll_sft.base.errors import ConfigError, refuse
from roll_sft.config.layout_checks import backend_problems, layout_problems
from roll_sft.config.moe import MoeConfig
from roll_sft.config.schema import RunConfig, on_device
from roll_sft.models.files.assets import TrainedTokenizer, check_links, generation_of, save_assets
from roll_sft.models.files.config_file import load_hf_config
from roll_sft.models.files.model_folder import check_source, local_model
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import ModelSource, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from roll_sft.models.files.hub import HubModel


def located(config: RunConfig) -> "tuple[RunConfig, HubModel | None]":
    """`config` with every `auto` decided and hub ids made local folders; the model on the hub.

    A device that nobody has decided by now is this machine's.
    """
    config = on_device(config, "cuda" if torch.cuda.is_available() else "cpu")
    model = config.model
    assert model.path is not None, "check_config refuses a missing model.path"
    if model.trust_remote_code:
        from roll_sft.models.files.remote_code import check_code_is_here

        check_code_is_here(model.path, key="model.path")
        check_code_is_here(model.tokenizer_path or model.path, key="model.tokenizer_path")
    needs_weights = not (model.random_init or config.dry_run)
    path, hub = local_model(model.path, with_weights=needs_weights)
    tokenizer_path = model.tokenizer_path
    if tokenizer_path is not None:
        tokenizer_path, _ = local_model(tokenizer_path, with_weights=False)
    for folder in {Path(path), Path(tokenizer_path or path)}:
        if folder.is_dir():  # else its reader refuses it
            check_links(folder)
    located = replace(config, model=replace(model, path=path, tokenizer_path=tokenizer_path))
    return located, hub


def load_model(config: RunConfig, hub: "HubModel | None") -> ModelSource:
    """The model's family, shape and tensors, checked against the layout."""
    path = config.model.path
    assert path is not None, "check_config refuses a missing model.path"
    problems = [*layout_problems(config.parallel), *backend_problems(config)]
    try:
        hf_config = load_hf_config(path, trust_remote_code=config.model.trust_remote_code)
        generation_of(Path(path))  # which the export needs
        family = family_of(hf_config)
        shape = family.shape(hf_config)
    except ConfigError as error:
        refuse([*problems, str(error)])
        raise
    problems += model_problems(config, shape)
    asks_moe = config.moe != MoeConfig()
    if shape.experts or config.parallel.expert_model_parallel_size > 1 or asks_moe:
        from roll_sft.job.experts import expert_problems

        problems += expert_problems(config, shape)
    refuse(problems)
    if config.trains_part or config.train.has_groups:
        from roll_sft.job.trained import check_trained

        check_trained(config, family, shape)
    # A dry run says what a job would need, which may be wanted before the weights are there.
    if config.model.random_init or config.dry_run:
        return ModelSource(shape, seed=config.seed)
    source = ModelSource(shape, hub=hub) if hub else ModelSource(shape, folder=path)
    check_source(family, shape, source=source.tensors)
    return source


def save_export_assets(
    config: RunConfig, tokenizer: "PreTrainedTokenizerBase", folder: Path, *, end_of_turn_id: int
) -> None:
    """Write what an export needs beside the weights into `folder`."""
    model = config.model
    assert model.path is not None, "check_config refuses a missing model.path"
    is_given = config.data.chat_template is not None
    trained = TrainedTokenizer(
        tokenizer,
        folder=Path(model.tokenizer_path or model.path),
        end_of_turn_id=end_of_turn_id,
        chat_template=str(tokenizer.chat_template) if is_given else None,
    )
    save_assets(Path(model.path), trained=trained, output=folder)


def model_problems(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    """What the layout and the length of samples ask for that a model of `shape` does not have."""
    parallel, length = config.parallel, config.data.sequence_length
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    tensor_size = parallel.tensor_model_parallel_size
    key = "parallel.tensor_model_parallel_size"
    divided = {
        "num_attention_heads": shape.num_attention_heads,
        "intermediate_size": shape.ffn_hidden_size,
    }
    groups = shape.num_key_value_heads
    # Fewer key heads than tensor ranks are shared between ranks; their norm, if one spans all
    # heads of the projection, cannot be.
    if groups > tensor_size or tensor_size % groups or shape.qk_norm == "projection":
        divided["num_key_value_heads"] = groups
    elif groups < tensor_size:  # Megatron then cuts the rows of the fused projection evenly
        fused = (shape.num_attention_heads + 2 * groups) * shape.head_dim
        divided["rows of the fused query, key and value projection"] = fused
    for name, value in divided.items():
        if tensor_size >= 1 and value % tensor_size:
            rule = f"does not divide the model's {name} {value}"
            yield f"{key}: {tensor_size} {rule}; choose a divisor"
    stages = parallel.pipeline_model_parallel_size
    if stages * virtual > shape.num_layers:
        chunks = f"{stages} stages" + (f" x {virtual} virtual ones" if virtual > 1 else "")
        yield (
            f"parallel.pipeline_model_parallel_size: {chunks} exceed the model's"
            f" {shape.num_layers} layers; choose at most {shape.num_layers} in all"
        )
    if shape.norm_placement == "post" and "layernorm" in config.train.recompute:
        yield "train.recompute: layernorm is of norms before a part of a layer; this model has none"
    if shape.variation is not None:
        yield from shape.variation.problems(length)
    if length > shape.max_position_embeddings:
        yield (
            f"data.sequence_length: {length} exceeds the model's max_position_embeddings"
            f" {shape.max_position_embeddings}; lower it"
        )
