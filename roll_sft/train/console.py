"""What a run will do, as tables: layout, model, data, steps, memory."""

from collections.abc import Iterator

from rich.table import Table

from roll_sft.data.tokens.report import SourceReport
from roll_sft.job.memory import MemoryEstimate, estimate
from roll_sft.job.prepare import Plan, drawn_tokens
from roll_sft.train.terminal import stdout_console


def show_plan(plan: Plan) -> None:
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
    for table in filter(None, (make(plan) for make in tables)):
        console.print(table)
        console.print()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _layout_table(plan: Plan) -> Table:
    layout = plan.layout
    table = _table("Layout", "workers", "TP", "PP", "CP", "DP", "SP", "tokens per pack", "device")
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
                plan.pack_tokens,
                plan.config.parallel.device,
            ),
        )
    )
    return table


def _model_table(plan: Plan) -> Table:
    shape = plan.shape
    table = _table("Model", "architecture", "parameters", "layers", "hidden", "dtype")
    table.add_row(
        shape.architecture,
        f"{shape.num_parameters:,}",
        str(shape.num_layers),
        str(shape.hidden_size),
        plan.config.model.dtype,
    )
    return table


def _data_table(plan: Plan) -> Table:
    table = _table(f"Data{_guessed(plan)}", "source", "rows", "kept", "dropped", "tokens")
    for kind, report in _reports(plan):
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in report.dropped.items()) or "0"
        row = (_label(report, kind, "{} ({})"), f"{report.rows:,}", f"{report.kept:,}", dropped)
        table.add_row(*row, f"{report.tokens:,}")
    return table


def _samples_table(plan: Plan) -> Table:
    columns = ["samples of", "samples", "cut", "supervised", "p50 / p90 / p99 / max"]
    is_mixed = not all(share.is_whole for share in plan.shares.values())
    table = _table(f"Samples{_guessed(plan)}", *columns, *(["per epoch"] if is_mixed else []))
    for kind, report in _reports(plan):
        lengths = [report.length.get(key) for key in ("p50", "p90", "p99", "max")]
        cells = [
            _label(report, kind, "{}, {}"),
            f"{report.samples:,}",
            f"{report.truncated:,}",
            f"{report.supervised_share:.0%}",
            " / ".join("?" if length is None else f"{length:,}" for length in lengths),
        ]
        if is_mixed and kind == "train":
            cells.append(f"{plan.shares[report.name].per_epoch:,}")
        table.add_row(*cells)
    return table


def _dropped_table(plan: Plan) -> Table | None:
    """What was left out and where it is first; None where nothing was."""
    table = _table("Left out", "of", "what", "number", "the first at")
    for kind, report in _reports(plan):
        source = _label(report, kind, "{}, {}")
        for reason, number in report.dropped.items():
            places = "\n".join(report.dropped_places.get(reason, ()))
            table.add_row(source, f"{reason} rows", f"{number:,}", places)
        for reason, number in report.dropped_samples.items():
            table.add_row(source, f"{reason} samples of kept rows", f"{number:,}", "")
    return table if table.row_count else None


def _reports(plan: Plan) -> Iterator[tuple[str, SourceReport]]:
    for kind, reports in plan.reports.items():
        for report in reports:
            yield kind, report


def _label(report: SourceReport, kind: str, form: str) -> str:
    """A source and what it is for, once where both are one word."""
    return kind if report.name == kind else form.format(report.name, kind)


def _guessed(plan: Plan) -> str:
    return " (estimate)" if plan.is_rough else ""


def _size(gib: float) -> str:
    """`gib` in the unit that shows it in two digits or more."""
    mib = gib * 1024
    return f"{gib:.1f} GiB" if gib >= 1 else f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


def _steps_table(plan: Plan) -> Table:
    train, per_epoch = plan.config.train, plan.steps_per_epoch
    memory: MemoryEstimate = estimate(plan)
    table = _table("Plan", "what", "value")
    tokens = drawn_tokens(plan.reports["train"], plan.shares)
    epochs = plan.total_steps / per_epoch
    passes = "1 epoch" if epochs == 1 else f"{epochs:.3g} epochs"
    steps = f"{plan.total_steps:,} ({per_epoch:,} per epoch, {passes})"
    guessed = _guessed(plan)
    device = "worker" if plan.config.parallel.device == "cpu" else "GPU"
    batch = {"samples per step": f"{train.global_batch_size:,}"}
    if train.global_batch_tokens is not None:
        batch = {"tokens per step": f"{train.global_batch_tokens:,} and what completes a sample"}
    filled = {} if plan.fill is None else {"packs": f"{100 * plan.fill:.0f} % full"}
    rows = {
        f"optimizer steps{guessed}": steps,
        **batch,
        **filled,
        f"tokens per epoch{guessed}": f"{tokens:,}",
        f"tokens in the run{guessed}": f"{round(tokens * epochs):,}",
        "weights, gradients, optimizer": f"{_size(memory.state_gib)} per {device}",
        "activations (estimate)": f"{_size(memory.activations_gib)} per {device}",
        "head and loss (estimate)": f"{_size(memory.head_gib)} per {device}",
        "in all (estimate)": f"{_size(memory.total_gib)} per {device}",
        "host memory of a save": f"{_size(memory.save_host_gib)} per worker",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
