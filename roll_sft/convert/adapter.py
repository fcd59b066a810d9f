"""A checkpoint of adapters -> a folder that PEFT loads, or its tensors.

The folder has PEFT's two files, and what the base's folder lacks: the tokenizer and the chat
template that were trained with, the fingerprint of the base model, a card.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from roll_sft.base.errors import CheckpointError, ConfigError
from roll_sft.base.text import shown
from roll_sft.checkpoint.manifest import ASSETS, MANIFEST, Manifest, check_complete, verify_hashes
from roll_sft.checkpoint.reader import Reader
from roll_sft.config.lora import LoraConfig
from roll_sft.convert.from_hf import DTYPES
from roll_sft.convert.model_card import write_card
from roll_sft.job.lora import tensor_problem
from roll_sft.models.adapters.adapter import adapter_shapes
from roll_sft.models.adapters.peft_folder import (
    BASE,
    CONFIG,
    WEIGHTS,
    AdapterSource,
    config_of,
    read_lora,
)
from roll_sft.models.family import Family
from roll_sft.models.files.assets import asset_files, copy_file
from roll_sft.models.files.json_files import read_json, write_json
from roll_sft.models.files.safetensors_in import Shape
from roll_sft.models.files.safetensors_out import ShardPlan, write_shards
from roll_sft.models.shape import ModelShape


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter of a step folder or of a PEFT folder, to be read tensor by tensor."""

    folder: Path
    lora: LoraConfig
    shapes: dict[str, Shape]  # by PEFT's names
    manifest: Manifest | None  # of a step folder
    tensors: Reader | AdapterSource
    base_dtype: str | None  # in which the base was quantised; None if it was not, or nobody knows

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor; of a step folder in fp32 if that was trained."""
        return self.tensors.read(name)[: self.shapes[name][0]]  # an embedding may be padded


def stored_adapter(folder: Path, family: Family, shape: ModelShape) -> StoredAdapter:
    """The adapter in `folder`, which must be one of the model that `shape` describes.

    Raises `ConfigError` where it is no adapter, or one of another model.
    """
    if (folder / MANIFEST).is_file():
        manifest = check_complete(folder)
        lora = lora_of(manifest)
        if lora is None:
            raise ConfigError(
                f"--adapter: '{folder}' is a checkpoint of a whole model; `roll-sft convert`"
                " exports it, and there is nothing to merge"
            )
        verify_hashes(folder, manifest.files)
        reader = Reader(folder, dtype=torch.float32)
        shapes = adapter_shapes(family, shape, lora)
        dtype = None if lora.quantize_base == "none" else manifest.state.dtype
        return StoredAdapter(folder, lora, shapes, manifest, reader, dtype)
    lora = read_lora(folder, key="--adapter")
    tensors = AdapterSource(folder, key="--adapter")
    found = tensors.shapes()
    targets = sorted({name.split(".")[-3] for name in found if name.endswith(".lora_A.weight")})
    lora = LoraConfig(
        rank=lora.rank,
        alpha=lora.alpha,
        use_rslora=lora.use_rslora,
        target_modules=targets,
        modules_to_save=lora.modules_to_save,
    )
    wanted = adapter_shapes(family, shape, lora)
    if problem := tensor_problem(found, wanted):
        raise ConfigError(
            f"--adapter: '{folder}' {problem}; give an adapter of the model in --base"
        )
    dtype = _quantized_dtype(folder)
    if dtype is not None:
        lora = replace(lora, quantize_base="nf4")
    return StoredAdapter(folder, lora, wanted, None, tensors, dtype)


def _quantized_dtype(folder: Path) -> str | None:
    """In which dtype a run of ours quantised the base of the adapter in `folder`, if it did."""
    if not (folder / BASE).is_file():
        return None
    dtype = read_json(folder / BASE).get("quantized_from")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            f"{folder / BASE}: quantized_from {shown(dtype)} is not one of {', '.join(DTYPES)};"
            " take another copy of the adapter"
        )
    return dtype


def lora_of(manifest: Manifest) -> LoraConfig | None:
    """What adapters a checkpoint holds; None for one of a whole model."""
    facts = manifest.state.facts.get("lora")
    if not isinstance(facts, dict):
        return None
    names = ("rank", "alpha", "dropout", "use_rslora", "target_modules", "modules_to_save")
    quantize_base = facts.get("quantize_base", "none")  # older checkpoints do not say
    try:
        return LoraConfig(quantize_base=quantize_base, **{name: facts[name] for name in names})
    except KeyError as error:
        raise CheckpointError(
            f"manifest.json: facts.lora has no {error}; the checkpoint is damaged, take another"
        ) from error


def export_adapter(
    checkpoint: Path, folder: Path, model: tuple[Family, ModelShape], *, dtype: str | None
) -> str:
    """Write the adapters of `checkpoint` into the empty `folder`, in fp32 or in `dtype`.

    Returns a line for the user.
    """
    adapter = stored_adapter(checkpoint, *model)
    assert adapter.manifest is not None, "a step folder has a manifest"
    facts: Any = adapter.manifest.state.facts["lora"]
    config = config_of(
        adapter.lora, targets=facts["target_modules"], base=facts.get("base_path", "")
    )
    for name in asset_files(checkpoint / ASSETS):
        if name != "config.json":  # PEFT takes a folder with one for a whole model
            copy_file(checkpoint / ASSETS / name, folder / name)
    write_json(folder / CONFIG, config)
    base = {"fingerprint": facts["base_model"]}
    if adapter.base_dtype is not None:
        base["quantized_from"] = adapter.base_dtype
    write_json(folder / BASE, base)
    chosen = dtype or "fp32"
    plan = ShardPlan(DTYPES[chosen], adapter.shapes, {WEIGHTS: tuple(adapter.shapes)})
    write_shards(_tensors(adapter), plan=plan, folder=folder)
    write_card(checkpoint, folder, manifest=adapter.manifest, dtype=chosen, is_adapter=True)
    return f"adapter of rank {adapter.lora.rank} in {chosen}"


def _tensors(adapter: StoredAdapter) -> Iterator[tuple[str, torch.Tensor]]:
    for name in adapter.shapes:
        yield name, adapter.read(name)
