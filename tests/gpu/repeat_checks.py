"""What `check.py` says of runs that must repeat themselves: the same run twice, and one resumed."""

from collections.abc import Iterator
from pathlib import Path

from roll_sft.config.schema import RunConfig
from roll_sft.job.in_process import prepare_job
from tests import parity

BREAK = 4  # the step of the checkpoint


def check_repeats(
    device: str, folder: Path, *, backends: list[str]
) -> Iterator[tuple[str, float, float]]:
    """Steps that differ in loss or norm with `deterministic`, in bf16, with each kernel.

    `folder` holds what `check.write_inputs` writes.
    """
    for name in backends:
        config = parity.parity_config(
            folder,
            deterministic=True,
            model={"dtype": "bf16", "attention_backend": name},
            parallel={"device": device},
        )
        first, second = (parity.engine_run(config, None) or [] for _ in range(2))
        yield f"steps that a second run changes, {name}", _different(first, second), 0
        resumed = _interrupted(config, folder / f"resumed_{name}")
        yield f"steps that a resume changes, {name}", _different(first, resumed), 0


def _different(first: list[dict[str, float]], second: list[dict[str, float]]) -> int:
    return sum(a != b for a, b in zip(first, second, strict=True))


def _interrupted(config: RunConfig, checkpoints: Path) -> list[dict[str, float]]:
    """The metrics of a run that is saved after step `BREAK` and goes on in another engine."""
    staging = checkpoints / f".staging_{BREAK:08d}"
    staging.mkdir(parents=True)
    before = parity.engine_run(config, staging, last=BREAK) or []
    checkpoint = parity.published(prepare_job(config), staging, BREAK)
    return before + (parity.engine_run(config, None, loads=checkpoint) or [])
