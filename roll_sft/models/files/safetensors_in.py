"""Hugging Face model folders in, streaming; `safetensors_out.py` writes them.

A `TensorSource` gives tensors, or slices of them, by Hugging Face name. Pickle files are refused:
loading one can run code.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open

from roll_sft.base.errors import CheckpointError, ConfigError

Shape: TypeAlias = tuple[int, ...]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names
_MOST_INDEX_BYTES = 64 << 20  # of 100,000 tensors it has 10
_PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


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


class StoredSource(TensorSource, Protocol):
    """Tensors of files."""

    def dtype(self, name: str) -> torch.dtype:
        """What `read` returns a tensor in, without reading it."""


class SafetensorsSource:
    """The safetensors files of a model folder: one, or shards with an index.

    Files are mapped when first needed. A missing folder or format is a `ConfigError`; a missing or
    damaged file, or a tensor it does not hold, a `CheckpointError`. Pickled as the path of its
    folder.
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

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is stored in, without reading it."""
        return FLOATS[self._view(name).get_dtype()]

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

    def read_bytes(self, name: str) -> torch.Tensor:
        """The whole tensor, which holds bytes that are no numbers by themselves."""
        tensor: torch.Tensor = self._view(name, dtypes={"U8": torch.uint8})[...]
        return tensor

    def _find_tensors(self, folder: Path) -> dict[str, Path]:
        if not folder.is_dir():
            raise ConfigError(f"model.path: '{self}' is not a folder; give a local model folder")
        if (folder / SINGLE_FILE).is_file():
            path = folder / SINGLE_FILE
            return dict.fromkeys(self._handle(path).keys(), path)
        if (folder / INDEX_FILE).is_file():
            return self._read_index(folder)
        if any((folder / name).is_file() for name in _PICKLE_FILES):
            raise ConfigError(
                f"model.path: '{self}' has only pytorch_model.bin, and loading pickle can run "
                "code; convert it with transformers' save_pretrained, which writes safetensors"
            )
        raise ConfigError(
            f"model.path: '{self}' has neither {SINGLE_FILE} nor {INDEX_FILE}; complete the "
            "download, or set model.random_init=true to start from random weights"
        )

    def _read_index(self, folder: Path) -> dict[str, Path]:
        try:
            if (folder / INDEX_FILE).stat().st_size > _MOST_INDEX_BYTES:
                raise ValueError(f"it has more than {_MOST_INDEX_BYTES >> 20} MiB")
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            files = {str(name): str(file) for name, file in index["weight_map"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"model.path: {self}/{INDEX_FILE} is not an index of shards ({error!r}); "
                "download it again"
            ) from error
        for name, file in files.items():
            if file != Path(file).name or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"model.path: {self}/{INDEX_FILE} puts {name} in {file!r}, which is no"
                    " safetensors file of this folder; download it again"
                )
        file_of = {name: folder / file for name, file in files.items()}
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

    def _view(self, name: str, *, dtypes: Mapping[str, torch.dtype] = FLOATS) -> Any:
        path = self._file_of.get(name)
        if path is None:
            raise CheckpointError(
                f"model.path: '{self}' has no tensor {name} among its {len(self._file_of)}; "
                "give a complete checkpoint of this architecture"
            )
        try:
            view = self._handle(path).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"model.path: the index of '{self}' puts {name} in {path.name}, which does not "
                "hold it; download both again"
            ) from error
        if view.get_dtype() not in dtypes:
            raise ConfigError(
                f"model.path: '{self}' has {name} in {view.get_dtype()}, and it is read in"
                f" {', '.join(dtypes)}; give an unquantized checkpoint"
            )
        return view
