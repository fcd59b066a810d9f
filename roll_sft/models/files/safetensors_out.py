"""Hugging Face model folders out, streaming.

`write_hf_folder` writes the weights and puts beside them what `save_assets` collected. Shards are
planned from shapes before the first tensor exists, and each tensor, or each part of one, goes to
its file when it comes, so memory holds a part, not a shard.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from roll_sft.base.errors import CheckpointError
from roll_sft.models.files.assets import asset_files, copy_file
from roll_sft.models.files.finite import rounded
from roll_sft.models.files.json_files import read_json, write_json
from roll_sft.models.files.readers import widen
from roll_sft.models.files.safetensors_in import FLOATS, INDEX_FILE, SINGLE_FILE, Shape
from roll_sft.models.weight_map import SingleTensor, WeightTable

_DTYPE_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_BLOCK_NUMBERS = 1 << 19  # checked, rounded and written at once: they stay in a core's cache


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The tensors of an export: `shards` maps each file name to its tensors, in order."""

    dtype: torch.dtype
    shapes: Mapping[str, Shape]
    shards: Mapping[str, tuple[str, ...]]
    in_fp32: frozenset[str] = frozenset()

    def dtype_of(self, name: str) -> torch.dtype:
        """What tensor `name` is written in."""
        return torch.float32 if name in self.in_fp32 else self.dtype


def plan_shards(
    shapes: Mapping[str, Shape],
    *,
    dtype: torch.dtype,
    in_fp32: frozenset[str] = frozenset(),
    max_shard_bytes: int = 5_000_000_000,
) -> ShardPlan:
    """Fill shards in the order of `shapes`; a tensor above `max_shard_bytes` gets one to itself.

    All tensors are written in `dtype`, but those that stay in fp32.
    """
    groups: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, shape in shapes.items():
        num_bytes = _num_bytes(shape, dtype)
        if num_bytes > room and groups[-1]:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(name)
        room -= num_bytes
    if len(groups) == 1:
        shards = {SINGLE_FILE: tuple(groups[0])}
    else:
        shards = {
            f"model-{number:05d}-of-{len(groups):05d}.safetensors": tuple(group)
            for number, group in enumerate(groups, start=1)
        }
    return ShardPlan(dtype=dtype, shapes=dict(shapes), shards=shards, in_fp32=in_fp32)


def names_in_fp32(table: WeightTable) -> frozenset[str]:
    """Hugging Face tensors of `table` that stay in fp32 whatever the dtype of the others."""
    single = (each for each in table.values() if isinstance(each, SingleTensor))
    return frozenset(each.name for each in single if each.is_fp32)


def write_hf_folder(
    tensors: Iterable[tuple[str, torch.Tensor]], *, plan: ShardPlan, assets: Path, folder: Path
) -> None:
    """Write a model that transformers loads into the empty `folder`.

    `tensors` come in the plan's order, from any device; each is rounded once, to the plan's dtype
    for it.
    A tensor may come in parts: pairs of its name and its next rows, whose memory the stream may use
    again once it is asked for more.
    `assets` is a folder as `save_assets` makes it; its config.json is told the dtype. Raises
    `CheckpointError` for a tensor that is missing, extra or misshapen, and what `rounded` raises.
    """
    _copy_assets(assets, folder=folder, dtype=plan.dtype)
    write_shards(tensors, plan=plan, folder=folder)


def _num_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _copy_assets(assets: Path, *, folder: Path, dtype: torch.dtype) -> None:
    for name in asset_files(assets):
        copy_file(assets / name, folder / name)
    config = read_json(folder / "config.json")
    # transformers 5 writes `dtype` and reads both; older readers know `torch_dtype` alone.
    for key in ("torch_dtype", *(["dtype"] if "dtype" in config else [])):
        config[key] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)
    widen(folder)


def write_shards(
    tensors: Iterable[tuple[str, torch.Tensor]], *, plan: ShardPlan, folder: Path
) -> None:
    """Write every planned tensor exactly once, and the index if there are several files.

    Takes and raises what `write_hf_folder` does.
    """
    stream = iter(tensors)
    for file_name, names in plan.shards.items():
        with (folder / file_name).open("wb", buffering=0) as file:
            file.write(_header(names, plan))
            for name in names:
                for rows in _parts(stream, name=name, plan=plan):
                    _write_rows(name, rows, plan.dtype_of(name), file=file)
    for name, _ in stream:
        raise CheckpointError(f"export: {name} comes after the last of {len(plan.shapes)} tensors")
    if len(plan.shards) > 1:
        weight_map = {name: file for file, names in plan.shards.items() for name in names}
        sizes = {"total_size": sum(_num_bytes(s, plan.dtype_of(n)) for n, s in plan.shapes.items())}
        write_json(folder / INDEX_FILE, {"metadata": sizes, "weight_map": weight_map})


def _header(names: Iterable[str], plan: ShardPlan) -> bytes:
    """The head of a safetensors file that holds `names` one after the other.

    Not by the safetensors package, which asks for all tensors of a file at once. The form is at
    https://github.com/huggingface/safetensors#format: 8 bytes of length, then JSON, which blanks
    fill up so that the first number is aligned.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        stop = start + _num_bytes(plan.shapes[name], plan.dtype_of(name))
        entries[name] = {
            "dtype": _DTYPE_NAMES[plan.dtype_of(name)],
            "shape": list(plan.shapes[name]),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_rows(name: str, rows: torch.Tensor, dtype: torch.dtype, *, file: BinaryIO) -> None:
    """Append the numbers of `rows`, each rounded to `dtype`, a block at a time."""
    flat = rows.detach().cpu().contiguous().view(-1)
    for start in range(0, flat.numel(), _BLOCK_NUMBERS):
        # The check costs a tenth of the write.
        block = rounded(name, flat[start : start + _BLOCK_NUMBERS], dtype)
        rest = memoryview(block.view(torch.uint8).numpy())  # type: ignore[arg-type]
        while rest:
            rest = rest[file.write(rest) :]


def _parts(
    stream: Iterator[tuple[str, torch.Tensor]], *, name: str, plan: ShardPlan
) -> Iterator[torch.Tensor]:
    """The parts of the tensor that is planned next."""
    shape, num_rows = list(plan.shapes[name]), 0
    while num_rows < shape[0]:
        got, tensor = next(stream, (None, None))
        if num_rows == 0 and (got != name or tensor is None):
            raise CheckpointError(
                f"export: {name} is due but {got or 'nothing'} comes; the checkpoint is incomplete"
            )
        found = [num_rows, *shape[1:]]
        if got == name and tensor is not None:
            num_rows += len(tensor)
            found = [num_rows, *tensor.shape[1:]]
        if got != name or tensor is None or num_rows > shape[0] or found[1:] != shape[1:]:
            raise CheckpointError(
                f"export: {name} has shape {found} but the model gives {shape}; the checkpoint"
                " belongs to another model"
            )
        yield tensor
