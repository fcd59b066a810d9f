"""Their batches, steps and learning rates beside ours, so that a user sees equal ones."""

import math
from collections.abc import Iterator
from pathlib import Path

from roll_sft.base.errors import ConfigError
from roll_sft.config.schema import RunConfig, TrainConfig
from roll_sft.data.steps.learning_rate import Schedule
from roll_sft.migrate.draft import Batch, Draft


def comparison(
    draft: Draft, config: RunConfig, samples: int | None, mean_tokens: float | None
) -> Iterator[str]:
    """Lines of a table: what a step holds, the steps of a run, the learning rate along them.

    `samples` are those of all training data, `mean_tokens` their mean length. Raises
    `ConfigError` where one of them is needed and neither given nor to be counted.
    """
    batch, train = draft.batch, config.train
    assert batch is not None, "every trainer has a batch"
    count = samples if samples is not None else _counted(config)
    if batch.packed_tokens is not None and mean_tokens is None:
        raise ConfigError(
            "--mean-tokens: a row of theirs is a pack, so steps follow from tokens; add"
            " --mean-tokens N, the mean of `roll-sft preview`"
        )
    theirs, ours = _steps(batch, count, mean_tokens), _our_steps(train, count, mean_tokens)
    total_theirs = train.max_steps or theirs * train.num_train_epochs
    total_ours = train.max_steps or ours * train.num_train_epochs
    rows = [
        ("", draft.rival, "roll_sft"),
        ("samples", f"{count}", f"{count}"),
        ("a step holds", _held(batch), _our_held(train)),
        ("steps of an epoch", f"{theirs}", f"{ours}"),
        ("steps of the run", f"{total_theirs}", f"{total_ours}"),
    ]
    if mean_tokens is not None:
        mine = total_ours * (train.global_batch_tokens or train.global_batch_size * mean_tokens)
        yours = total_theirs * batch.rows * (batch.packed_tokens or mean_tokens)
        rows.append(("tokens of the run, at most", f"{yours:.4g}", f"{mine:.4g}"))
    schedule = Schedule.of(train, total_steps=total_ours)
    rival = Schedule.of(train, total_steps=total_theirs)
    for step in _marks(schedule):
        rate = f"{_their_rate(rival, step):.4g}" if step <= total_theirs else "-"
        rows.append((f"learning rate of step {step}", rate, f"{schedule.at(step):.4g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    yield "plan of both:"
    for row in rows:
        cells = zip(row, widths, strict=True)
        yield "  " + "  ".join(cell.ljust(width) for cell, width in cells).rstrip()
    yield from _remarks(draft.rival, batch, schedule, theirs=total_theirs, ours=total_ours)


def _remarks(
    rival: str, batch: Batch, schedule: Schedule, *, theirs: int, ours: int
) -> Iterator[str]:
    if ours > theirs and batch.drops_last:
        yield (
            f"  {rival} leaves out the last, short batch of an epoch, which is trained here;"
            f" train.max_steps={theirs} makes the steps and their rates equal"
        )
    elif ours != theirs:
        yield f"  the steps differ: {theirs} there, {ours} here"
    if schedule.warmup_steps:
        yield "  warm-up there begins with one step at rate 0, and is one step behind until it ends"


def _counted(config: RunConfig) -> int:
    """Rows of local JSON Lines files, times their weights."""
    total = 0.0
    for source in config.data.train:
        path = Path(source.path or "")
        if source.samples is not None:
            total += source.samples
        elif path.suffix == ".jsonl" and path.is_file():
            with path.open("rb") as file:
                total += source.weight * sum(1 for line in file if line.strip())
        else:
            raise ConfigError(
                f"--samples: the rows of '{source.path}' cannot be counted here; add --samples N"
            )
    return round(total)


def _steps(batch: Batch, samples: int, mean_tokens: float | None) -> int:
    rows = float(samples)
    if batch.packed_tokens is not None and mean_tokens is not None:
        rows = samples * mean_tokens / batch.packed_tokens
    steps = rows / batch.rows
    return math.floor(steps) if batch.drops_last else math.ceil(steps)


def _our_steps(train: TrainConfig, samples: int, mean_tokens: float | None) -> int:
    if train.global_batch_tokens is not None and mean_tokens is not None:
        return math.ceil(samples * mean_tokens / train.global_batch_tokens)
    return math.ceil(samples / train.global_batch_size)


def _held(batch: Batch) -> str:
    if batch.packed_tokens is None:
        return f"{batch.rows} samples"
    return f"{batch.rows} packs, {batch.rows * batch.packed_tokens} tokens"


def _our_held(train: TrainConfig) -> str:
    if train.global_batch_tokens is None:
        return f"{train.global_batch_size} samples"
    return f"packs, {train.global_batch_tokens} tokens"


def _marks(schedule: Schedule) -> list[int]:
    """The first step, the end of warm-up, quarters, the last step."""
    total, warmup = schedule.total_steps, schedule.warmup_steps
    marks = {1, max(1, warmup), total // 4, total // 2, 3 * total // 4, total}
    return sorted(step for step in marks if 1 <= step <= total)


def _their_rate(schedule: Schedule, step: int) -> float:
    """Their curve is ours but for the warm-up, which begins with one step at rate 0."""
    if step > schedule.warmup_steps:
        return schedule.at(step)
    return schedule.peak * (step - 1) / schedule.warmup_steps
