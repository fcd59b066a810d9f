"""How a written folder becomes a checkpoint: manifest last, then one rename, then `latest`.

Imports no Megatron, so the driver can publish while the workers go on. Promise: a folder named
`step_*` is complete; a run killed at any point leaves at most a `.staging_*` folder.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roll_sft.base.files import sync, write_durably
from roll_sft.checkpoint.fingerprint import facts_of
from roll_sft.checkpoint.hashing import sha256_of
from roll_sft.checkpoint.manifest import ASSETS, MANIFEST, SCHEMA_VERSION, RunState
from roll_sft.checkpoint.tensors import take_parts
from roll_sft.data.steps.plan import StepPlan

if TYPE_CHECKING:  # as in facts.py
    from roll_sft.job.prepare import Job

LATEST = "latest"
PACKAGES = ("roll_sft", "torch", "megatron-core", "transformers", "ray")


def publish_step(job: "Job", plan: StepPlan, *, staging: Path) -> Path:
    """Make what all ranks wrote into `staging` after the step of `plan` a checkpoint."""
    parts = take_parts(staging)
    from roll_sft.checkpoint.torch_dist import (
        write_descriptions,  # half a second, that only a save pays
    )

    write_descriptions(staging, parts)
    job.save_assets(staging / ASSETS)
    state = RunState(
        step=plan.step,
        epoch=plan.epoch,
        samples_seen_in_epoch=plan.samples_seen_in_epoch,
        seed=job.config.seed,
        global_batch_size=job.config.train.global_batch_size,
        global_batch_tokens=job.config.train.global_batch_tokens,
        sequence_length=job.config.data.sequence_length,
        sources=job.source_addresses,
        layout=job.layout,
        dtype=job.config.model.dtype,
        facts=facts_of(job),
        optimizer_step=parts[0].optimizer_step,
    )
    hashes = {part.name: part.sha256 for part in parts}
    return publish(staging, state=state, versions=versions_here(), hashes=hashes)


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
