"""How a written folder becomes a checkpoint: manifest last, then one rename, then `latest`.

Imports no Megatron, so the driver can publish while the workers go on. Promise: a folder named
`step_*` is complete; a run killed at any point leaves at most a `.staging_*` folder.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from roll_sft.base.files import sync, write_durably
from roll_sft.checkpoint.manifest import ASSETS, MANIFEST, SCHEMA_VERSION, RunState, sha256_of
from roll_sft.checkpoint.tensors import take_parts
from roll_sft.data.steps.plan import StepPlan

LATEST = "latest"
PACKAGES = ("roll_sft", "torch", "megatron-core", "transformers", "ray")


def publish_step(
    run: RunState, plan: StepPlan, *, staging: Path, save_assets: Callable[[Path], None]
) -> Path:
    """Make what all ranks wrote into `staging` after the step of `plan` a checkpoint.

    `run` is the state of the run before its first step. `save_assets` writes into a folder what an
    export needs beside the weights.
    """
    parts = take_parts(staging)
    from roll_sft.checkpoint.torch_dist import write_descriptions  # torch, that only a save needs

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
