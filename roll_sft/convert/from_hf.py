"""A HuggingFace folder -> one checkpoint folder, in one process, tensor by tensor.

Writes what a training run writes, for any layout to read: the same names, shapes and files, without
an optimizer and without Megatron-Core. Memory holds one tensor. The folder appears under its name
when it is complete and, if asked for, compared with the source.
"""

import contextlib
import ctypes
import io
import math
import mmap
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import torch

from roll_sft.base.errors import CheckpointError
from roll_sft.base.layout import ParallelLayout
from roll_sft.checkpoint.manifest import ASSETS, MANIFEST, RunState
from roll_sft.checkpoint.publish import versions_here, write_descriptions, write_manifest
from roll_sft.checkpoint.reader import LAYERS, stored_name
from roll_sft.checkpoint.tensors import Piece, Writer, take_parts, write
from roll_sft.convert.new_folder import new_folder
from roll_sft.models.files.assets import asset_files, check_assets, config_of, copy_file
from roll_sft.models.files.config_file import load_hf_config
from roll_sft.models.files.finite import NotFiniteError, check_finite, rounded
from roll_sft.models.files.json_files import write_json
from roll_sft.models.files.model_folder import check_source
from roll_sft.models.files.safetensors_in import SafetensorsSource, StoredSource, TensorSource
from roll_sft.models.moe.fused_experts import MARK, FusedExperts
from roll_sft.models.prediction import kept_of
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import family_of
from roll_sft.models.weight_map import (
    GatedMLP,
    SingleTensor,
    VocabSplit,
    WeightMapping,
    WeightTable,
)

MAX_FILE_BYTES = 5_000_000_000
_IN_USE = 6  # tensors that `write` may still be hashing
_MADV_POPULATE_READ = 22  # of Linux 5.14; Python's mmap module has no name for it
# In full form the rows of these are those of their Hugging Face tensors, one after the other.
ROW_WISE = (SingleTensor, VocabSplit, GatedMLP)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Linear layers have extra state in a checkpoint, of Transformer Engine's fp8: empty here.
_LINEAR = re.compile(r"(.*\.linear_\w+)\.weight$")


def import_model(
    model: Path, output: Path, *, dtype: str | None, replace: bool, verified: bool = False
) -> str | None:
    """Write the HuggingFace folder `model` as a checkpoint folder, from which any layout loads.

    Tensors keep their dtype, or are rounded to `dtype`. With `verified` the two are compared before
    the folder gets its name; returns the result as text. Raises `ConfigError` for a model that this
    version does not build, `CheckpointError` for files that are damaged or an `output` in the way.
    """
    config = load_hf_config(str(model), trust_remote_code=False)
    family = family_of(config)
    shape = family.shape(config)
    files = SafetensorsSource(model)
    source = family.opened(files)
    check_source(family, shape, source=source)
    check_assets(model)
    wanted = DTYPES[dtype] if dtype else None
    stored = wanted or source.dtype("model.norm.weight")
    mappings = family.weights(shape) | kept_of(files)
    place = partial(_place, shape=shape)
    dtypes = _dtypes(mappings, source, wanted, place)
    with new_folder(output, kind="checkpoint", marker=MANIFEST, replace=replace) as folder:
        for name in asset_files(model):
            copy_file(model / name, folder / ASSETS / name)
        if getattr(config, "quantization_config", None) is not None:
            write_json(folder / ASSETS / "config.json", config_of(model))
        groups = list(_groups(mappings, dtype=stored))
        for rank, names in enumerate(groups):
            group = {name: mappings[name] for name in names}
            mark = [fused_mark()] if rank == 0 and isinstance(source, FusedExperts) else []
            try:
                with one_thread():
                    write(
                        folder,
                        chain(mark, _pieces(group, place, source=source, dtypes=dtypes)),
                        objects=_objects(names, place),
                        writer=Writer(rank, len(groups), optimizer_step=None),
                    )
            except NotFiniteError as error:
                raise CheckpointError(
                    f"{model}: {error}; its file is damaged or its training diverged, take another"
                ) from error
        parts = take_parts(folder)
        write_descriptions(folder, parts)
        hashes = {part.name: part.sha256 for part in parts}
        write_manifest(folder, state=_state(stored), versions=versions_here(), hashes=hashes)
        if not verified:
            return None
        from roll_sft.convert.verify import verify  # slow to import

        return str(verify(model, folder, dtype=wanted))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch's arithmetic on this thread within the block.

    torch's own threads spin while they wait, which takes the cores of the threads that hash.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fused_mark() -> Piece:
    """Says that the model's files hold all experts of a layer in one tensor."""
    return Piece(MARK, (1,), (0,), torch.ones(1, dtype=torch.float32, device="cpu"))


def _groups(mappings: WeightTable, *, dtype: torch.dtype) -> Iterator[list[str]]:
    """Megatron parameter names, file by file."""
    names: list[str] = []
    room = MAX_FILE_BYTES
    for name, mapping in mappings.items():
        num_bytes = sum(map(math.prod, mapping.hf_shapes.values())) * dtype.itemsize
        if num_bytes > room and names:
            yield names
            names, room = [], MAX_FILE_BYTES
        if mapping.hf_shapes:  # a tied head owns none: Megatron stores it as the embedding
            names.append(name)
            room -= num_bytes
    yield names


def _dtypes(
    mappings: Mapping[str, WeightMapping],
    source: StoredSource,
    wanted: torch.dtype | None,
    place: "_Placing",
) -> dict[str, torch.dtype]:
    """The dtype of each stored tensor: `wanted`, or one that holds all that becomes part of it.

    Layers lie in one tensor, and a model may keep some of them in fp32.
    """
    dtypes: dict[str, torch.dtype] = {}
    for name, mapping in mappings.items():
        key, *_ = place(name)
        for part in mapping.hf_shapes:
            own = wanted or source.dtype(part)
            dtypes[key] = torch.promote_types(dtypes.get(key, own), own)
    return dtypes


def _pieces(
    mappings: Mapping[str, WeightMapping],
    place: "_Placing",
    *,
    source: TensorSource,
    dtypes: Mapping[str, torch.dtype],
) -> Iterator[Piece]:
    """Every parameter of `mappings` as rectangles of the tensor that it is stored in."""
    read: deque[torch.Tensor] = deque()
    for name, mapping in mappings.items():
        key, index, sizes = place(name)
        num_rows = sum(shape[0] for shape in mapping.hf_shapes.values())
        full_shape = (num_rows, *next(iter(mapping.hf_shapes.values()))[1:])
        first = 0
        while len(read) > _IN_USE:
            _advise(read.popleft(), mmap.MADV_DONTNEED)
        for part_name, part in _parts(mapping, source, read):
            dtype, check = dtypes[key], None
            if part.dtype != dtype:
                part = rounded(part_name, part, dtype)
            elif isinstance(mapping, ROW_WISE):
                check = partial(_check_block, name=part_name, tensor=part)
            corner = (first, *(0 for _ in full_shape[1:]))
            first += len(part)
            stored_shape, offset = (*sizes, *full_shape), (*index, *corner)
            yield Piece(key, stored_shape, offset, part[(None,) * len(index)], check=check)


def _parts(
    mapping: WeightMapping, source: TensorSource, read: deque[torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Megatron's tensor of one process in runs of rows with names; `read` gets the files'."""
    for name in mapping.hf_shapes:
        read.append(source.read(name))
        if isinstance(mapping, ROW_WISE):
            yield name, read[-1]
        else:
            _check_block(read[-1], name=name, tensor=read[-1])
    if not isinstance(mapping, ROW_WISE):  # its rows alternate between the tensors
        yield ", ".join(mapping.hf_shapes), mapping.local(source, tensor_rank=0, tensor_size=1)


def _check_block(block: torch.Tensor, *, name: str, tensor: torch.Tensor) -> None:
    """Map the pages of `block`, a part of `tensor`, and raise `NotFiniteError` for the tensor."""
    _advise(block, _MADV_POPULATE_READ)
    try:
        check_finite(name, block)
    except NotFiniteError:
        check_finite(name, tensor)


def _advise(tensor: torch.Tensor, advice: int) -> None:
    """Advise the kernel on the mapped file behind `tensor`; without effect where it cannot.

    Mapped in one go, a file is read three times as fast as page by page. Unmapped after use, it
    does not count as memory of this process; its numbers stay readable.
    """
    # Whole pages inside the tensor alone: its neighbours may be in use, or not come from a file.
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)  # each call makes a class, which takes as long as a block


_Placing: TypeAlias = Callable[[str], tuple[str, tuple[int, ...], tuple[int, ...]]]


def _place(name: str, *, shape: ModelShape) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """The stored tensor of parameter `name`, its place in the first dims, and the sizes of these.

    These are the layer and the expert. Where layers differ each has a tensor of its own.
    """
    key, index = stored_name(name)
    sizes = (shape.num_layers, shape.experts.num_experts if shape.experts else 1)[: len(index)]
    if index and shape.experts is not None and shape.experts.num_dense_layers:
        return key.replace(LAYERS, f"{LAYERS}{index[0]}."), index[1:], sizes[1:]
    return key, index, sizes


def _objects(names: Iterable[str], placing: "_Placing") -> dict[str, bytes]:
    """Empty objects that Megatron-Core requires beside the tensors of `names`."""
    empty = io.BytesIO()
    torch.save([None], empty)
    objects = {}
    for name in names:
        key, index, sizes = placing(name)
        if linear := _LINEAR.match(key):
            place, whole = (".".join(map(str, each)) for each in (index or (0,), sizes or (1,)))
            objects[f"{linear[1]}._extra_state/shard_{place}_{whole}"] = empty.getvalue()
    return objects


def _state(dtype: torch.dtype) -> RunState:
    """The state of a run before its first step."""
    return RunState(
        step=0,
        epoch=0,
        samples_seen_in_epoch=0,
        seed=0,
        global_batch_size=0,
        global_batch_tokens=None,
        sequence_length=0,
        sources={},
        layout=ParallelLayout(1),
        dtype=_NAMES[dtype],
    )
