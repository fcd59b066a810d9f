"""The section `export`, and the checks of its values that need no network."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, TypeAlias

from roll_sft.base.text import shown
from roll_sft.config.keys import key

if TYPE_CHECKING:
    from roll_sft.config.schema import RunConfig

# What is pushed. A full fine-tune has a model, LoRA an adapter and the model it is merged into.
Pushed: TypeAlias = Literal["model", "adapter", "merged", "both"]
LONGEST_REPO_ID = 96  # characters, on the hub
_NAME = r"[A-Za-z0-9](?:[\w.\-]*[A-Za-z0-9])?"
_REPO_ID = re.compile(rf"{_NAME}/{_NAME}")
_BRANCH = re.compile(r"\w[\w.\-/]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class PushConfig:
    """The repository of the hub that a run pushes its model to."""

    repo_id: str | None = key(
        None, "Repository to push to at the end, as owner/name; it is made if missing."
    )
    private: bool = key(True, "Make a missing repository private; others stay as they are.")
    revision: str | None = key(None, "Branch to push to, made if missing; null takes main.")
    what: Pushed | None = key(
        None,
        "model of a full fine-tune; of LoRA the adapter, the merged model, or both; null takes all"
        " that checkpoint.hf_export makes.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Where the exported model goes besides the run's folder."""

    push_to_hub: PushConfig = field(default_factory=PushConfig)


def export_problems(config: "RunConfig") -> Iterator[str]:
    """What is wrong with `config.export`, alone and with the other sections."""
    push, where = config.export.push_to_hub, "export.push_to_hub"
    if push.repo_id is None:
        default = PushConfig()
        for item in fields(push):
            value = getattr(push, item.name)
            if value != getattr(default, item.name):
                yield f"{where}.{item.name}: {shown(value)} has no effect; set {where}.repo_id"
        return
    if (problem := repo_problem(push.repo_id)) is not None:
        yield f"{where}.repo_id: {problem}"
    if push.revision is not None and (problem := branch_problem(push.revision)) is not None:
        yield f"{where}.revision: {problem}"
    export = config.checkpoint.hf_export
    if export == "none" or not config.checkpoint.save:
        key_ = "checkpoint.hf_export: none" if export == "none" else "checkpoint.save: false"
        yield f"{key_} leaves nothing to push to {shown(push.repo_id)}; export the final model"
    yield from _what_problems(config)


def repo_problem(repo_id: str) -> str | None:
    """Why the hub would not take the name `repo_id`; None if it would."""
    is_name = _REPO_ID.fullmatch(repo_id) and not re.search(r"--|\.\.|\.git$", repo_id)
    if is_name and len(repo_id) <= LONGEST_REPO_ID:
        return None
    return (
        f"{shown(repo_id)} is no repository of the hub; write owner/name, of letters, digits, dot,"
        f" dash and underscore, at most {LONGEST_REPO_ID} characters"
    )


def branch_problem(revision: str) -> str | None:
    """Why `revision` is no name of a branch; None if it is."""
    if _BRANCH.fullmatch(revision) and ".." not in revision and not revision.endswith(("/", ".")):
        return None
    return f"{shown(revision)} is no branch; write letters, digits, dot, dash, slash, underscore"


def _what_problems(config: "RunConfig") -> Iterator[str]:
    what, export = config.export.push_to_hub.what, config.checkpoint.hf_export
    if what is None:
        return
    if (what == "model") == (config.lora.rank > 0):
        of = "a full fine-tune" if what == "model" else "LoRA"
        yield (
            f"export.push_to_hub.what: {what} is of {of}, and lora.rank is {config.lora.rank};"
            " leave it out"
        )
    elif export in ("adapter", "merged") and what != export:
        yield (
            f"export.push_to_hub.what: {what} is not all made by checkpoint.hf_export={export};"
            " set checkpoint.hf_export=final"
        )
