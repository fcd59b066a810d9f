"""What a run with adapters is checked for and remembered by, before a worker exists."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from roll_sft.base.errors import CheckpointError, ConfigError, refuse
from roll_sft.config.lora import LoraConfig
from roll_sft.config.schema import RunConfig
from roll_sft.models.adapters.adapter import adapter_problems, adapter_shapes, target_names
from roll_sft.models.adapters.peft_folder import BASE, AdapterSource, read_lora
from roll_sft.models.family import Family
from roll_sft.models.files.config_file import load_hf_config
from roll_sft.models.files.json_files import read_json
from roll_sft.models.files.safetensors_in import INDEX_FILE, SINGLE_FILE, Shape
from roll_sft.models.random_weights import SEEDED
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import ModelSource

_NUM_BLOCKS, _BLOCK_BYTES = 64, 4096
_VOLATILE = ("_name_or_path", "transformers_version")
_NAMES_SHOWN = 3
_KEY = "lora.adapter_path"


def check_lora(config: RunConfig, family: Family, shape: ModelShape) -> None:
    """Raise `ConfigError` that lists all of `config.lora` that the model does not have.

    Or an adapter to start from that differs from what `config.lora` says, or is of another model.
    """
    lora = config.lora
    refuse([*adapter_problems(family, shape, lora), *_quantization_problems(config, family, shape)])
    if lora.adapter_path is None:
        return
    folder = Path(lora.adapter_path)
    stored = read_lora(folder, key=_KEY)
    refuse(list(_differences(lora, stored, folder=folder)))
    problem = tensor_problem(AdapterSource(folder).shapes(), adapter_shapes(family, shape, lora))
    if problem:
        raise ConfigError(
            f"{_KEY}: '{folder}' {problem}; give an adapter of this model, or the lora.rank,"
            " lora.target_modules and lora.modules_to_save that it was trained with"
        )
    assert config.model.path is not None, "check_config refuses a missing model.path"
    if not (config.model.random_init or config.dry_run):
        check_base(folder, Path(config.model.path), key=_KEY)


def _quantization_problems(config: RunConfig, family: Family, shape: ModelShape) -> Iterator[str]:
    if config.lora.quantize_base == "none":
        return
    from roll_sft.models.adapters.nf4 import block_problems, library_problem

    problem = library_problem()
    if problem and not config.dry_run:  # which may plan for another machine
        yield problem
    tensor_size = config.parallel.tensor_model_parallel_size
    yield from block_problems(family, shape, config.lora, tensor_size=tensor_size)


def _differences(lora: LoraConfig, stored: LoraConfig, *, folder: Path) -> Iterator[str]:
    for name in ("rank", "alpha", "use_rslora", "modules_to_save"):
        wanted, found = getattr(lora, name), getattr(stored, name)
        if wanted != found:
            value = str(found).lower() if isinstance(found, bool) else found
            yield (
                f"lora.{name}: {wanted}, and the adapter in '{folder}' has {found}; set"
                f" lora.{name}={value}"
            )


def tensor_problem(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> str | None:
    """How the tensors of an adapter differ from those of the model, in words; None if they agree.

    Both are names and shapes, as PEFT has them.
    """
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    if missing or unexpected:
        counts = (("lacks", missing), ("has besides", unexpected))
        return " and ".join(
            f"{verb} {len(names)} tensors ({', '.join(names[:_NAMES_SHOWN])}"
            f"{', ...' if len(names) > _NAMES_SHOWN else ''})"
            for verb, names in counts
            if names
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            return f"has {name} of shape {list(found[name])}, and this model's is {list(shape)}"
    return None


def lora_facts(config: RunConfig, source: ModelSource) -> dict[str, Any]:
    """What a run that resumes must have in common, and an export is made of; plain values."""
    lora = config.lora
    return {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": target_names(source.family, source.shape, lora),
        "modules_to_save": sorted(lora.modules_to_save),
        "quantize_base": lora.quantize_base,
        **base_facts(config, source),
    }


def base_facts(config: RunConfig, source: ModelSource) -> dict[str, Any]:
    """The model that a run starts from, of which its checkpoints hold a part."""
    path = source.hub.repo_id if source.hub else config.model.path
    return {"base_model": _base_of(config, source), "base_path": path}


def _base_of(config: RunConfig, source: ModelSource) -> str:
    if source.seed is not None:
        return f"{SEEDED}{source.seed}"
    folder = source.hub.folder() if source.hub is not None else Path(config.model.path or "")
    return fingerprint(folder)


def check_base(adapter: Path, base: Path, *, key: str) -> None:
    """Raise `ConfigError` where the adapter's folder names another base model than `base`.

    Folders that PEFT has written name none.
    """
    if (adapter / BASE).is_file():
        check_fingerprint(read_json(adapter / BASE).get("fingerprint"), adapter, base, key=key)


def check_fingerprint(wanted: object, adapter: Path, base: Path, *, key: str) -> None:
    """Raise `ConfigError` where the fingerprint of `base` is not `wanted`, the adapter's."""
    if wanted != (found := fingerprint(base)):
        raise ConfigError(
            f"{key}: '{adapter}' was trained on the base model {wanted}, and '{base}' is {found};"
            " give the base model that it was trained on"
        )


def fingerprint(folder: Path) -> str:
    """16 hexadecimal digits that tell a model folder from others of the same shape.

    Of config.json, and of each safetensors file its header, its size and some blocks of its
    numbers; the rest is not read. Raises `CheckpointError` for a file that cannot be read.
    """
    digest = hashlib.sha256()
    values = {k: v for k, v in read_json(folder / "config.json").items() if k not in _VOLATILE}
    digest.update(json.dumps(values, sort_keys=True).encode())
    for path in _weight_files(folder):
        try:
            _update(digest, path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()[:16]


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    files = read_json(folder / INDEX_FILE).get("weight_map", {}).values()
    return [folder / name for name in sorted(set(files))]


def _update(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        size = path.stat().st_size
        digest.update(head + file.read(min(length, size)) + size.to_bytes(8, "little"))
        first = 8 + length
        for number in range(_NUM_BLOCKS):
            file.seek(first + (size - first) * number // _NUM_BLOCKS)
            digest.update(file.read(_BLOCK_BYTES))


def base_shape(base: Path) -> tuple[Family, ModelShape]:
    """Family and shape of the model in `base`. Raises `ConfigError` as `family_of` does."""
    from roll_sft.models.source import family_of

    config = load_hf_config(str(base), trust_remote_code=False)
    family = family_of(config)
    return family, family.shape(config)
