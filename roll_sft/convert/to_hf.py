"""One checkpoint step folder -> a HuggingFace folder, in one process, tensor by tensor.

Needs the step folder alone, which has `hf_assets/` and `manifest.json`; where a part of the model
was frozen, the base model too. Memory holds one tensor.
The folder gets its name when it is complete, when every file of the checkpoint has the SHA-256 of
the manifest, and, if asked for, when the logits of both agree. Every tensor of the checkpoint is
read and every tensor of the model is written, or an error names it.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from roll_sft.base.errors import CheckpointError, ConfigError, DivergedError, RollSftError
from roll_sft.checkpoint.manifest import ASSETS, Manifest, StoredFile, check_complete, verify_hashes
from roll_sft.checkpoint.reader import Reader
from roll_sft.checkpoint.resume import step_folders
from roll_sft.convert.from_hf import DTYPES, ROW_WISE, one_thread
from roll_sft.convert.model_card import write_card
from roll_sft.convert.new_folder import new_folder
from roll_sft.models.family import Family
from roll_sft.models.files.assets import asset_files, check_assets
from roll_sft.models.files.config_file import load_hf_config
from roll_sft.models.files.finite import NotFiniteError, check_finite
from roll_sft.models.files.safetensors_out import names_in_fp32, plan_shards, write_hf_folder
from roll_sft.models.moe.fused_experts import MARK, fused_table
from roll_sft.models.prediction import KEPT, kept_weights
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import family_of
from roll_sft.models.weight_map import WeightMapping, WeightTable, hf_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from roll_sft.convert.frozen import WholeModel

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PART_BYTES = 8 << 20  # read at once


@dataclass(frozen=True, slots=True)
class _Source:
    """A checked checkpoint and its model."""

    folder: Path
    manifest: Manifest
    family: Family
    shape: ModelShape
    base: Path | None  # the folder of the model that the run started from; None: as it was then


def export(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str | None,
    replace: bool,
    verified: bool = False,
    base: Path | None = None,
) -> str:
    """Write `checkpoint` as a model folder that transformers loads; returns lines for the user.

    Of adapters it becomes a folder that PEFT loads, in fp32 unless `dtype` says otherwise.

    `dtype` is fp32, bf16 or fp16; None keeps that of the source model. With `verified` the logits
    of both are compared before the folder gets its name. What the run froze is read from `base`, or
    from the model that it started from. Raises `CheckpointError` for a folder that
    is no complete checkpoint, an `output` that is in the way, or logits that differ, and
    `DivergedError` for weights that are not finite.
    """
    manifest = check_complete(checkpoint)
    _check_assets(checkpoint, manifest)
    # Kilobytes that are parsed; the weights are hashed while they are read.
    described = {name: facts for name, facts in manifest.files.items() if not _is_shard(name)}
    verify_hashes(checkpoint, described)
    check_assets(checkpoint / ASSETS)
    config = load_hf_config(str(checkpoint / ASSETS), trust_remote_code=False)
    family = family_of(config)
    source = _Source(checkpoint, manifest, family, family.shape(config), base)
    if "lora" in manifest.state.facts:
        if verified:
            raise ConfigError(
                f"--verify: compares whole models, and {checkpoint} holds an adapter; leave it out,"
                " or merge it with roll-sft merge-lora"
            )
        return _export_adapter(source, output, dtype=dtype, replace=replace)
    chosen, reason = _choose_dtype(config, dtype, manifest=manifest)
    with new_folder(output, kind="model", marker="config.json", replace=replace) as folder:
        _write_weights(source, folder, dtype=chosen)
        write_card(checkpoint, folder, manifest=manifest, dtype=_NAMES[chosen])
        if not verified:
            return f"dtype {reason}"
        from roll_sft.convert.verify import verify  # slow to import

        return f"dtype {reason}\n{verify(folder, checkpoint, dtype=chosen, reader=_opened(source))}"


def _export_adapter(source: _Source, output: Path, *, dtype: str | None, replace: bool) -> str:
    """Write the adapters of a checkpoint that holds no whole model."""
    from roll_sft.convert.adapter import export_adapter
    from roll_sft.models.adapters.peft_folder import CONFIG

    with new_folder(output, kind="adapter", marker=CONFIG, replace=replace) as folder:
        model = (source.family, source.shape)
        return export_adapter(source.folder, folder, model, dtype=dtype)


def _check_assets(checkpoint: Path, manifest: Manifest) -> None:
    """Refuse files that would go into the export but are not in the manifest."""
    assets = checkpoint / ASSETS
    if not assets.is_dir():
        raise CheckpointError(f"{assets}: is missing, and an export begins with it; take another")
    try:
        names = list(asset_files(assets))
    except ConfigError as error:  # a link out of the folder
        raise CheckpointError(str(error)) from error
    for name in names:
        if f"{ASSETS}/{name}" not in manifest.files:
            raise CheckpointError(
                f"{assets / name}: is not in the manifest, so it came into the checkpoint later;"
                " move it away"
            )


def _choose_dtype(
    config: "PreTrainedConfig", asked: str | None, *, manifest: Manifest
) -> tuple[torch.dtype, str]:
    """The dtype to export in, and why."""
    if asked is not None:
        return DTYPES[asked], f"{asked}, as asked for"
    if config.dtype not in _NAMES:
        return (
            torch.float32,
            "fp32, for the source's config.json names none; convert --dtype sets another",
        )
    name = _NAMES[config.dtype]
    is_trained_in_fp32 = manifest.state.dtype == "fp32" or manifest.state.optimizer_step is not None
    is_rounded = is_trained_in_fp32 and name != "fp32"
    more = (
        ", rounded once from the fp32 weights; convert --dtype fp32 keeps these"
        if is_rounded
        else ""
    )
    return config.dtype, f"{name}, the source model's{more}"


def _is_shard(name: str) -> bool:
    return name.endswith(".distcp")


def _write_weights(source: _Source, folder: Path, *, dtype: torch.dtype) -> None:
    """Write assets and tensors into `folder`, while beside it every file is hashed."""
    reader = _opened(source, dtype=dtype)
    table = _table(reader, source)
    plan = plan_shards(hf_shapes(table), dtype=dtype, in_fp32=names_in_fp32(table))
    shards = {name: facts for name, facts in source.manifest.files.items() if _is_shard(name)}
    with _verified_beside(source.folder, shards), one_thread():
        try:
            write_hf_folder(
                _hf_tensors(reader, source), plan=plan, assets=source.folder / ASSETS, folder=folder
            )
        except NotFiniteError as error:
            raise _not_finite(source, error) from error
        reader.check_all_read()


@contextlib.contextmanager
def _verified_beside(folder: Path, files: Mapping[str, StoredFile]) -> Iterator[None]:
    """Verify `files` in threads while the block reads them: each page comes from the disk once.

    A file that is damaged is the error, also where the block fails on what it read.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(verify_hashes, folder, files, stop=stop)
        try:
            yield
        except RollSftError:
            verified.result()
            raise
        except BaseException:
            stop.set()
            raise
        verified.result()


def _opened(source: _Source, *, dtype: torch.dtype | None = None) -> "Reader | WholeModel":
    """Reads the parameters of `source`, those that its run froze too."""
    reader = Reader(source.folder, dtype=dtype)
    if "frozen" not in source.manifest.state.facts:
        return reader
    from roll_sft.convert.frozen import whole_model

    return whole_model(reader, source.manifest, (source.family, source.shape), base=source.base)


def _hf_tensors(
    reader: "Reader | WholeModel", source: _Source
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every HuggingFace tensor once, in the order of the family's table, many in parts of rows.

    A part is to be used before the next is asked for: all are read into the same memory.
    """
    table = _table(reader, source)
    in_parts = {
        n for n, m in table.items() if isinstance(reader, Reader) and isinstance(m, ROW_WISE)
    }
    whole = [reader.num_bytes(name) for name in table if name not in in_parts]
    scratch = torch.empty(max(2 * _PART_BYTES, *whole), dtype=torch.uint8)
    if isinstance(reader, Reader) and reader.has(MARK):
        reader.read(MARK)  # so that all of the checkpoint is read
    for name, mapping in table.items():
        if isinstance(reader, Reader) and name in in_parts:
            yield from _parts(reader, name, mapping, scratch)
        else:
            yield from mapping.to_hf(reader.read(name, scratch=scratch)).items()


def _table(reader: "Reader | WholeModel", source: _Source) -> WeightTable:
    """Every parameter of the export. A tied head is none: its embedding is exported."""
    table = {n: m for n, m in source.family.weights(source.shape).items() if m.hf_shapes}
    if not isinstance(reader, Reader):
        return table
    if reader.has(MARK):
        table = fused_table(table)
    return table | kept_weights(reader.kept(KEPT))


def _parts(
    reader: Reader, name: str, mapping: WeightMapping, scratch: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """The HuggingFace tensors of a parameter whose rows are theirs, one tensor after the other."""
    num_rows = reader.shape(name)[0]
    step = max(1, _PART_BYTES // (reader.num_bytes(name) // num_rows))
    first = 0
    for hf_name, shape in mapping.hf_shapes.items():
        stop = first + shape[0]
        for start in range(first, stop, step):
            yield (
                hf_name,
                reader.read(name, rows=slice(start, min(start + step, stop)), scratch=scratch),
            )
        first = stop
    for start in range(first, num_rows, step):  # rows of padding, which no tensor has
        reader.read(name, rows=slice(start, min(start + step, num_rows)), scratch=scratch)


def _not_finite(source: _Source, error: NotFiniteError) -> CheckpointError | DivergedError:
    step = source.manifest.state.step
    if step == 0:  # converted, not trained
        return CheckpointError(
            f"{source.folder}: {error}, as it was in the model that this checkpoint was converted"
            " from; take another"
        )
    good = _last_finite(source)
    remedy = (
        "no earlier checkpoint beside it is finite; train again with a lower train.learning_rate"
        if good is None
        else f"the last with finite weights is {good.name}: go back with resume={good} and a lower"
        " train.learning_rate, or export that one"
    )
    return DivergedError(f"{source.folder}: {error}: the run had diverged by step {step}; {remedy}")


def _last_finite(source: _Source) -> Path | None:
    """The newest whole checkpoint before `source` whose weights are all finite."""
    for folder in reversed(step_folders(source.folder.resolve().parent)):
        try:
            if check_complete(folder).state.step >= source.manifest.state.step:
                continue
            for name, tensor in _hf_tensors(
                _opened(dataclasses.replace(source, folder=folder)), source
            ):
                check_finite(name, tensor)
        except CheckpointError:
            continue
        return folder
    return None
