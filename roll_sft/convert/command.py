"""The command that converts: a checkpoint to a HuggingFace folder, or the reverse.

    python -m roll_sft.convert.command INPUT --output FOLDER [--dtype bf16] [--verify] [--replace]

INPUT tells the direction: a step folder has a manifest, a HuggingFace model a config.json.
"""

import argparse
import sys
from pathlib import Path

from roll_sft.base.errors import ConfigError, report
from roll_sft.base.gc_pauses import leave_quickly
from roll_sft.checkpoint.manifest import MANIFEST
from roll_sft.convert.from_hf import DTYPES, import_model
from roll_sft.convert.to_hf import export

_DESCRIPTION = "A checkpoint to a folder that transformers loads, or such a folder to a checkpoint."


def main(arguments: list[str] | None = None, *, program: str | None = None) -> int:
    """The command line; returns the exit code, the cause as the last line on stderr.

    `program` is what the command is called in its own help.
    """
    parser = argparse.ArgumentParser(prog=program, description=_DESCRIPTION, allow_abbrev=False)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("input", type=Path, nargs="?", help="a step folder or a model folder")
    given.add_argument("--checkpoint", type=Path, help="a step folder, to become a model folder")
    given.add_argument("--model", type=Path, help="a model folder, to become a checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: the source model's")
    parser.add_argument(
        "--base", type=Path, help="the model that a run with frozen weights started from, if moved"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare the logits of both at the end"
    )
    parser.add_argument("--replace", action="store_true", help="replace an earlier output")
    options = parser.parse_args(arguments)
    leave_quickly()
    try:
        found = _convert(options)
    except Exception as error:  # noqa: BLE001 -- the door: everything ends in an exit code
        return report(error)
    if found is not None:
        sys.stdout.write(f"{found}\n")
    sys.stdout.write(f"{options.output}\n")
    return 0


def _convert(options: argparse.Namespace) -> str | None:
    """Convert in the direction that the options ask for; returns the report of the conversion."""
    model, checkpoint = options.model, options.checkpoint
    if options.input is not None and (options.input / MANIFEST).is_file():
        checkpoint = options.input
    elif options.input is not None and (options.input / "config.json").is_file():
        model = options.input
    elif options.input is not None:
        raise ConfigError(
            f"{options.input}: has neither {MANIFEST}, as a checkpoint step folder, nor config.json"
            " as a HuggingFace model; give one of these folders"
        )
    if options.verify:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    how = {"dtype": options.dtype, "replace": options.replace, "verified": options.verify}
    if checkpoint is None:
        return import_model(model, options.output, **how)
    return export(checkpoint, options.output, base=options.base, **how)


if __name__ == "__main__":
    sys.exit(main())
