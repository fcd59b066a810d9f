"""The lines of the table, and what is behind them."""

from roll_sft.job.memory import GIB, stage_estimate
from roll_sft.models.source import family_of
from tools.fake_gpu.cases import Case
from tools.fake_gpu.checks import findings
from tools.fake_gpu.step import Measured, Rank
from tools.fake_gpu.waits import raiser

HEADER = (
    f"{'':45s} {'a layer and pack':>18s} {'a step':>16s} {'collectives':>17s} {'waits':>5s}"
    f" {'peak, estimate GiB':>22s}\n"
    f"{'':45s} {'kernels':>8s} {'GB':>9s} {'kernels':>7s} {'GB':>8s} {'number':>8s} {'GB':>8s}"
)
COSTS = (
    f"{'':36s} {'forward, backward':>18s} {'update':>18s} {'exchanges':>18s}\n"
    f"{'without':36s} {'kernels':>8s} {'GB':>9s} {'kernels':>8s} {'GB':>9s} {'number':>8s}"
    f" {'most GB':>9s} {'waits':>6s} {'peak GiB':>9s}"
)


def checked(rank: Rank, case: Case, *, verbose: bool) -> tuple[str, list[str]]:
    """The line of `case`, and a line for each fault."""
    config, shape = case.config(), family_of(case.model()).shape(case.model())
    try:
        measured, small = rank.measure(case), rank.measure(case.one_layer())
    # What fake tensors refuse: devices that differ, shapes that do not fit, sizes by value.
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        fault = f"{type(error).__name__}: {reason} (in {raiser(error)})"
        return f"{case.name:45s} stopped", [fault]
    estimate = stage_estimate(config, shape, stage=case.stage)
    faults = findings(case, measured, estimate)
    kernels, num_bytes = _of_layer(measured, small)
    total = measured.passes, measured.update
    line = (
        f"{case.name:45s} {kernels:8.1f} {num_bytes / 1e9:9.3f}"
        f" {sum(each.kernels for each in total):7d}"
        f" {sum(each.kernel_bytes for each in total) / 1e9:8.1f}"
        f" {sum(each.collectives for each in total):8d}"
        f" {sum(each.collective_bytes for each in total) / 1e9:8.2f} {len(measured.waits):5d}"
        f" {measured.peak_bytes / GIB:7.2f} {estimate.total_gib:7.2f}"
        f" {measured.peak_bytes / GIB / estimate.total_gib - 1:+6.1%}"
    )
    if verbose:
        line = "\n".join([line, *_details(measured)])
    return line, faults


def costs(title: str, measured: Measured) -> str:
    """A line of what a step costs, in the columns of `COSTS`."""
    parts = measured.passes, measured.update
    return (
        f"{title:36s} {measured.passes.kernels:8d} {measured.passes.kernel_bytes / 1e9:9.1f}"
        f" {measured.update.kernels:8d} {measured.update.kernel_bytes / 1e9:9.1f}"
        f" {sum(each.collectives for each in parts):8d}"
        f" {max(each.largest_collective for each in parts) / 1e9:9.2f}"
        f" {len(measured.waits):6d} {measured.peak_bytes / GIB:9.2f}"
    )


def _of_layer(measured: Measured, small: Measured) -> tuple[float, float]:
    """Kernels of a layer and pack, forward and backward, and the bytes that they move."""
    times = (measured.num_layers - small.num_layers) * measured.num_packs
    kernels = measured.passes.kernels - small.passes.kernels
    num_bytes = measured.passes.kernel_bytes - small.passes.kernel_bytes
    return kernels / times, num_bytes / times


def _details(measured: Measured) -> list[str]:
    lines = []
    for title, counts in (("passes", measured.passes), ("update", measured.update)):
        by_bytes = sorted(counts.by_name.items(), key=lambda each: -each[1][1])
        lines += [
            f"    {title}: {number:6d} x {name}, {num_bytes / 1e9:.2f} GB"
            for name, (number, num_bytes) in by_bytes
            if num_bytes > 1e7
        ]
    lines += [
        f"    at the peak: {num_bytes / GIB:6.2f} GiB of {name} in {place}"
        for (name, place), num_bytes in measured.at_peak.most_common()
        if num_bytes > 1e7
    ]
    return lines
