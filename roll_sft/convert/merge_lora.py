"""A base model and an adapter of it -> one model folder, as PEFT's `merge_and_unload` makes it.

    python -m roll_sft.convert.merge_lora --adapter FOLDER --base MODEL --output FOLDER
        [--dequantize] [--replace]

The adapter is a PEFT folder or a checkpoint of a run with `lora.rank`. One tensor is in memory at a
time. In fp32 the result equals PEFT's byte for byte; in another dtype each number is rounded once.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch

from roll_sft.base.errors import CheckpointError, ConfigError, refuse, report
from roll_sft.base.gc_pauses import leave_quickly
from roll_sft.checkpoint.manifest import ASSETS
from roll_sft.convert.adapter import StoredAdapter, stored_adapter
from roll_sft.convert.from_hf import DTYPES, one_thread
from roll_sft.convert.model_card import write_card
from roll_sft.convert.new_folder import new_folder
from roll_sft.job.lora import base_shape, check_base, check_fingerprint
from roll_sft.models.adapters.adapter import peft_name, scaling
from roll_sft.models.adapters.nf4 import (
    DequantizedSource,
    block_problems,
    library_problem,
    quantized_weights,
)
from roll_sft.models.adapters.peft_folder import BASE
from roll_sft.models.family import Family
from roll_sft.models.files.assets import (
    MODEL_FILES,
    TEXT_FILES,
    TOKENIZER_CONFIG,
    asset_files,
    check_assets,
    copy_file,
)
from roll_sft.models.files.finite import NotFiniteError
from roll_sft.models.files.model_folder import check_source, local_model
from roll_sft.models.files.safetensors_in import SafetensorsSource, TensorSource
from roll_sft.models.files.safetensors_out import names_in_fp32, plan_shards, write_hf_folder
from roll_sft.models.moe.fused_experts import FusedExperts, fused_table
from roll_sft.models.prediction import kept_of
from roll_sft.models.random_weights import SEEDED, RandomSource
from roll_sft.models.shape import ModelShape
from roll_sft.models.weight_map import WeightTable, hf_shapes

_BLOCK_NUMBERS = 1 << 18  # of a weight, merged at once: they stay in the cache of a core
_NUM_THREADS = max(1, len(os.sched_getaffinity(0)) - 1)  # beside the one that writes
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def main(arguments: list[str] | None = None, *, program: str | None = None) -> int:
    """The command line; returns the exit code, the cause as the last line on stderr."""
    parser = argparse.ArgumentParser(
        prog=program, description="An adapter merged into its base model.", allow_abbrev=False
    )
    parser.add_argument("--adapter", type=Path, required=True, help="a PEFT or a step folder")
    parser.add_argument("--base", required=True, help="the base model: a folder, or a hub id")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: that of the base")
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="merge into the base's weights as NF4 rounds them, for an adapter trained on these",
    )
    parser.add_argument("--replace", action="store_true", help="replace an earlier output")
    options = parser.parse_args(arguments)
    leave_quickly()
    try:
        told = merge(
            options.adapter,
            Path(local_model(options.base, with_weights=True)[0]),
            options.output,
            dtype=options.dtype,
            dequantize=options.dequantize,
            replace=options.replace,
        )
    except Exception as error:  # noqa: BLE001 -- the door: everything ends in an exit code
        return report(error)
    sys.stdout.write(f"{told}\n{options.output}\n")
    return 0


# Merged rows, the squares of what was added to them, and of what rounding changed of that.
_Block: TypeAlias = tuple[torch.Tensor, float, float]


@dataclass(slots=True)
class _Rounding:
    """Squares of the adapters' parts of all weights, and of what rounding changes of them."""

    added: float = 0.0
    lost: float = 0.0


def merge(
    adapter: Path,
    base: Path,
    output: Path,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
    replace: bool = False,
) -> str:
    """Write the model of `base` with `adapter` merged into `output`; returns a line for the user.

    Raises `ConfigError` for an adapter of another base, `CheckpointError` for damaged files or an
    `output` that is in the way.
    """
    if not (base / "config.json").is_file():
        raise ConfigError(
            f"--base: '{base}' has no config.json; give the folder of the base model, or its hub id"
        )
    family, shape = base_shape(base)
    stored = stored_adapter(adapter, family, shape)
    source = _base_source(stored, base, family, shape)
    chosen = DTYPES[dtype] if dtype else _dtype_of(source)
    if _is_quantized(stored, dequantize=dequantize):
        source = _dequantized(stored, source, family, shape)
    table, source = _in_layout_of(source, family.weights(shape), base)
    plan = plan_shards(hf_shapes(table), dtype=chosen, in_fp32=names_in_fp32(table))
    rounding = _Rounding()
    with (
        new_folder(output, kind="model", marker="config.json", replace=replace) as folder,
        tempfile.TemporaryDirectory() as scratch,
        one_thread(),
    ):
        assets = _assets(stored, base, Path(scratch))
        tensors = _merged(stored, source, list(plan.shapes), chosen, rounding)
        try:
            write_hf_folder(tensors, plan=plan, assets=assets, folder=folder)
        except NotFiniteError as error:
            raise CheckpointError(
                f"{adapter}: {error}; the adapter or its base is damaged, take another copy"
            ) from error
        if stored.manifest is not None:
            write_card(adapter, folder, manifest=stored.manifest, dtype=_NAMES[chosen])
    why = "as asked for" if dtype else "the base's"
    told = f"dtype {_NAMES[chosen]}, {why}"
    if dequantize:
        told += "; merged into the weights of the base as NF4 rounds them"
    if chosen == torch.float32 or not rounding.added:
        return told
    share = (rounding.lost / rounding.added) ** 0.5
    return f"{told}; rounding changes what the adapter adds by {100 * share:.2g} %"


def _base_source(
    stored: StoredAdapter, base: Path, family: Family, shape: ModelShape
) -> TensorSource:
    """The weights of the base, which must be those that the adapter was trained on."""
    if stored.manifest is None:
        check_base(stored.folder, base, key="--adapter")
    else:
        facts = stored.manifest.state.facts["lora"]
        wanted = str(facts["base_model"] if isinstance(facts, dict) else facts)
        if wanted.startswith(SEEDED):
            return RandomSource(
                family.hf_shapes(shape),
                seed=int(wanted.removeprefix(SEEDED)),
                initializer_range=shape.initializer_range,
            )
        check_fingerprint(wanted, stored.folder, base, key="--adapter")
    source = family.opened(SafetensorsSource(base))
    check_source(family, shape, source=source)
    return source


def _in_layout_of(
    source: TensorSource, table: WeightTable, base: Path
) -> tuple[WeightTable, TensorSource]:
    """What is written, in the layout of the files in `base`, and where it is read."""
    if isinstance(source, RandomSource):
        return table, source
    files = SafetensorsSource(base)
    is_fused = isinstance(source, FusedExperts)
    table = (fused_table(table) if is_fused else table) | kept_of(files)
    return table, files if is_fused else source


def _is_quantized(stored: StoredAdapter, *, dequantize: bool) -> bool:
    """Whether to merge into quantised weights. Raises `ConfigError` if `dequantize` says else."""
    was = stored.base_dtype is not None
    if was and not dequantize:
        raise ConfigError(
            f"--adapter: '{stored.folder}' was trained on a base in NF4, which holds no merged"
            " weights; --dequantize merges into that base's values, in the dtype of --base"
        )
    is_known = stored.manifest is not None or (stored.folder / BASE).is_file()
    if dequantize and is_known and not was:
        raise ConfigError(
            f"--dequantize: '{stored.folder}' was trained on a base that was not quantised; leave"
            " it out"
        )
    return dequantize


def _dequantized(
    stored: StoredAdapter, source: TensorSource, family: Family, shape: ModelShape
) -> TensorSource:
    """The weights of `source` as NF4 rounds them, which the adapter was trained on."""
    lora = dataclasses.replace(stored.lora, quantize_base="nf4")
    problem = library_problem()
    refuse([*([problem] if problem else []), *block_problems(family, shape, lora, tensor_size=1)])
    weights = quantized_weights(family, shape, lora).values()
    names = frozenset(name for weight in weights for name in weight.mapping.hf_shapes)
    dtype = DTYPES[stored.base_dtype] if stored.base_dtype else _dtype_of(source)
    return DequantizedSource(source, names=names, dtype=dtype)


def _dtype_of(source: TensorSource) -> torch.dtype:
    if isinstance(source, SafetensorsSource):
        return source.dtype("model.norm.weight")
    return torch.float32


def _merged(
    stored: StoredAdapter,
    source: TensorSource,
    names: list[str],
    dtype: torch.dtype,
    rounding: _Rounding,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the base, in the order of `names`, with the adapter's part added."""
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="merge") as pool:
        for name in names:
            module = name.removesuffix(".weight")
            a_name, b_name = (peft_name(module, part) for part in ("lora_A", "lora_B"))
            if peft_name(module) in stored.shapes and name.endswith(".weight"):
                yield name, stored.read(peft_name(module))
            elif a_name in stored.shapes and name.endswith(".weight"):
                b = stored.read(b_name).float()
                parts = (source.read(name), b, stored.read(a_name).float())
                add = partial(_added, parts, scale=scaling(stored.lora), dtype=dtype)
                for rows, added, lost in _in_order(pool, add, _blocks(parts[0])):
                    rounding.added += added
                    rounding.lost += lost
                    yield name, rows
            else:
                yield name, source.read(name)


def _blocks(weight: torch.Tensor) -> Iterator[slice]:
    """The rows of `weight`, so many at a time that they stay in the cache of a core."""
    size = max(1, _BLOCK_NUMBERS // weight.shape[1])
    for start in range(0, weight.shape[0], size):
        yield slice(start, min(start + size, weight.shape[0]))


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[slice], _Block], blocks: Iterable[slice]
) -> Iterator[_Block]:
    """The results of `function` in the order of `blocks`, a few of them computed ahead."""
    ahead = deque[Future[_Block]]()
    for block in blocks:
        ahead.append(pool.submit(function, block))
        if len(ahead) > 2 * _NUM_THREADS:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _added(
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rows: slice,
    *,
    scale: float,
    dtype: torch.dtype,
) -> _Block:
    """`rows` of the weight [O, I] plus scale * B A, computed in fp32 and rounded once to `dtype`.

    With them the squares of what is added, and of what rounding changes of it.
    """
    weight, b, a = parts
    total = (b[rows] @ a).mul_(scale)  # in PEFT's order of operations
    if dtype == torch.float32:
        return total.add_(weight[rows]), 0.0, 0.0
    added = float(total.norm()) ** 2
    total.add_(weight[rows])
    merged = total.to(dtype)
    return merged, added, float(total.sub_(merged).norm()) ** 2


def _assets(stored: StoredAdapter, base: Path, scratch: Path) -> Path:
    """A folder of the files beside the weights: the base's, and the tokenizer that was trained."""
    if stored.manifest is not None:
        assets = stored.folder / ASSETS
        check_assets(assets)
        return assets
    trained = [name for name in asset_files(stored.folder) if name not in TEXT_FILES]
    has_tokenizer = TOKENIZER_CONFIG in trained
    for name in asset_files(base):
        if not has_tokenizer or name in (*MODEL_FILES, *TEXT_FILES):
            copy_file(base / name, scratch / name)
    for name in trained if has_tokenizer else ():
        if name != "config.json":
            copy_file(stored.folder / name, scratch / name)
    check_assets(scratch)
    return scratch


if __name__ == "__main__":
    sys.exit(main())
