"""One checkpoint step folder -> a HuggingFace folder, in one process, tensor by tensor.

The checkpoint describes itself (`hf_assets/`, `manifest.json`), so nothing else is asked for.
Memory holds one tensor. The folder appears under its name when it is complete, and when it was
compared, if that was asked for. Every tensor of the checkpoint is read, and every one of the
HuggingFace model written, or an error names it.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from roll_sft.engine.card import write_card
from roll_sft.engine.import_hf import DTYPES
from roll_sft.engine.manifest import ASSETS, check_complete
from roll_sft.engine.reader import Reader
from roll_sft.engine.resume import verify_hashes
from roll_sft.engine.safe_load import check_pickles
from roll_sft.engine.versions import check_megatron
from roll_sft.models.hf_write import plan_shards, write_hf_folder
from roll_sft.models.new_folder import new_folder
from roll_sft.models.registry import family_of, load_hf_config
from roll_sft.models.spec import Family, ModelShape


def export(
    checkpoint: Path, output: Path, *, dtype: str | None, replace: bool, verified: bool = False
) -> str | None:
    """Write `checkpoint` as a model folder that transformers loads.

    `dtype` is fp32, bf16 or fp16; None keeps that of the source model. With `verified` every file
    of the checkpoint must have the manifest's SHA-256, and the two are compared before the folder
    gets its name; returns what was found. Raises `CheckpointError` for a
    folder that is no complete checkpoint, an `output` that is in the way, or logits that differ.
    """
    manifest = check_complete(checkpoint)
    if verified:
        verify_hashes(checkpoint, manifest)
    check_megatron(checkpoint, manifest.versions)
    check_pickles(checkpoint)
    config = load_hf_config(str(checkpoint / ASSETS), trust_remote_code=False)
    family = family_of(config)
    shape = family.shape(config)
    chosen = DTYPES[dtype] if dtype else config.dtype
    plan = plan_shards(
        family.hf_shapes(shape),
        dtype=chosen if isinstance(chosen, torch.dtype) else torch.float32,
    )
    reader = Reader(checkpoint, dtype=plan.dtype)
    with new_folder(output, kind="model", marker="config.json", replace=replace) as folder:
        write_hf_folder(
            _hf_tensors(reader, family, shape),
            plan=plan,
            assets=checkpoint / ASSETS,
            folder=folder,
        )
        reader.check_all_read()
        write_card(checkpoint, folder)
        if not verified:
            return None
        from roll_sft.engine.verify import verify  # slow: paid by whoever asks

        return str(verify(folder, checkpoint, dtype=plan.dtype))


def _hf_tensors(
    reader: Reader, family: Family, shape: ModelShape
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every HuggingFace tensor once, in the order of the family's table."""
    for name, word in family.weights(shape).items():
        if word.hf_shapes:  # a tied head owns none: its embedding is exported
            yield from word.to_hf(reader.read(name)).items()
