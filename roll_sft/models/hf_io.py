"""Hugging Face model folders in and out, streaming.

In: a `TensorSource` gives tensors, or slices of them, by Hugging Face name, from safetensors files
or from a seeded generator. Pickle files are refused: loading one can run code.

Out: `save_assets` collects what stands beside the weights, `write_hf_folder` writes both. Shards
are planned from shapes before the first tensor exists, so memory holds one shard at most, and the
folder gets its name only when every file is on disk.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from roll_sft.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Shape: TypeAlias = tuple[int, ...]

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_WEIGHT_SUFFIXES = (".safetensors", ".bin")


class TensorSource(Protocol):
    """Tensors by Hugging Face name. `str(source)` names it in messages."""

    def names(self) -> frozenset[str]:
        """Every tensor there is."""
        ...

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, without reading it."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU, in its own dtype. Copy before writing into it."""
        ...

    def read_slice(self, name: str, *, start: int, stop: int, dim: int) -> torch.Tensor:
        """Entries `start` to `stop` along `dim`, contiguous. Copy before writing into it."""
        ...


class SafetensorsSource:
    """The safetensors files of a model folder: one, or shards with an index.

    Files are mapped when first needed. A missing folder or format is a `ConfigError`; a missing or
    damaged file, or a tensor it does not hold, a `CheckpointError`. Travels between processes as
    the path of its folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = folder
        self._handles: dict[Path, Any] = {}  # safetensors' stubs do not type its handles
        self._file_of = self._find_tensors(Path(folder))

    def __str__(self) -> str:
        return str(self._folder)

    def __reduce__(self) -> tuple[type["SafetensorsSource"], tuple[Path]]:
        # Absolute: another process may have another current folder.
        return SafetensorsSource, (Path(self._folder).absolute(),)

    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def shape(self, name: str) -> Shape:
        return tuple(self._view(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor; it maps the file, nothing is copied."""
        tensor: torch.Tensor = self._view(name)[...]
        return tensor

    def read_slice(self, name: str, *, start: int, stop: int, dim: int) -> torch.Tensor:
        """Entries `start` to `stop` along `dim`; only their pages are read."""
        view = self._view(name)
        assert dim < len(view.get_shape()), f"{name} has no dim {dim}"
        # A cut along dim 1 comes as a strided view of the mapped file.
        tensor: torch.Tensor = view[(slice(None),) * dim + (slice(start, stop),)]
        return tensor.contiguous()

    def _find_tensors(self, folder: Path) -> dict[str, Path]:
        if not folder.is_dir():
            raise ConfigError(f"model.path: '{self}' is not a folder; give a local model folder")
        if (folder / _SINGLE_FILE).is_file():
            path = folder / _SINGLE_FILE
            return dict.fromkeys(self._handle(path).keys(), path)
        if (folder / _INDEX_FILE).is_file():
            return self._read_index(folder)
        if any((folder / name).is_file() for name in _PICKLE_FILES):
            raise ConfigError(
                f"model.path: '{self}' has only pytorch_model.bin, and loading pickle can run "
                "code; convert it with transformers' save_pretrained, which writes safetensors"
            )
        raise ConfigError(
            f"model.path: '{self}' has neither {_SINGLE_FILE} nor {_INDEX_FILE}; complete the "
            "download, or set model.random_init=true to start from random weights"
        )

    def _read_index(self, folder: Path) -> dict[str, Path]:
        try:
            index = json.loads((folder / _INDEX_FILE).read_text(encoding="utf-8"))
            file_of = {str(name): folder / file for name, file in index["weight_map"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"model.path: {self}/{_INDEX_FILE} is not an index of shards ({error!r}); "
                "download it again"
            ) from error
        missing = sorted({path.name for path in file_of.values() if not path.is_file()})
        if missing:
            raise CheckpointError(
                f"model.path: '{self}' lacks {len(missing)} of the shards in its index, the first "
                f"is {missing[0]}; complete the download"
            )
        return file_of

    def _handle(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"model.path: {self}/{path.name} is damaged ({error}); download it again"
                ) from error
        return self._handles[path]

    def _view(self, name: str) -> Any:
        path = self._file_of.get(name)
        if path is None:
            raise CheckpointError(
                f"model.path: '{self}' has no tensor {name} among its {len(self._file_of)}; "
                "give a complete checkpoint of this architecture"
            )
        try:
            return self._handle(path).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"model.path: the index of '{self}' puts {name} in {path.name}, which does not "
                "hold it; download both again"
            ) from error


class RandomSource:
    """Fresh float32 weights for `model.random_init`: norms 1, biases 0, the rest normal.

    Each tensor has a generator of its own, seeded by `seed` and the tensor's name, so the weights
    do not depend on the layout, on which slices are read, or on their order.
    """

    def __init__(self, shapes: Mapping[str, Shape], *, seed: int, initializer_range: float) -> None:
        self._shapes = dict(shapes)
        self._seed = seed
        self._initializer_range = initializer_range

    def __str__(self) -> str:
        return f"random weights of seed {self._seed}"

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        tensor = torch.empty(self._shapes[name], dtype=torch.float32, device="cpu")
        if name.endswith("norm.weight"):
            return tensor.fill_(1.0)
        if name.endswith(".bias"):
            return tensor.zero_()
        assert tensor.ndim > 1, f"no rule to initialize {name} of shape {self._shapes[name]}"
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        return tensor.normal_(0.0, self._initializer_range, generator=generator)

    def read_slice(self, name: str, *, start: int, stop: int, dim: int) -> torch.Tensor:
        """Entries `start` to `stop` along `dim`, in memory of their own."""
        entries = self.read(name).narrow(dim, start, stop - start)
        return entries.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What an export holds: `shards` maps each file name to its tensors, in the order written."""

    dtype: torch.dtype
    shapes: Mapping[str, Shape]
    shards: Mapping[str, tuple[str, ...]]


def plan_shards(
    shapes: Mapping[str, Shape], *, dtype: torch.dtype, max_shard_bytes: int = 5_000_000_000
) -> ShardPlan:
    """Fill shards in the order of `shapes`; a tensor above `max_shard_bytes` gets one to itself."""
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
        shards = {_SINGLE_FILE: tuple(groups[0])}
    else:
        shards = {
            f"model-{number:05d}-of-{len(groups):05d}.safetensors": tuple(group)
            for number, group in enumerate(groups, start=1)
        }
    return ShardPlan(dtype=dtype, shapes=dict(shapes), shards=shards)


def write_hf_folder(
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    plan: ShardPlan,
    assets: Path,
    output: Path,
    replace: bool = False,
) -> None:
    """Write a model folder that transformers loads, and give it its name when it is complete.

    `tensors` come in the plan's order, from any device; each is rounded once, to the plan's dtype.
    `assets` is a folder as `save_assets` makes it; its config.json is told the dtype. Raises
    `CheckpointError` for a tensor that is missing, extra or misshapen, for a folder in the way
    (`replace` takes the place of an earlier model only) and when the disk refuses.
    """
    target = output.resolve()  # a rename onto a symbolic link would fail, or replace the link
    _check_room(output, replace=replace)
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir()
        _copy_assets(assets, folder=partial, dtype=plan.dtype)
        _write_shards(tensors, plan=plan, folder=partial)
        _publish(partial, target=target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{output}: the model cannot be written ({error}); free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_assets(
    model_path: str | Path,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    output: Path,
    end_of_turn_id: int,
    pad_token_id: int | None = None,
) -> None:
    """Collect in `output` what an export needs beside the weights.

    config.json stays as its author wrote it, so that older readers understand it. The tokenizer
    carries the chat template it was trained with. generation_config.json stops at `end_of_turn_id`,
    at the tokenizer's eos and where the source stopped, or the served model never ends its turn.
    """
    from transformers import GenerationConfig  # slow: paid by whoever exports, not on import

    output.mkdir(parents=True, exist_ok=True)
    config = _read_json(Path(model_path) / "config.json")
    _write_json(output / "config.json", config)
    tokenizer.save_pretrained(output)
    generation_file = Path(model_path) / "generation_config.json"
    if generation_file.is_file():
        generation = _read_json(generation_file)
    else:
        generation = GenerationConfig.from_model_config(dict(config)).to_diff_dict()
    # Left in, transformers would compute the file anew from config.json, without our stop tokens.
    generation.pop("_from_model_config", None)
    earlier = generation.get("eos_token_id")
    stops = [end_of_turn_id, tokenizer.eos_token_id]
    stops += earlier if isinstance(earlier, list) else [earlier]
    generation["eos_token_id"] = list(dict.fromkeys(stop for stop in stops if stop is not None))
    if pad_token_id is not None:
        generation["pad_token_id"] = pad_token_id
    _write_json(output / "generation_config.json", generation)


def _num_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _check_room(output: Path, *, replace: bool) -> None:
    """Refuse to write over anything that is not an empty folder or a model to be replaced."""
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is a file; choose another folder for the model")
    files = {path.name for path in output.iterdir()} if output.exists() else set()
    if files and not replace:
        raise CheckpointError(f"{output} is not empty; remove it or choose another folder")
    if files and "config.json" not in files:
        raise CheckpointError(f"{output} holds no model to replace; choose another folder")


def _copy_assets(assets: Path, *, folder: Path, dtype: torch.dtype) -> None:
    """Copy contents only: the modes of a private temporary folder must not reach the export."""
    for source in sorted(path for path in assets.rglob("*") if path.is_file()):
        assert source.suffix not in _WEIGHT_SUFFIXES, f"{source} is among the assets"
        copy = folder / source.relative_to(assets)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    config = _read_json(folder / "config.json")
    # transformers 5 writes `dtype` and reads both; older readers know `torch_dtype` alone.
    for key in [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]:
        config[key] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)


def _write_shards(
    tensors: Iterable[tuple[str, torch.Tensor]], *, plan: ShardPlan, folder: Path
) -> None:
    """Write every planned tensor exactly once, and the index if there are several files."""
    stream = iter(tensors)
    for file, names in plan.shards.items():
        # No name holds the shard: the next one must not be gathered beside it.
        save_file(
            {name: _next_tensor(stream, name=name, plan=plan) for name in names},
            folder / file,
            metadata={"format": "pt"},
        )
        # safetensors creates its files for the owner alone, whatever the umask.
        shutil.copymode(folder / "config.json", folder / file)
    for name, _ in stream:
        raise CheckpointError(f"export: {name} comes after the last of {len(plan.shapes)} tensors")
    if len(plan.shards) > 1:
        weight_map = {name: file for file, names in plan.shards.items() for name in names}
        sizes = {"total_size": sum(_num_bytes(s, plan.dtype) for s in plan.shapes.values())}
        _write_json(folder / _INDEX_FILE, {"metadata": sizes, "weight_map": weight_map})


def _next_tensor(
    stream: Iterator[tuple[str, torch.Tensor]], *, name: str, plan: ShardPlan
) -> torch.Tensor:
    """The next tensor, which must be the planned one, ready to be stored."""
    got, tensor = next(stream, (None, None))
    if got != name or tensor is None:
        raise CheckpointError(
            f"export: {name} is due but {got or 'nothing'} comes; the checkpoint is incomplete"
        )
    if tuple(tensor.shape) != tuple(plan.shapes[name]):
        raise CheckpointError(
            f"export: {name} has shape {list(tensor.shape)} but the model gives "
            f"{list(plan.shapes[name])}; the checkpoint belongs to another model"
        )
    return tensor.detach().to(device="cpu", dtype=plan.dtype).contiguous()


def _publish(partial: Path, *, target: Path) -> None:
    """Rename a complete folder, after its bytes are on disk."""
    for path in (*partial.rglob("*"), partial):
        _flush(path)
    if target.is_dir() and any(target.iterdir()):
        # Two renames: a crash between them leaves the earlier model under the other name.
        earlier = target.with_name(f".{target.name}.replaced")
        shutil.rmtree(earlier, ignore_errors=True)
        target.rename(earlier)
        partial.rename(target)
        shutil.rmtree(earlier, ignore_errors=True)
    else:
        partial.rename(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); correct the file") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not an object; correct it")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
