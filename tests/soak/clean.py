"""Clean runs, one after the other: each ends with 0, and no line of it alarms anybody.

`--runs` is their number, `--seconds` ends them sooner.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from tests.leftovers import check_nothing_left
from tests.parity import write_model, write_rows
from tests.runtime.ray_cluster import Program
from tests.soak.stops import Runs

ALARMS = ("error", "warning", "died", "killed", "traceback", "failed")


def main(folder: Path, arguments: Sequence[str]) -> None:
    """Run and check."""
    parser = argparse.ArgumentParser(prog="make soak ARGS=clean")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3600.0)
    options = parser.parse_args(arguments)
    write_model(folder / "model", kind="qwen2-tied", num_layers=2)
    write_rows(folder / "rows.jsonl", num_rows=40)
    runs, ends, done = Runs(folder), time.monotonic() + options.seconds, 0
    while done < options.runs and time.monotonic() < ends:
        name = f"run_{done:02d}"
        began = time.monotonic()
        program = runs.start(name)
        try:
            assert program.wait(timeout_s=600) == 0, program.errors
        finally:
            program.close()
        assert alarms(program) == [], alarms(program)
        check_nothing_left(folder / name)
        done += 1
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    print(f"{done} of {options.runs} clean runs ended with 0 and without an alarm")
    assert done, "no run ended in time"


def alarms(program: Program) -> list[str]:
    """The lines of a program that speak of something bad."""
    lines = [*program.output.splitlines(), *program.errors.splitlines()]
    return [line for line in lines if any(word in line.lower() for word in ALARMS)]
