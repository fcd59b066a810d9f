"""The exports of a run's checkpoints: which commands make them. They are processes of their own."""

import logging
import os
import subprocess
import sys
from pathlib import Path

from roll_sft.base.errors import CheckpointError, DivergedError, why_ended
from roll_sft.config.schema import RunConfig
from roll_sft.convert.push import ADAPTER, MODEL

LOG = logging.getLogger(__name__)


def export_final(config: RunConfig, checkpoint: Path, folder: Path) -> None:
    """Make of `checkpoint` what `checkpoint.hf_export` asks for at the end of a run."""
    wanted = config.checkpoint.hf_export
    if not config.lora.rank:
        _convert(conversion(config, checkpoint, folder / MODEL))
        return
    if wanted != "merged":
        _convert(conversion(config, checkpoint, folder / ADAPTER))
    if wanted != "adapter":
        merge = ["roll_sft.convert.merge_lora", "--adapter", str(checkpoint)]
        merge += ["--dequantize"] if config.lora.quantize_base != "none" else []
        merge += ["--base", str(config.model.path), "--output", str(folder / MODEL), "--replace"]
        _convert(merge)


def conversion(config: RunConfig, checkpoint: Path, output: Path) -> list[str]:
    """The module, and its arguments, that makes a model or an adapter of `checkpoint`."""
    convert = ["roll_sft.convert.command", "--checkpoint", str(checkpoint)]
    if config.train.freezes:
        convert += ["--base", str(config.model.path)]
    return [*convert, "--output", str(output), "--replace"]


def _convert(command: list[str]) -> None:
    """Run a module and its arguments, as a process of its own: no workers and no Ray are needed."""
    LOG.info("exporting %s", command[2])
    output = command[command.index("--output") + 1]
    child = subprocess.Popen(
        [sys.executable, "-m", "roll_sft.base.child", str(os.getpid()), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a signal to the group is for this process to handle
    )
    with child:
        try:
            told, errors = child.communicate()
        except BaseException:
            child.kill()
            child.wait()  # before the lock of the run is released
            raise
    if child.returncode:
        kind = DivergedError if child.returncode == DivergedError.exit_code else CheckpointError
        raise kind(f"the export to {output} failed: {why_ended(child.returncode, errors)}")
    told = "; ".join(told.strip().splitlines()[:-1])  # the last is the folder
    LOG.info("Hugging Face folder %s (%s)", output, told)
