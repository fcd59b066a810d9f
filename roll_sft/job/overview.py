"""What a run will do, for people: layout, model, data, steps and memory, as tables."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from roll_sft.base.console import stdout_console
from roll_sft.base.layout import ParallelLayout
from roll_sft.config.schema import RunConfig
from roll_sft.data.steps.epochs import Share
from roll_sft.data.steps.packing import best_fit_decreasing
from roll_sft.data.steps.plan import Planner, StepPlan
from roll_sft.data.tokens.cache import SourceReport
from roll_sft.job.job import Job, micro_batch_tokens
from roll_sft.job.memory import estimate
from roll_sft.models.shape import ModelShape

_log = logging.getLogger(__name__)
_STEPS_SAMPLED = 8  # whose packs say how full they will be
_POOR_FILL = 0.6
# Of whole packs. A step just above them would need one pack more on each rank, nearly empty.
_FILL_TO_AIM_AT = 0.9


@dataclass(frozen=True, slots=True)
class Overview:
    """What a run will do."""

    config: RunConfig
    layout: ParallelLayout
    shape: ModelShape
    reports: dict[str, tuple[SourceReport, ...]]  # "train" and "validation"
    pack_tokens: int  # padded tokens that a pack holds at most
    steps_per_epoch: int
    total_steps: int
    shares: dict[str, Share]  # train source -> how much of it an epoch draws
    fill: float | None = None  # of the packs: their tokens over what they could hold
    is_estimate: bool = False  # rows and tokens are guessed from the text, for want of tokens


def show_job(job: Job) -> None:
    """Show what `job` will do, and warn where its packs will be half empty."""
    plans = first_steps(job.planner)
    warn_of_poor_fill(job, plans)
    show_overview(overview_of(job, plans))


def overview_of(job: Job, plans: Sequence[StepPlan]) -> Overview:
    """What `job` will do; `plans` are its `first_steps`."""
    return Overview(
        config=job.config,
        layout=job.layout,
        shape=job.source.shape,
        reports=job.reports,
        pack_tokens=micro_batch_tokens(job.config, job.layout),
        steps_per_epoch=job.planner.steps_per_epoch,
        total_steps=job.total_steps,
        shares=job.shares,
        fill=expected_fill(plans),
    )


def show_overview(overview: Overview) -> None:
    """The layout, the model, the data and the memory that a run will have, as tables."""
    console = stdout_console()
    tables = (
        _layout_table,
        _model_table,
        _data_table,
        _samples_table,
        _dropped_table,
        _steps_table,
    )
    for table in filter(None, (make(overview) for make in tables)):
        console.print(table)
        console.print()


def drawn_tokens(reports: Sequence[SourceReport], shares: Mapping[str, Share]) -> int:
    """Tokens that an epoch draws, a source that is not drawn whole at its mean length."""
    return round(
        sum(report.tokens / report.kept * shares[report.name].per_epoch for report in reports)
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _layout_table(overview: Overview) -> Table:
    layout = overview.layout
    # Ranks that share experts are tensor, context and data ranks, not ones beside these.
    experts = {} if overview.shape.experts is None else {"EP": str(layout.expert_size)}
    columns = ("workers", "TP", "PP", "CP", "DP", "SP", "tokens per pack", "device", *experts)
    table = _table("Layout", *columns)
    table.add_row(
        *map(
            str,
            (
                layout.world_size,
                layout.tensor_size,
                layout.pipeline_size,
                layout.context_size,
                layout.data_size,
                "on" if layout.sequence_parallel else "off",
                overview.pack_tokens,
                overview.config.parallel.device,
                *experts.values(),
            ),
        )
    )
    return table


def _model_table(overview: Overview) -> Table:
    shape = overview.shape
    table = _table("Model", "architecture", "parameters", "layers", "hidden", "dtype")
    parameters = f"{shape.num_parameters:,}"
    if shape.experts is not None:
        from roll_sft.models.moe.experts import num_active_parameters

        parameters += f", {num_active_parameters(shape):,} active"
    if overview.config.trains_part:
        from roll_sft.job.trained import num_trained

        trained = num_trained(overview.config, shape)
        parameters += f", {trained:,} trained ({100 * trained / shape.num_parameters:.2g} %)"
    table.add_row(
        shape.architecture,
        parameters,
        str(shape.num_layers),
        str(shape.hidden_size),
        overview.config.model.dtype,
    )
    return table


def _data_table(overview: Overview) -> Table:
    table = _table(f"Data{_guessed(overview)}", "source", "rows", "kept", "dropped", "tokens")
    for kind, report in _reports(overview):
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in report.dropped.items()) or "0"
        row = (_label(report, kind, "{} ({})"), f"{report.rows:,}", f"{report.kept:,}", dropped)
        table.add_row(*row, f"{report.tokens:,}")
    return table


def _samples_table(overview: Overview) -> Table:
    columns = ["samples of", "samples", "cut", "supervised", "p50 / p90 / p99 / max"]
    is_mixed = not all(share.is_whole for share in overview.shares.values())
    table = _table(f"Samples{_guessed(overview)}", *columns, *(["per epoch"] if is_mixed else []))
    for kind, report in _reports(overview):
        lengths = [report.length.get(key) for key in ("p50", "p90", "p99", "max")]
        cells = [
            _label(report, kind, "{}, {}"),
            f"{report.samples:,}",
            f"{report.truncated:,}",
            f"{report.supervised_share:.0%}",
            " / ".join("?" if length is None else f"{length:,}" for length in lengths),
        ]
        if is_mixed and kind == "train":
            cells.append(f"{overview.shares[report.name].per_epoch:,}")
        table.add_row(*cells)
    return table


def _dropped_table(overview: Overview) -> Table | None:
    """What was left out and where it is first; None where nothing was."""
    table = _table("Left out", "of", "what", "number", "the first at")
    for kind, report in _reports(overview):
        source = _label(report, kind, "{}, {}")
        for reason, number in report.dropped.items():
            places = "\n".join(report.dropped_places.get(reason, ()))
            table.add_row(source, f"{reason} rows", f"{number:,}", places)
        for reason, number in report.dropped_samples.items():
            table.add_row(source, f"{reason} samples of kept rows", f"{number:,}", "")
    return table if table.row_count else None


def _reports(overview: Overview) -> Iterator[tuple[str, SourceReport]]:
    for kind, reports in overview.reports.items():
        for report in reports:
            yield kind, report


def _label(report: SourceReport, kind: str, form: str) -> str:
    """A source and what it is for, once where both are one word."""
    return kind if report.name == kind else form.format(report.name, kind)


def _guessed(overview: Overview) -> str:
    return " (estimate)" if overview.is_estimate else ""


def _size(gib: float) -> str:
    """`gib` in the unit that shows it in two digits or more."""
    mib = gib * 1024
    return f"{gib:.1f} GiB" if gib >= 1 else f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


def _steps_table(overview: Overview) -> Table:
    train, per_epoch = overview.config.train, overview.steps_per_epoch
    memory = estimate(overview.config, overview.shape)
    table = _table("Plan", "what", "value")
    tokens = drawn_tokens(overview.reports["train"], overview.shares)
    epochs = overview.total_steps / per_epoch
    passes = "1 epoch" if epochs == 1 else f"{epochs:.3g} epochs"
    steps = f"{overview.total_steps:,} ({per_epoch:,} per epoch, {passes})"
    guessed = _guessed(overview)
    device = "worker" if overview.config.parallel.device == "cpu" else "GPU"
    batch = {"samples per step": f"{train.global_batch_size:,}"}
    if train.global_batch_tokens is not None:
        batch = {"tokens per step": f"{train.global_batch_tokens:,} and what completes a sample"}
    filled = {} if overview.fill is None else {"packs": f"{100 * overview.fill:.0f} % full"}
    rows = {
        f"optimizer steps{guessed}": steps,
        **batch,
        **filled,
        f"tokens per epoch{guessed}": f"{tokens:,}",
        f"tokens in the run{guessed}": f"{round(tokens * epochs):,}",
        "weights, gradients, optimizer": f"{_size(memory.state_gib)} per {device}",
        "activations (estimate)": f"{_size(memory.activations_gib)} per {device}",
        "head, or a layer's backward (estimate)": f"{_size(memory.moment_gib)} per {device}",
        "in all (estimate)": f"{_size(memory.total_gib)} per {device}",
        "host memory of a save": f"{_size(memory.save_host_gib)} per worker",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def first_steps(planner: Planner) -> list[StepPlan]:
    """The plans of the first steps, which say how full packs will be."""
    num_steps = min(_STEPS_SAMPLED, planner.steps_per_epoch)
    return [planner.step(step) for step in range(1, num_steps + 1)]


def expected_fill(plans: Sequence[StepPlan]) -> float:
    """Tokens in the packs of `plans`, over what these packs could hold."""
    return sum(plan.fill for plan in plans) / len(plans)


def warn_of_poor_fill(job: Job, plans: Sequence[StepPlan]) -> None:
    """Say once that packs will be half empty on many ranks, and what would fill them.

    A single rank waits for nobody, and a set that is one step has no larger one to offer.
    """
    data_size, pack_tokens = job.layout.data_size, micro_batch_tokens(job.config, job.layout)
    fill = expected_fill(plans)
    is_alone = data_size == 1 or job.planner.steps_per_epoch == 1
    if not job.config.data.packing or is_alone or fill >= _POOR_FILL:
        return
    lengths = job.data.train.lengths[[index for plan in plans for index in plan.sample_ids]]
    fewest = len(best_fit_decreasing(lengths.tolist(), capacity=pack_tokens))
    if lengths.sum() < _POOR_FILL * fewest * pack_tokens:
        remedy = "samples are long beside a pack, so raise train.micro_batch_tokens to join them"
    else:
        packs = -(-plans[0].total_tokens // (data_size * pack_tokens))
        wanted = int(_FILL_TO_AIM_AT * packs * data_size * pack_tokens)
        remedy = f"set train.global_batch_tokens={wanted}, or raise train.global_batch_size"
    _log.warning(
        "packs of %d tokens on %d data-parallel ranks will be %.0f %% full at %d tokens a step; %s",
        pack_tokens,
        data_size,
        100 * fill,
        plans[0].total_tokens,
        remedy,
    )
