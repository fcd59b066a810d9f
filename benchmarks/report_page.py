"""The report of a run of 5,000 steps: seconds of the command, and the size of its page.

    python benchmarks/report_page.py

The command is started as a user does, in a new process, on made-up files of a run with eight
experts, evaluations, samples and packs. CPU time of the process and its children, so that what else
runs on the machine does not count.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from shared import measures

STEPS = measures.size(5_000, quick=500)
PACKAGES = ("matplotlib", "numpy", "jinja2")


def main() -> None:
    """Measures and prints two JSON lines."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.report.made_run import make_run

    with tempfile.TemporaryDirectory() as name:
        run = make_run(Path(name) / "run", num_steps=STEPS, experts=8)
        seconds = [_cpu_seconds(run) for _ in range(measures.pairs(5))]
        size = (run / "report.html").stat().st_size / 1e6
    denominator = f"one second of CPU time; {STEPS:,} steps, one run"
    measures.show(
        "report_seconds", seconds, goal="<= 2", denominator=denominator, packages=PACKAGES
    )
    measures.show(
        "report_megabytes",
        [size],
        goal="<= 3",
        denominator=f"one megabyte; {STEPS:,} steps, one run",
        packages=PACKAGES,
    )


def _cpu_seconds(run: Path) -> float:
    before = os.times()
    command = [sys.executable, "-m", "roll_sft.report.command", str(run)]
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    return (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )


if __name__ == "__main__":
    main()
