"""What a million rows cost a run that trains on them: the time of a step, the driver's memory.

    python benchmarks/large_data.py [--rows 1000000]

The step is `Engine.train_step` of a small model on one rank, on the same number of tokens from a
large set and from one of a thousand rows, in CPU seconds; blocks are interleaved. Memory is what a
new process holds of its own (RssAnon) with the large set open and its first step planned, above
what it held before; the tokens themselves are mapped from the cache.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpu_throughput
import numpy as np
import warm_start
from shared import measures

from roll_sft.base.layout import ParallelLayout
from roll_sft.data.steps.packing import CostModel
from roll_sft.data.steps.plan import Planner, PlanOptions

FEW, STEPS = 1000, measures.size(12, quick=4)
PACKAGES = ("numpy", "torch", "megatron-core")


def main() -> None:
    """Measures and prints one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=measures.size(1_000_000, quick=20_000))
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(_memory(*map(Path, options.memory)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cpu_throughput.write_model(folder)
        few, many = folder / "few.jsonl", folder / "many.jsonl"
        warm_start.write_rows(few, FEW)
        warm_start.write_rows(many, options.rows)
        time.sleep(warm_start.SETTLED_S)
        sets = [warm_start.token_set(folder, path) for path in (few, many)]
        with cpu_throughput.engine_of(folder) as (engine, _):
            blocks = [_steps(engine, tokens) for tokens in sets]
            for block in blocks:
                block()
            pairs = [[block() for block in blocks] for _ in range(measures.pairs(7))]
        command = [sys.executable, __file__, "--memory", str(folder), str(many)]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    measures.show(
        "step_time_growth",
        [many_s / few_s for few_s, many_s in pairs],
        goal="<= 1.02",
        denominator=f"the same with {FEW} rows",
        packages=PACKAGES,
        rows=options.rows,
    )
    measures.show(
        "driver_bytes_a_row",
        [int(found) / options.rows],
        goal="<= 64",
        denominator="one byte of the driver's own memory for each row",
        packages=PACKAGES,
        rows=options.rows,
    )


def _planner(tokens: Any) -> Planner:
    options = PlanOptions(
        seed=1,
        global_batch_size=8,
        shuffle=True,
        packing=True,
        micro_batch_tokens=2048,
        layout=ParallelLayout(1),
        cost=CostModel(20_000.0),
    )
    return Planner(tokens.lengths, tokens.supervised, options=options)


def _steps(engine: Any, tokens: Any) -> Callable[[], float]:
    """CPU seconds per token of the next optimizer steps on `tokens`, plans included."""
    planner, first = _planner(tokens), [1]
    engine_data = dataclasses.replace(engine._data, train=tokens)

    def run() -> float:
        engine._data = engine_data
        started, total = time.process_time(), 0
        for step in range(first[0], first[0] + STEPS):
            plan = planner.step(step)
            total += plan.total_tokens
            engine.train_step(plan.work_for(0, learning_rate=1e-5))
        first[0] += STEPS
        return (time.process_time() - started) / total

    return run


def _memory(folder: Path, path: Path) -> int:
    np.zeros(1 << 20).sum()
    before = _own_bytes()
    tokens = warm_start.token_set(folder, path)
    planner = _planner(tokens)
    planner.step(1)
    return _own_bytes() - before


def _own_bytes() -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in text.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    main()
