"""A checkpoint of a run that froze a part of its model, and the base model that has the rest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from roll_sft.base.errors import ConfigError
from roll_sft.checkpoint.manifest import Manifest
from roll_sft.checkpoint.reader import Reader
from roll_sft.job.lora import check_fingerprint
from roll_sft.models.family import Family
from roll_sft.models.files.model_folder import check_source, local_model
from roll_sft.models.files.safetensors_in import SafetensorsSource, TensorSource
from roll_sft.models.random_weights import SEEDED, RandomSource
from roll_sft.models.shape import ModelShape
from roll_sft.models.weight_map import WeightMapping


class WholeModel:
    """Reads every parameter as `Reader` does: what was trained, and of the base what was not."""

    def __init__(
        self, reader: Reader, base: TensorSource, table: Mapping[str, WeightMapping]
    ) -> None:
        self._reader, self._base, self._table = reader, base, table

    def num_bytes(self, name: str) -> int:
        """Bytes that `read` needs of its scratch memory."""
        return self._reader.num_bytes(name) if self._reader.has(name) else 0

    def read(self, name: str, *, scratch: torch.Tensor | None = None) -> torch.Tensor:
        """Parameter `name` with all tensor shards merged; of the base in the base's dtype."""
        if self._reader.has(name):
            return self._reader.read(name, scratch=scratch)
        return self._table[name].local(self._base, tensor_rank=0, tensor_size=1)

    def check_all_read(self) -> None:
        """Raise `CheckpointError` for a tensor of the checkpoint that was not read."""
        self._reader.check_all_read()


def whole_model(
    reader: Reader, manifest: Manifest, model: tuple[Family, ModelShape], *, base: Path | None
) -> WholeModel:
    """`reader` with the base model that its run started from, or the copy of it in `base`.

    Raises `ConfigError` where that is not there, or is another model.
    """
    family, shape = model
    facts: Any = manifest.state.facts["frozen"]
    wanted, path = str(facts.get("base_model")), str(base or facts.get("base_path"))
    if wanted.startswith(SEEDED):
        source: TensorSource = RandomSource(
            family.hf_shapes(shape),
            seed=int(wanted.removeprefix(SEEDED)),
            initializer_range=shape.initializer_range,
        )
        return WholeModel(reader, source, family.weights(shape))
    folder = Path(local_model(path, with_weights=True)[0])
    if not folder.is_dir():
        raise ConfigError(
            f"--base: the checkpoint holds what was trained, and the rest is in '{path}', which is"
            " no folder here; give the folder of that model with --base"
        )
    check_fingerprint(wanted, reader.folder, folder, key="--base")
    source = family.opened(SafetensorsSource(folder))
    check_source(family, shape, source=source)
    return WholeModel(reader, source, family.weights(shape))
