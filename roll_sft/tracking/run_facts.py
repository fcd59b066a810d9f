"""The parameters, tags and data sets of a run, for trackers.

Promises: no text holds a credential.
"""

import contextlib
import dataclasses
import getpass
import hashlib
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from roll_sft.base.layout import ParallelLayout
from roll_sft.base.text import redacted
from roll_sft.config.schema import RunConfig, SourceConfig, source_name
from roll_sft.data.tokens.cache import TokenSet
from roll_sft.job.job import Job

PACKAGES = ("roll_sft", "torch", "megatron-core", "ray", "transformers")
# Keys that decide the weights or the speed are recorded in every run, so that runs can be compared;
# all other keys only where they differ from their default.
ALWAYS = ("seed", "deterministic", "model.", "data.", "parallel.", "train.")
ONLY_WHERE_SET = (
    "model.trust_remote_code",
    "data.on_bad_row",
    "data.max_bad_fraction",
    "parallel.cpus_per_worker",
    "parallel.placement_timeout_s",
    "train.eval_steps",
    "train.save_steps",
    "train.save_minutes",
    "train.logging_steps",
    "train.log_samples",
)
# These have no influence on the result.
NEVER = ("output_dir", "run_name", "dry_run", "prepare_only", "resume", "tracking")
NEVER_KEYS = ("data.cache_dir", "data.num_proc", "cluster.address")
GIT_TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class DataInput:
    """One source of data. `profile` holds its counts, such as rows and tokens."""

    name: str
    digest: str
    source: str
    context: str  # "train" or "validation"
    profile: Mapping[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class RunFacts:
    """What is known of a run before its first step."""

    params: Mapping[str, str]
    tags: Mapping[str, str]
    inputs: tuple[DataInput, ...]


def facts_of(job: Job) -> RunFacts:
    """The facts of `job`, with those of the current folder and this machine."""
    return RunFacts(
        params=params_of(job.config),
        tags={**tags_here(), "layout": _layout(job.layout)},
        inputs=tuple(_inputs(job)),
    )


def params_of(config: RunConfig) -> dict[str, str]:
    """The keys of `config` that decide the run, flattened, without those that have no value."""
    given, defaults = dataclasses.asdict(config), dataclasses.asdict(RunConfig())
    chosen = {key: value for key, value in given.items() if key not in NEVER}
    for kind in ("train", "validation"):
        chosen["data"][kind] = ", ".join(map(_share, getattr(config.data, kind)))
    flat_defaults = dict(_flat(defaults))
    params = {}
    for key, value in _flat(chosen):
        is_wanted = key.startswith(ALWAYS) and key not in ONLY_WHERE_SET
        is_set = value != flat_defaults.get(key)
        if value not in (None, "") and key not in NEVER_KEYS and (is_wanted or is_set):
            params[key] = redacted(str(value))
    return params


def tags_here() -> dict[str, str]:
    """User, host, git commits and versions of packages."""
    return {**_place_tags(), **_version_tags()}


def _share(entry: SourceConfig) -> str:
    if entry.samples is not None:
        return f"{source_name(entry)} ({entry.samples} samples)"
    return source_name(entry) + (f" (weight {entry.weight:g})" if entry.weight != 1 else "")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _place_tags() -> dict[str, str]:
    """User, host and commits; MLflow's pages show tags that begin with `mlflow.`."""
    tags = {
        "host": platform.node(),
        "mlflow.source.name": "roll_sft",
        "mlflow.source.type": "LOCAL",
    }
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    here, package = Path(), Path(__file__)
    if commit := _commit(here):
        tags["mlflow.source.git.commit"], tags["git.dirty"] = commit
    # An installed package may lie in an ignored folder of another repository.
    is_ours = _git(package.parent, "ls-files", "--error-unmatch", package.name) is not None
    if is_ours and (commit := _commit(package.parent)):
        tags["roll_sft.git.commit"], tags["roll_sft.git.dirty"] = commit
    return tags


def _commit(folder: Path) -> tuple[str, str] | None:
    """The commit of the repository around `folder`, and "true" if tracked files have changed."""
    described = _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    if described is None:
        return None
    commit, _, dirty = described.strip().partition("-")
    return commit, "true" if dirty else "false"


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of git; None without git or a repository, and after `GIT_TIMEOUT_S`."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_S
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _version_tags() -> dict[str, str]:
    tags = {"version.python": platform.python_version()}
    for package in PACKAGES:
        try:
            tags[f"version.{package}"] = version(package)
        except PackageNotFoundError:  # a checkout that is not installed
            continue
    return tags


def _layout(layout: ParallelLayout) -> str:
    sequence = ", SP" if layout.sequence_parallel else ""
    return (
        f"TP {layout.tensor_size}, PP {layout.pipeline_size}, CP {layout.context_size},"
        f" DP {layout.data_size}{sequence}"
    )


def _inputs(job: Job) -> Iterator[DataInput]:
    sets = {"train": [job.data.train], "validation": list(job.data.validation.values())}
    for context, tokens in sets.items():
        digests = {name: digest for each in tokens for name, digest in _digests(each)}
        for report in job.reports[context]:
            yield DataInput(
                name=report.name,
                digest=digests[report.name],
                source=redacted(report.path),
                context=context,
                profile={
                    "num_rows": report.rows,
                    "kept": report.kept,
                    "tokens": report.tokens,
                    "supervised_tokens": report.supervised_tokens,
                },
            )


def _digests(tokens: TokenSet) -> Iterator[tuple[str, str]]:
    """Pairs of a source and a hash of its data, tokenizer and options."""
    for source in tokens.sources:
        shards = json.dumps([cache.folder.name for cache in source.caches])
        yield source.name, hashlib.sha256(shards.encode()).hexdigest()[:16]
