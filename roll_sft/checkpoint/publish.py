"""How a written folder becomes a checkpoint: descriptions, manifest, one rename, then `latest`.

roll_sft reads `index.json` alone. `.metadata` is a pickle for PyTorch; `common.pt` and
`metadata.json` are for Megatron-Core, which loads the folder as `torch_dist`.

Imports no Megatron, so the driver can publish while the workers go on. Promises: a folder named
`step_*` is complete; a run killed at any point leaves at most a `.staging_*` folder; a pickle of a
checkpoint is written and never loaded, so a folder from elsewhere cannot run code.
"""

import contextlib
import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roll_sft.base.files import sync, write_durably
from roll_sft.checkpoint.manifest import ASSETS, MANIFEST, SCHEMA_VERSION, RunState, sha256_of
from roll_sft.data.steps.plan import StepPlan

if TYPE_CHECKING:
    from roll_sft.checkpoint.tensors import ShardFile

LATEST = "latest"
METADATA = ".metadata"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
PACKAGES = ("roll_sft", "torch", "megatron-core", "transformers", "ray")


def publish_step(
    run: RunState, plan: StepPlan, *, staging: Path, save_assets: Callable[[Path], None]
) -> Path:
    """Make what all ranks wrote into `staging` after the step of `plan` a checkpoint.

    `run` is the state of the run before its first step. `save_assets` writes into a folder what an
    export needs beside the weights.
    """
    from roll_sft.checkpoint.tensors import take_parts  # torch, that only a save needs

    parts = take_parts(staging)
    write_descriptions(staging, parts)
    save_assets(staging / ASSETS)
    steps = [part.optimizer_step for part in parts]  # 0 of a rank whose weights are all frozen
    state = dataclasses.replace(
        run,
        step=plan.step,
        epoch=plan.epoch,
        samples_seen_in_epoch=plan.samples_seen_in_epoch,
        optimizer_step=max((step for step in steps if step is not None), default=None),
    )
    hashes = {part.name: part.sha256 for part in parts}
    return publish(staging, state=state, versions=versions_here(), hashes=hashes)


def write_descriptions(folder: Path, parts: "Sequence[ShardFile]") -> None:
    """Describe what the ranks wrote into `folder` to whoever reads it."""
    import torch

    from roll_sft.checkpoint.tensors import INDEX

    tensors: dict[str, dict[str, Any]] = {}
    for chunk in (chunk for part in parts for chunk in part.chunks):
        known = {"dtype": chunk.dtype, "shape": chunk.shape, "chunks": []}
        place = (chunk.file, chunk.start, chunk.length, chunk.data_start)
        entry = tensors.setdefault(chunk.key, known)
        entry["chunks"].append([chunk.offset, chunk.sizes, *place])
    (folder / INDEX).write_text(json.dumps({"tensors": tensors}), encoding="utf-8")
    (folder / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")
    torch.save({}, folder / "common.pt")
    with (folder / METADATA).open("wb") as file:
        pickle.dump(_metadata(tensors, parts), file)


def _metadata(tensors: dict[str, dict[str, Any]], parts: "Sequence[ShardFile]") -> Any:
    """PyTorch's own description, a `Metadata`."""
    import torch
    from torch.distributed.checkpoint import filesystem, metadata  # slow to import

    from roll_sft.checkpoint.tensors import DTYPES

    described: dict[str, Any] = {}
    places = {}
    for part in parts:
        for key, (start, length) in part.objects.items():
            described[key] = metadata.BytesStorageMetadata()
            places[metadata.MetadataIndex(key)] = filesystem._StorageInfo(part.name, start, length)
    for key, entry in tensors.items():
        chunks = []
        for offset, sizes, file, start, length, _data_start in entry["chunks"]:
            chunks.append(metadata.ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)))
            place = metadata.MetadataIndex(key, torch.Size(offset))
            places[place] = filesystem._StorageInfo(file, start, length)
        properties = metadata.TensorProperties(DTYPES[entry["dtype"]])
        shape = torch.Size(entry["shape"])
        described[key] = metadata.TensorStorageMetadata(properties, shape, chunks)
    return metadata.Metadata(described, storage_data=places, version=filesystem.CURRENT_DCP_VERSION)


def staging_folder(checkpoints: Path, step: int) -> Path:
    """An empty folder to write step `step` into; what an earlier attempt left there is removed."""
    folder = checkpoints / f".staging_{step:08d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def publish(
    staging: Path,
    *,
    state: RunState,
    versions: dict[str, str],
    hashes: Mapping[str, str] | None = None,
) -> Path:
    """Add the manifest to a written `staging`, give it its final name, point `latest` to it.

    `hashes` are of files that are known and on disk already; the others are read for theirs.
    """
    write_manifest(staging, state=state, versions=versions, hashes=hashes or {})
    final = staging.with_name(f"step_{state.step:08d}")
    staging.rename(final)
    sync(final.parent)
    write_durably(staging.with_name(LATEST), final.name + "\n")
    return final


def write_manifest(
    folder: Path, *, state: RunState, versions: dict[str, str], hashes: Mapping[str, str]
) -> None:
    """Write the manifest into `folder`, of all that it holds, with `hashes` as in `publish`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        **dataclasses.asdict(state),
        "versions": versions,
        "files": {
            str(path.relative_to(folder)): {
                "size": path.stat().st_size,
                "sha256": hashes.get(path.name) or sha256_of(path),
            }
            for path in files
        },
    }
    # In this order a crash of the machine, too, leaves all of a checkpoint or no name for it.
    for path in (*files, *{path.parent for path in files}):
        if path.name not in hashes:
            sync(path)
    write_durably(folder / MANIFEST, json.dumps(manifest, indent=2, allow_nan=False) + "\n")


def versions_here() -> dict[str, str]:
    """Versions of what wrote the checkpoint; a package that runs from its sources has none."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
