"""`roll-sft plan --suggest`: the three quickest layouts that fit, and what the others lose by.

Promises: a suggestion is a layout that `prepare` accepts for this model, and no layout that fits is
estimated to be quicker by more than 5 %. Where none fits, the error names what would.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

from rich.table import Table

from roll_sft.base.console import stdout_console
from roll_sft.base.errors import ConfigError
from roll_sft.config.schema import ParallelConfig, RunConfig
from roll_sft.job.dry_run import dry_overview
from roll_sft.job.layouts import (
    DEGREES,
    LEAST_CONTEXT_TOKENS,
    OVERHEAD_GIB,
    TIE,
    Candidate,
    Gpus,
    candidates,
    fits,
    refusals,
    shown_value,
)
from roll_sft.job.overview import drawn_tokens
from roll_sft.job.step_time import StepTime, Work
from roll_sft.models.shape import ModelShape

SHOWN = 3
MOST_GPUS = 1 << 16
SHORTEST_PACK = 512  # tokens, likewise
ASSUMED = (
    "Times and exchanges are by the formulas of roll_sft/job/step_time.py at the rates of an H100"
    " with NVLink and 400 Gb/s\neach; they rank layouts and are no forecast. `roll-sft plan` with"
    " the overrides of one shows its memory in parts."
)
TIMES = {  # what a step's time goes to, in the words of the reasons
    "compute_s": "computation: stages of unequal layers, or data ranks without samples",
    "recompute_s": "recomputation",
    "bubble_s": "the pipeline's bubble",
    "tensor_s": "exchanges of tensor ranks",
    "context_s": "keys and values gathered over context ranks",
    "pipeline_s": "exchanges of stages",
    "data_s": "gradients and weights exchanged over data ranks",
}


def show_suggestions(config: RunConfig, gpus: Gpus) -> None:
    """Print layouts of `config` for `gpus`; the degrees that it has itself do not matter.

    Raises `ConfigError` where none fits, with what would fit, and what `prepare` raises.
    """
    _check(config, gpus)
    given, degrees = config, {name: getattr(ParallelConfig(), name) for name in DEGREES}
    parallel = replace(config.parallel, **{**degrees, "device": "cuda"})
    overview = dry_overview(replace(config, dry_run=True, parallel=parallel))
    config, shape, steps = overview.config, overview.shape, overview.steps_per_epoch
    work = Work(
        tokens=drawn_tokens(overview.reports["train"], overview.shares) / steps,
        samples=sum(share.per_epoch for share in overview.shares.values()) / steps,
        pack_tokens=overview.pack_tokens,
    )
    found = candidates(config, shape, work, gpus)
    best = [each for each in found if fits(each, gpus)][:SHOWN]
    if not best:
        raise ConfigError(_nothing_fits(config, shape, work, gpus))
    console = stdout_console()
    console.print(f"{_title(shape, work, gpus)}\n")
    console.print(_table(best))
    console.print()
    for number, each in enumerate(best, start=1):
        console.print(f"{number}: {each.overrides(given) or 'as it is configured'}", soft_wrap=True)
    console.print("\nWhat the others lose by")
    lines = [*_losers(found, best, gpus), *refusals(config, shape, gpus)]
    if config.data.sequence_length < 2 * LEAST_CONTEXT_TOKENS:
        lines.append(
            f"CP2 and more: for samples of {2 * LEAST_CONTEXT_TOKENS:,} tokens and longer;"
            f" data.sequence_length is {config.data.sequence_length:,}"
        )
    for line in lines:
        console.print(f" {line}", soft_wrap=True)
    console.print(f"\n{ASSUMED}")


def _check(config: RunConfig, gpus: Gpus) -> None:
    if config.parallel.device == "cpu":
        raise ConfigError(
            "parallel.device: cpu has no GPUs to suggest layouts for; leave it out, or --suggest"
        )
    if gpus.number > MOST_GPUS:
        raise ConfigError(f"--gpus: {gpus.number} must be at most {MOST_GPUS}")
    if gpus.number > gpus.per_node and gpus.number % gpus.per_node:
        raise ConfigError(
            f"--gpus: {gpus.number} are not whole nodes of {gpus.per_node}; give a multiple of"
            f" {gpus.per_node}, or another --gpus-per-node"
        )


def _title(shape: ModelShape, work: Work, gpus: Gpus) -> str:
    return (
        f"Layouts of {shape.architecture} with {shape.num_parameters / 1e9:.3g} B parameters for"
        f" {gpus.number} x {gpus.memory_gib:g} GiB of GPU: steps of {work.tokens:,.0f} tokens,"
        f" packs of {work.pack_tokens:,}"
    )


def _table(best: Sequence[Candidate]) -> Table:
    table = Table(show_edge=False)
    columns = ("", "layout", "virtual", "recompute", "micro-batches", "GiB (estimate)")
    for column in (*columns, "bubble", "exchanges", "time"):
        table.add_column(column, overflow="fold")
    for number, each in enumerate(best, start=1):
        time, total_s = each.time, each.time.total_s
        exchanges_s = time.tensor_s + time.context_s + time.pipeline_s + time.data_s
        table.add_row(
            *(str(number), each.degrees, str(each.layout.virtual_size)),
            *(shown_value(each.config.train.recompute), str(each.micro_batches)),
            f"{each.memory.total_gib:.1f}",
            *(f"{time.bubble_s / total_s:.0%}", f"{exchanges_s / total_s:.0%}"),
            f"{total_s / best[0].time.total_s:.2f}",
        )
    return table


def _losers(found: Sequence[Candidate], best: Sequence[Candidate], gpus: Gpus) -> Iterator[str]:
    """A line for each of `found` that is not among the `best`."""
    for each in found:
        if each in best:
            continue
        if fits(each, gpus):
            yield f"{each.degrees}: {_slower(each, best[0])}"
        else:
            memory = each.memory
            parts = {
                "weights, gradients and optimizer": memory.state_gib,
                "activations": memory.activations_gib,
                "a layer's backward": memory.backward_gib,
                "the head": memory.head_gib,
            }
            largest = max(parts, key=parts.__getitem__)
            yield (
                f"{each.degrees}: {memory.total_gib:.1f} GiB do not fit in {gpus.room_gib:g} with"
                f" train.recompute={shown_value(each.config.train.recompute)}; {largest} take"
                f" {parts[largest]:.1f}"
            )


def _slower(loser: Candidate, first: Candidate) -> str:
    """The time of `loser` beside the first, and what most of it goes to that this does not take."""
    ratio = loser.time.total_s / first.time.total_s
    names = [field.name for field in fields(StepTime)]
    more = {name: getattr(loser.time, name) - getattr(first.time, name) for name in names}
    if ratio <= TIE and len(loser.axes) > len(first.axes):
        return f"{ratio:.2f} x the time, which is a tie, with more axes: {', '.join(loser.axes)}"
    return f"{ratio:.2f} x the time; more goes to {TIMES[max(more, key=more.__getitem__)]}"


def _nothing_fits(config: RunConfig, shape: ModelShape, work: Work, gpus: Gpus) -> str:
    """Why no layout fits, and what would make one fit: more GPUs, shorter packs, larger GPUs."""
    found = candidates(config, shape, work, gpus)
    if not found:
        reasons = "; ".join(refusals(config, shape, gpus))
        return f"--gpus: no layout of {gpus.number} GPUs can run: {reasons}"
    least = found[0]
    needed = least.memory.total_gib + OVERHEAD_GIB
    remedies = [
        *_more_gpus(config, shape, work, gpus),
        *_shorter_packs(config, shape, work, gpus),
        f"--memory {math.ceil(needed)}",
    ]
    return (
        f"--memory: {gpus.memory_gib:g} GiB on each of {gpus.number} GPUs hold no layout; the least"
        f" is {needed:.1f}, for {least.degrees} with train.recompute="
        f"{shown_value(least.config.train.recompute)} and {OVERHEAD_GIB:g} for CUDA and NCCL. What"
        f" fits: {', or '.join(remedies)}"
    )


def _more_gpus(config: RunConfig, shape: ModelShape, work: Work, gpus: Gpus) -> Iterator[str]:
    number = gpus.number
    while (number := number * 2 if number >= gpus.per_node else gpus.per_node) <= MOST_GPUS:
        more = replace(gpus, number=number)
        for first in candidates(config, shape, work, more)[:1]:
            if fits(first, more):
                yield f"--gpus {number} ({first.degrees}, {first.memory.total_gib:.1f} GiB)"
                return


def _shorter_packs(config: RunConfig, shape: ModelShape, work: Work, gpus: Gpus) -> Iterator[str]:
    """Packs of half the length, again and again; below the longest sample, shorter samples too."""
    tokens = work.pack_tokens
    while (tokens := tokens // 2) >= SHORTEST_PACK:
        length = min(tokens, config.data.sequence_length)
        shorter = replace(
            config,
            data=replace(config.data, sequence_length=length),
            train=replace(config.train, micro_batch_tokens=tokens),
        )
        for first in candidates(shorter, shape, work, gpus)[:1]:
            if fits(first, gpus):
                cuts = length < config.data.sequence_length
                yield (
                    f"{f'data.sequence_length={length} ' if cuts else ''}"
                    f"train.micro_batch_tokens={tokens}"
                    f" ({first.degrees}, {first.memory.total_gib:.1f} GiB)"
                )
                return
