"""How a run's costs grow with workers and rows, by the code's own planner and serializers.

    python benchmarks/growth.py

Nothing is trained: plans are made, messages and indices are serialized, with arrays of random
lengths. Eight samples a data rank and step; CPU time on this machine, one thread.
"""

import argparse
import dataclasses
import io
import json
import pickle
import statistics
import time
import tracemalloc

import numpy as np
from numpy.typing import NDArray
from shared import measures

from roll_sft.base.layout import ParallelLayout
from roll_sft.checkpoint.tensors import Chunk
from roll_sft.data.steps.packing import CostModel
from roll_sft.data.steps.plan import Planner, PlanOptions

RANKS = (2, 16, 64, 256, 1024, 4096)
ROWS = (1000, 100_000, 10_000_000, 100_000_000)
SAMPLES_A_RANK = 8
TENSORS_A_RANK = 4 * 12  # weights, masters and two moments of the tensors of one layer's share


def main() -> None:
    """Prints one JSON line for each size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.parse_args()
    for ranks in RANKS:
        _print(_workers(ranks))
    for rows in ROWS[: 3 if measures.QUICK else None]:
        _print(_rows(rows))


def _print(line: dict[str, object]) -> None:
    line = {**line, "quick": measures.QUICK}
    print(json.dumps(line), flush=True)
    measures.keep(line)


def _workers(ranks: int) -> dict[str, object]:
    """Plan, messages, records and index of a step over so many data ranks."""
    lengths = _lengths(max(100_000, 8 * ranks * SAMPLES_A_RANK))
    planner = _planner(lengths, ranks=ranks)
    planner.step(1)
    plans_s = []
    for step in range(2, 7):
        started = time.process_time()
        plan = planner.step(step)
        plans_s.append(time.process_time() - started)
    plan_s = statistics.median(plans_s)
    started = time.process_time()
    messages = [pickle.dumps(plan.work_for(rank, learning_rate=1e-5)) for rank in range(ranks)]
    messages_s = time.process_time() - started
    chunks = [
        Chunk(f"tensor.{t}", "float32", (64, 4096, 4096), (0, r, 0), (1, 1, 4096), "f", 0, 1, 0)
        for r in range(ranks)
        for t in range(TENSORS_A_RANK)
    ]
    started, text = time.process_time(), io.StringIO()
    json.dump([dataclasses.astuple(chunk) for chunk in chunks], text)
    return {
        "name": f"growth_{ranks}_ranks",
        "ranks": ranks,
        "plan_ms": round(1e3 * plan_s, 2),
        "messages_ms": round(1e3 * messages_s, 2),
        "message_bytes": max(map(len, messages)),
        "index_ms": round(1e3 * (time.process_time() - started), 1),
        "index_mib": round(len(text.getvalue()) / 2**20, 2),
    }


def _rows(rows: int) -> dict[str, object]:
    """A planner and its first step over so many rows."""
    lengths = _lengths(rows)
    tracemalloc.start()
    started = time.process_time()
    planner = _planner(lengths, ranks=64)
    planner.step(1)
    first_s = time.process_time() - started
    started = time.process_time()
    planner.step(2)
    next_s = time.process_time() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "name": f"growth_{rows}_rows",
        "rows": rows,
        "first_plan_s": round(first_s, 3),
        "next_plan_ms": round(1e3 * next_s, 2),
        "bytes_a_row": round((peak + 2 * lengths.nbytes) / rows, 1),
    }


def _lengths(size: int) -> NDArray[np.int32]:
    draws = np.random.default_rng(0).lognormal(np.log(368), 1.05, size)
    return np.clip(draws, 2, 8192).astype(np.int32)


def _planner(lengths: NDArray[np.int32], *, ranks: int) -> Planner:
    options = PlanOptions(
        seed=1,
        global_batch_size=ranks * SAMPLES_A_RANK,
        shuffle=True,
        packing=True,
        micro_batch_tokens=8192,
        layout=ParallelLayout(ranks),
        cost=CostModel(70_450.0),
    )
    return Planner(lengths, lengths, options=options)


if __name__ == "__main__":
    main()
