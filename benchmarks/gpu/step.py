"""A training step on one GPU: model FLOPs, memory, packed against unpadded and bare torch, idle.

    make bench-gpu ARGS="--out FOLDER"

Floors 0 to 2 through torchrun, no Ray. Qwen2.5's shapes in bf16 on packs of 8,192 tokens, 7B with
as many layers as fit; FLOPs are causal and of each document alone, over the peak of a large matmul
measured in the same run; `mfu_of_computed` leaves out the head of tokens without a label, which we
do not run. One JSON line a measure, also in FOLDER, which gets the kernels of a step by time. What
there is no time to begin, or no room for, is left out by name. `--device cpu` tries the script.
"""

import argparse
import gc
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bare
import numpy as np
import torch
import torch.distributed as dist
from models import SHAPES, TINY, Tokens, Weights, config_of, estimate_of, log_normal, run_of
from transformers import Qwen2Config

from roll_sft.base.layout import ParallelLayout
from roll_sft.base.metrics import StepMetrics, flops_per_step
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.data.steps.packing import CostModel
from roll_sft.data.steps.plan import Planner, PlanOptions, StepPlan
from roll_sft.data.tokens.cache import TokenData
from roll_sft.engine.engine import Engine
from roll_sft.engine.environment import set_variables
from roll_sft.engine.process_groups import Rendezvous, process_groups
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import ModelSource, family_of

LONGEST, PACK_TOKENS, PACKS, WARM_UP, STEPS = 8192, 8192, 4, 2, 4
# Seconds that each may take on a GPU, so that none is begun that would be cut off.
NEEDED_S = {"shape": 45, "profile": 10, "bare": 40}


class Bench:
    """What all measures share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.out = options.device, options.out
        self.is_gpu = options.device == "cuda"
        self.lacked_room = False
        self._ends = time.monotonic() + options.minutes * 60
        self.name = torch.cuda.get_device_name() if self.is_gpu else "cpu"
        self.memory_bytes = math.inf
        if self.is_gpu:
            self.memory_bytes = torch.cuda.get_device_properties(0).total_memory
        self.peak_flops = _matmul_peak(8192 if self.is_gpu else 256)
        self.show("matmul_peak_tflops", self.peak_flops / 1e12, goal=None)

    @contextmanager
    def part(self, name: str, kind: str) -> Iterator[bool]:
        """Whether there is time for `name`; says so where there is not, or no room in memory."""
        begins = time.monotonic() + (NEEDED_S[kind] if self.is_gpu else 0) < self._ends
        if not begins:
            print(f"{name}: left out, the budget of minutes is spent", file=sys.stderr, flush=True)
        try:
            yield begins
        except torch.OutOfMemoryError as error:
            self.lacked_room = True
            print(f"{name}: left out, {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        if self.is_gpu and kind != "profile":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def show(self, name: str, value: float, *, goal: str | None, **facts: object) -> None:
        """Print one measure."""
        sign, _, bound = (goal or "").partition(" ")
        holds = {
            "<=": lambda: value <= float(bound),
            ">=": lambda: value >= float(bound),
            "": lambda: None,
        }[sign]()
        line = {"name": name, "ratio": round(value, 4), "goal": goal, "holds": holds, **facts}
        line |= {"device": self.name, "torch": torch.__version__}
        print(json.dumps(line), flush=True)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "measures.jsonl").open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")


@dataclass(frozen=True)
class Measured:
    """Our step of one shape, for the peer to be compared with."""

    config: Qwen2Config
    shape: ModelShape
    tokens: Tokens
    planner: Planner
    flops_per_s: float
    facts: dict[str, object]


def main() -> int:
    """Measures and prints; 1 if the device had no room for something."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument(
        "--shapes", nargs="+", default=list(SHAPES), help="NAME, or NAME:TOKENS of a pack"
    )
    parser.add_argument("--no-peer", action="store_true", help="leave bare torch out")
    parser.add_argument("--out", type=Path, help="folder for the table of kernels")
    options = parser.parse_args()
    set_variables(deterministic=False)
    store, rank, world_size = next(dist.rendezvous("env://"))
    rendezvous = Rendezvous(0, rank, world_size, 120.0, 600.0)
    with process_groups(rendezvous, ParallelLayout(1), device=options.device, store=store):
        bench = Bench(options)
        # Ours first, of all shapes: a peer has meaning only beside it.
        measured = []
        for wanted in options.shapes if bench.is_gpu else TINY:
            name, _, pack_tokens = wanted.partition(":")
            with bench.part(wanted, "shape") as begins:
                if begins:
                    tokens = int(pack_tokens or (PACK_TOKENS if bench.is_gpu else 256))
                    measured.append(_measure(bench, name, tokens))
        for ours in [] if options.no_peer else measured:
            with bench.part(f"{ours.facts['shape']} bare", "bare") as begins:
                if begins:
                    _compare(bench, ours)
    return 1 if bench.lacked_room else 0


def _measure(bench: Bench, name: str, pack_tokens: int) -> Measured:
    """Prints the measures of our step of one shape."""
    numbers, longest = (SHAPES | TINY)[name], min(pack_tokens, LONGEST)
    run = run_of(bench.device, longest=longest, pack_tokens=pack_tokens)
    config = config_of(numbers, run, memory_bytes=bench.memory_bytes)
    family = family_of(config)
    shape = family.shape(config)
    packed = Tokens(log_normal(longest), shape.vocab_size)
    even = Tokens(np.full(256, longest, np.int32), shape.vocab_size)
    weights: Any = Weights(dict(family.hf_shapes(shape)))
    data: Any = TokenData(packed, {})  # type: ignore[arg-type]
    engine = Engine(run, source=ModelSource(shape, opened=weights), data=data)
    plans = {
        kind: _planner(tokens, shape, run, batch=batch)
        for kind, tokens, batch in (
            ("packed", packed, PACKS * pack_tokens // 560),
            ("even", even, PACKS * pack_tokens // longest),
        )
    }
    facts: dict[str, object] = {"shape": name, "layers": shape.num_layers, "of_layers": numbers[2]}
    facts["pack_tokens"] = pack_tokens
    flops_per_s, memory_gib = {}, 0.0
    for kind, tokens in (("even", even), ("packed", packed)):
        engine._data = TokenData(tokens, {})  # type: ignore[arg-type]
        seconds, steps, peak_gib = _timed(engine, plans[kind])
        memory_gib = max(memory_gib, peak_gib)
        flops_per_s[kind] = sum(_flops(shape, tokens, step) for step in steps) / seconds
        facts[f"{kind}_tokens_per_s"] = round(sum(step.total_tokens for step in steps) / seconds)
    mfu = flops_per_s["packed"] / bench.peak_flops
    # The head runs on supervised tokens alone, which model FLOPs do not know.
    spared = 6 * shape.vocab_size * shape.hidden_size
    spared *= sum(step.total_tokens - step.supervised_tokens for step in steps) / seconds
    facts["mfu_of_computed"] = round(mfu - spared / bench.peak_flops, 4)
    bench.show("mfu", mfu, goal=f">= {numbers[-1]}", **facts)
    ratio = flops_per_s["packed"] / flops_per_s["even"]
    bench.show("packed_over_unpadded", ratio, goal=">= 0.95", **facts)
    estimated = estimate_of(shape, run, shape.num_layers)
    if bench.is_gpu:
        parts: dict[str, object] = {
            "gib": round(memory_gib, 1),
            "estimate_gib": round(estimated.total_gib, 1),
        }
        ratio = memory_gib / estimated.total_gib
        parts |= {"shape": name, "pack_tokens": pack_tokens}
        bench.show("gpu_memory_over_estimate", ratio, goal="<= 1.05", **parts)
    with bench.part(f"{name} profile", "profile") as begins:
        if begins:
            _profile(bench, engine, plans["packed"], facts)
    return Measured(config, shape, packed, plans["packed"], flops_per_s["packed"], facts)


def _compare(bench: Bench, ours: Measured) -> None:
    """Prints the ratio of the peer's speed and ours, on the same packs."""
    plans = [ours.planner.step(number) for number in range(1, 1 + WARM_UP + STEPS)]
    seconds = bare.seconds_of(ours.config, ours.tokens, plans, warm_up=WARM_UP)
    flops = sum(_flops(ours.shape, ours.tokens, plan) for plan in plans[WARM_UP:])
    ratio = flops / seconds / ours.flops_per_s
    bench.show("our_step_over_bare_torch", ratio, goal="<= 1", **ours.facts)


def _planner(tokens: Tokens, shape: ModelShape, run: RunConfig, *, batch: int) -> Planner:
    cost = CostModel.of(
        shape.num_matmul_parameters,
        num_layers=shape.num_layers,
        attention_width=shape.attention_width,
    )
    options = PlanOptions(
        seed=0,
        global_batch_size=max(1, batch),
        shuffle=True,
        packing=True,
        micro_batch_tokens=run.train.micro_batch_tokens,
        layout=layout_of(run.parallel),
        cost=cost,
    )
    return Planner(tokens.lengths, tokens.supervised, options=options)


def _flops(shape: Any, tokens: Tokens, plan: StepPlan) -> float:
    return flops_per_step(
        num_matmul_parameters=shape.num_matmul_parameters,
        num_layers=shape.num_layers,
        attention_width=shape.attention_width,
        lengths=tokens.lengths[list(plan.sample_ids)].tolist(),
    )


def _run_steps(
    engine: Engine, planner: Planner, steps: range
) -> tuple[list[StepPlan], list[StepMetrics]]:
    plans = [planner.step(step) for step in (*steps, steps[-1] + 1)]
    reports = []
    for plan, following in itertools.pairwise(plans):
        work = plan.work_for(0, learning_rate=1e-5, following=following)
        reports.append(engine.train_step(work))
    return plans[:-1], [report for report in reports if report is not None]


def _timed(engine: Engine, planner: Planner) -> tuple[float, list[StepPlan], float]:
    """Seconds of some steps after the warm-up, the device's work included; their peak in GiB."""
    _run_steps(engine, planner, range(1, 1 + WARM_UP))
    _wait()
    started = time.perf_counter()
    plans, reports = _run_steps(engine, planner, range(1 + WARM_UP, 1 + WARM_UP + STEPS))
    _wait()
    # A step begins the peak anew, so that of the device itself is the last update's.
    peak_gib = max(report.peak_memory_gib for report in reports)
    return time.perf_counter() - started, plans, peak_gib


def _profile(bench: Bench, engine: Engine, planner: Planner, of: dict[str, object]) -> None:
    """The share of some steps in which no kernel runs; their kernels and host calls in files.

    The kernels' time is of a profiled run, and the steps' of one before it: a profiler slows the
    host, not the kernels.
    """
    steps = range(20, 22)
    _wait()
    started = time.perf_counter()
    _run_steps(engine, planner, steps)
    _wait()
    seconds = time.perf_counter() - started
    activities = {torch.profiler.ProfilerActivity.CPU}
    if bench.is_gpu:
        activities.add(torch.profiler.ProfilerActivity.CUDA)
        if bench.out is None:  # the host's calls take long to read, and only tables show them
            activities.remove(torch.profiler.ProfilerActivity.CPU)
    with torch.profiler.profile(activities=activities) as profile:
        _run_steps(engine, planner, steps)
        _wait()
    if bench.out is not None:
        averages = profile.key_averages()
        for kind in ("cuda", "cpu") if bench.is_gpu else ("cpu",):
            table = averages.table(
                sort_by=f"self_{kind}_time_total", row_limit=40, max_name_column_width=80
            )
            (bench.out / f"{kind}_{of['shape']}.txt").write_text(table, encoding="utf-8")
    if bench.is_gpu:
        spans = sorted(_kernel_spans(profile))
        busy, end = 0.0, spans[0][0]  # microseconds
        for first, last in spans:
            busy += max(0.0, last - max(first, end))
            end = max(end, last)
        facts: dict[str, object] = {
            "kernels": len(spans),
            "busy_s": round(busy / 1e6, 3),
            "s": round(seconds, 3),
        }
        facts |= {"shape": of["shape"], "pack_tokens": of["pack_tokens"]}
        idle = 1 - busy / 1e6 / seconds
        bench.show("gpu_idle", idle, goal="<= 0.02", **facts)


def _kernel_spans(profile: Any) -> Iterator[tuple[float, float]]:
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            yield event.time_range.start, event.time_range.end


def _matmul_peak(size: int) -> float:
    """FLOP/s of a large bf16 matmul, the best of some."""
    device = torch.device(torch.cuda.current_device())
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(5):
        _wait()
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        _wait()
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - started))
    return best


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
