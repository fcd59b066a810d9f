"""`Prepared`: what preparing finds out about a run. It crosses to training as a folder.

Of the tokenizer, the chat template and the rows it holds the results: token caches, reports,
digests, and the files that belong beside the weights. Promise: what is read is what was written,
given the same configuration.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from roll_sft.base.files import write_durably, writing
from roll_sft.base.text import redacted_tree
from roll_sft.config.schema import RunConfig
from roll_sft.data.tokens.cache import SourceReport, SourceTokens, TokenCache, TokenData, TokenSet
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import ModelSource

JOB_FILE = "job.json"
PROMPTS_FILE = "prompts.json"
ASSETS = "hf_assets"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What training needs to know of its model and its data."""

    config: RunConfig  # every `auto` is decided, and hub ids are local folders
    source: ModelSource
    data: TokenData
    reports: dict[str, tuple[SourceReport, ...]]  # "train" and "validation"
    digests: Mapping[str, str]  # of "tokenizer" and "chat_template"
    save_assets: Callable[[Path], None]  # writes what an export needs beside weights into a folder
    prompts: Sequence[Mapping[str, Any]] = ()  # of evaluation.prompts; see job/prompts.py


def write_prepared(prepared: Prepared, folder: Path) -> None:
    """Write `prepared` into `folder`, in place of an earlier one. The file of the job comes last.

    Raises `ResourceError` where the disk takes no more.
    """
    config, source = prepared.config, prepared.source
    values = {
        "parallel": {"device": config.parallel.device},
        "model": {
            name: getattr(config.model, name) for name in ("path", "tokenizer_path", "dtype")
        },
        "shape": asdict(source.shape),
        "hub": asdict(source.hub) if source.hub else None,
        "train": _sources(prepared.data.train),
        "validation": [_sources(tokens) for tokens in prepared.data.validation.values()],
        "tool_call_ids": prepared.data.tool_call_ids,
        "reports": {
            kind: [redacted_tree(report.to_dict()) for report in reports]
            for kind, reports in prepared.reports.items()
        },
        "digests": dict(prepared.digests),
    }
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        prepared.save_assets(folder / ASSETS)
        if prepared.prompts:
            write_durably(folder / PROMPTS_FILE, json.dumps([*prepared.prompts], indent=1) + "\n")
        write_durably(folder / JOB_FILE, json.dumps(values, indent=1) + "\n")


def read_prepared(config: RunConfig, folder: Path) -> Prepared:
    """What `write_prepared` has written into `folder`, for the same `config`."""
    values = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    shape = values["shape"]
    shape["rotary_inv_freq"] = tuple(shape["rotary_inv_freq"])
    if shape["experts"] or shape["variation"]:
        from roll_sft.models.stored_shape import parts_of

        shape |= parts_of(shape)
    config = replace(
        config,
        model=replace(config.model, **values["model"]),
        parallel=replace(config.parallel, **values["parallel"]),
    )
    validation = [_opened(sources) for sources in values["validation"]]
    return Prepared(
        config,
        source=_source(config, ModelShape(**shape), hub=values["hub"]),
        data=TokenData(
            _opened(values["train"]),
            {tokens.sources[0].name: tokens for tokens in validation},
            values["tool_call_ids"],
        ),
        reports={
            kind: tuple(SourceReport(**report) for report in reports)
            for kind, reports in values["reports"].items()
        },
        digests=values["digests"],
        save_assets=partial(shutil.copytree, folder / ASSETS),
    )


def _source(config: RunConfig, shape: ModelShape, *, hub: dict[str, str] | None) -> ModelSource:
    if config.model.random_init:
        return ModelSource(shape, seed=config.seed)
    if hub is None:
        return ModelSource(shape, folder=config.model.path)
    from roll_sft.models.files.hub import HubModel

    return ModelSource(shape, hub=HubModel(**hub))


def _sources(tokens: TokenSet) -> list[dict[str, Any]]:
    return [
        {"name": source.name, "folders": [str(cache.folder) for cache in source.caches]}
        for source in tokens.sources
    ]


def _opened(sources: Sequence[dict[str, Any]]) -> TokenSet:
    return TokenSet(
        [
            SourceTokens(each["name"], tuple(TokenCache(Path(path)) for path in each["folders"]))
            for each in sources
        ]
    )
