"""One checkpoint step folder -> a HuggingFace folder, in one process, tensor by tensor.

The checkpoint describes itself (`hf_assets/`, `manifest.json`), so nothing else is asked for.
Memory holds one output shard and one tensor. The folder appears under its name when it is complete.
"""

import argparse
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from roll_sft.engine.publish import ASSETS, check_complete
from roll_sft.engine.reader import Reader
from roll_sft.engine.safe_load import check_pickles
from roll_sft.errors import RollSftError
from roll_sft.models.hf_io import plan_shards, write_hf_folder
from roll_sft.models.registry import family_of, load_hf_config
from roll_sft.models.spec import Family, ModelShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAULT = 1


def export(checkpoint: Path, output: Path, *, dtype: str | None, replace: bool) -> None:
    """Write `checkpoint` as a model folder that transformers loads.

    `dtype` is fp32, bf16 or fp16; None keeps that of the source model. Raises `CheckpointError` for
    a folder that is no complete checkpoint, or an `output` that is in the way.
    """
    check_complete(checkpoint)
    check_pickles(checkpoint)
    config = load_hf_config(str(checkpoint / ASSETS), trust_remote_code=False)
    family = family_of(config)
    shape = family.shape(config)
    chosen = DTYPES[dtype] if dtype else config.dtype
    write_hf_folder(
        _hf_tensors(Reader(checkpoint), family, shape),
        plan=plan_shards(
            family.hf_shapes(shape),
            dtype=chosen if isinstance(chosen, torch.dtype) else torch.float32,
        ),
        assets=checkpoint / ASSETS,
        output=output,
        replace=replace,
    )


def main(arguments: list[str] | None = None, *, program: str | None = None) -> int:
    """The command line; returns the exit code, the cause as the last line on stderr.

    `program` is what the command is called in its own help.
    """
    parser = argparse.ArgumentParser(prog=program, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a step folder")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: the source model's")
    parser.add_argument("--replace", action="store_true", help="take the place of an earlier model")
    options = parser.parse_args(arguments)
    try:
        export(options.checkpoint, options.output, dtype=options.dtype, replace=options.replace)
    except RollSftError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except Exception as error:  # noqa: BLE001 -- the door: everything ends in an exit code
        traceback.print_exc()
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return FAULT
    sys.stdout.write(f"{options.output}\n")
    return 0


def _hf_tensors(
    reader: Reader, family: Family, shape: ModelShape
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every HuggingFace tensor once, in the order of the family's table."""
    for name, word in family.weights(shape).items():
        if word.hf_shapes:  # a tied head owns none: its embedding is exported
            yield from word.to_hf(reader.read(name)).items()


if __name__ == "__main__":
    sys.exit(main())
