"""The folder of a model: where it lies, and whether it holds the tensors of its config.json."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from roll_sft.base.errors import ConfigError
from roll_sft.models.family import Family
from roll_sft.models.files.safetensors_in import TensorSource
from roll_sft.models.shape import ModelShape
from roll_sft.models.weight_map import TiedHead

if TYPE_CHECKING:
    from roll_sft.models.files.hub import HubModel

_NAMES_SHOWN = 3
_ROWS_COMPARED_AT_ONCE = 8192


def local_model(path: str, *, with_weights: bool) -> "tuple[str, HubModel | None]":
    """The absolute folder of `path`, fetched if it is a hub id, and its commit on the hub.

    A folder comes first: an id that is also a folder here means the folder. Anything that is
    neither is returned as it is, for its reader to refuse. Raises what `hub.fetch` raises.
    """
    if Path(path).is_dir():
        return str(Path(path).absolute()), None
    from roll_sft.models.files.hub import HUB_ID, HubModel, fetch

    if not HUB_ID.fullmatch(path):
        return path, None
    folder = fetch(path, revision=None, with_weights=with_weights)
    return str(folder), HubModel(path, commit=folder.name)


def check_source(family: Family, shape: ModelShape, *, source: TensorSource) -> None:
    """Raise `ConfigError` for a source that is not exactly the model of `shape`.

    Reads headers only. If a tied model stores its head as well, both tensors are compared:
    transformers unties a head that differs, and would serve another model than the trained
    one.
    """
    expected = family.hf_shapes(shape)
    heads = [mapping for mapping in family.weights(shape).values() if isinstance(mapping, TiedHead)]
    # Old exports store rotary buffers; they are computed, never trained.
    found = {name for name in source.names() if not name.endswith("rotary_emb.inv_freq")}
    missing = [name for name in expected if name not in found]
    unexpected = sorted(found - expected.keys() - {head.name for head in heads})
    if missing or unexpected:
        raise ConfigError(
            f"model.path: {source} does not hold the {len(expected)} tensors that its "
            f"config.json describes for {family.architecture}: "
            f"{_count_and_first('missing', missing)}, "
            f"{_count_and_first('unexpected', unexpected)}; give a complete, unquantized "
            "checkpoint and the config.json that belongs to it"
        )
    for name, wanted in expected.items():
        if source.shape(name) != wanted:
            raise ConfigError(
                f"model.path: {source}: {name} has shape {list(source.shape(name))} but "
                f"config.json gives {list(wanted)}; use the config.json of this checkpoint"
            )
    for head in heads:
        if head.name in found and not _equal(source, head.name, head.embedding.name):
            raise ConfigError(
                f"model.path: {source}: tie_word_embeddings is true but {head.name} and "
                f"{head.embedding.name} differ; set tie_word_embeddings to false in config.json"
            )


def _count_and_first(label: str, names: Iterable[str]) -> str:
    """`2 missing (a, b)`, with at most the first few names."""
    names = list(names)
    if not names:
        return f"0 {label}"
    dots = ", ..." if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} {label} ({', '.join(names[:_NAMES_SHOWN])}{dots})"


def _equal(source: TensorSource, first: str, second: str) -> bool:
    """Whether two tensors are equal, in blocks of rows: vocabulary matrices reach several GB."""
    if source.shape(first) != source.shape(second):
        return False
    num_rows = source.shape(first)[0]
    for block in range(math.ceil(num_rows / _ROWS_COMPARED_AT_ONCE)):
        start = block * _ROWS_COMPARED_AT_ONCE
        stop = min(start + _ROWS_COMPARED_AT_ONCE, num_rows)
        rows = [source.read_slice(n, start=start, stop=stop, dim=0) for n in (first, second)]
        if not torch.equal(*rows):
            return False
    return True
