"""A training step on one GPU: model FLOPs, packed against unpadded, against bare torch, and idle.

    make bench-gpu ARGS="--out FOLDER"

Floors 0 to 2 through torchrun, no Ray. Qwen2.5's shapes in bf16 on packs of 8,192 tokens, 7B with
as many layers as fit; FLOPs are causal and of each document alone, over the peak of a large matmul
measured in the same run. One JSON line a measure; FOLDER gets the kernels of a step by time. What
has not begun when the budget is spent is left out by name. `--device cpu` tries the script itself.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from transformers import Qwen2Config, Qwen2ForCausalLM

from roll_sft.config import layout_of, plain_config
from roll_sft.data.packing import CostModel
from roll_sft.data.plan import Planner, PlanOptions, StepPlan
from roll_sft.engine.engine import Engine
from roll_sft.engine.inputs import ModelSource, TokenData
from roll_sft.engine.parallel import Rendezvous, process_groups
from roll_sft.layout import ParallelLayout
from roll_sft.metrics import flops_per_step
from roll_sft.models.registry import family_of

# Hidden, ffn, layers, heads, key-value heads, tied, and the share of the measured peak to reach.
SHAPES = {
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, True, 0.35),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, True, 0.45),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2, True, 0.48),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, False, 0.52),
}
TINY = {"tiny": (64, 128, 2, 4, 2, True, 0.0)}
STATE_BYTES, ROOM = 18, 0.7  # of a parameter in Megatron's mixed precision; of the device, for them
PACK_TOKENS, PACKS, WARM_UP, STEPS = 8192, 4, 3, 5


class Tokens:
    """Samples of random tokens, of the given lengths, the second half of each supervised."""

    def __init__(self, lengths: NDArray[np.int32], vocab_size: int) -> None:
        self.lengths, self.supervised = lengths, (lengths // 2).astype(np.int32)
        self._vocab_size = vocab_size

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Token ids and label mask of sample `index`."""
        length, draw = int(self.lengths[index]), np.random.default_rng(index)
        mask = np.zeros(length, np.uint8)
        mask[length - 1 - int(self.supervised[index]) : length - 1] = 1
        return draw.integers(0, self._vocab_size, length, dtype=np.int32), mask


class Weights:
    """Random weights, made quickly: one block of numbers again and again."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02

    def names(self) -> frozenset[str]:
        """All of the family's."""
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor `name`."""
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, float32."""
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        count = int(np.prod(shape))
        return self._block.repeat(-(-count // len(self._block)))[:count].view(shape).clone()

    def read_slice(self, name: str, *, dim: int, start: int, stop: int) -> torch.Tensor:
        """Part of the tensor `name`."""
        return self.read(name).narrow(dim, start, stop - start)


class Bench:
    """What all measures share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.out = options.device, options.out
        self.is_gpu = options.device == "cuda"
        self.pack_tokens = PACK_TOKENS if self.is_gpu else 256
        self._ends = time.monotonic() + options.minutes * 60
        self.name = torch.cuda.get_device_name() if self.is_gpu else "cpu"
        self.peak_flops = _matmul_peak(8192 if self.is_gpu else 256)
        self.show("matmul_peak_tflops", self.peak_flops / 1e12, goal=None)

    def has_time(self, name: str) -> bool:
        """Whether `name` may begin; says so where it may not."""
        if time.monotonic() < self._ends:
            return True
        print(f"{name}: left out, the budget of minutes is spent", file=sys.stderr, flush=True)
        return False

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


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, help="folder for the table of kernels")
    options = parser.parse_args()
    store, rank, world_size = next(dist.rendezvous("env://"))
    rendezvous = Rendezvous("", 0, rank, world_size, 120.0, 600.0)
    with process_groups(rendezvous, ParallelLayout(1), device=options.device, store=store):
        bench = Bench(options)
        for name, numbers in (SHAPES if bench.is_gpu else TINY).items():
            if bench.has_time(name):
                _measure_shape(bench, name, numbers)
    return 0


def _measure_shape(bench: Bench, name: str, numbers: tuple[Any, ...]) -> None:
    config, goal = _config_of(numbers, bench), numbers[-1]
    family = family_of(config)
    shape = family.shape(config)
    facts = {"shape": name, "layers": config.num_hidden_layers, "pack_tokens": bench.pack_tokens}
    packed = Tokens(_log_normal(bench.pack_tokens), shape.vocab_size)
    even = Tokens(np.full(64, bench.pack_tokens, np.int32), shape.vocab_size)
    run = plain_config({"model": {"dtype": "bf16"}, "parallel": {"device": bench.device}})
    weights: Any = Weights(dict(family.hf_shapes(shape)))
    data: Any = TokenData(packed, {})  # type: ignore[arg-type]
    engine = Engine(run, source=ModelSource(family, shape, weights), data=data)
    plans = {
        kind: _planner(tokens, shape, run, batch=batch, cap=bench.pack_tokens)
        for kind, tokens, batch in (
            ("packed", packed, PACKS * bench.pack_tokens // 560),
            ("even", even, PACKS),
        )
    }
    flops_per_s = {}
    for kind, tokens in (("even", even), ("packed", packed)):
        engine._data = TokenData(tokens, {})  # type: ignore[arg-type]
        seconds, steps = _timed(engine, plans[kind])
        flops = sum(_flops(shape, tokens, step) for step in steps)
        flops_per_s[kind] = flops / seconds
        count = sum(step.total_tokens for step in steps)
        facts[f"{kind}_tokens_per_s"] = round(count / seconds)
    memory = torch.cuda.max_memory_allocated() / 2**30 if bench.is_gpu else None
    mfu = flops_per_s["packed"] / bench.peak_flops
    bench.show("mfu", mfu, goal=f">= {goal}", memory_gib=memory and round(memory, 1), **facts)
    ratio = flops_per_s["packed"] / flops_per_s["even"]
    bench.show("packed_over_unpadded", ratio, goal=">= 0.95", **facts)
    if bench.has_time(f"{name} profile"):
        _profile(bench, engine, plans["packed"], name)
    del engine
    if bench.is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if numbers[2] == config.num_hidden_layers and bench.has_time(f"{name} bare"):
        bare = _bare_flops_per_s(config, shape, packed, plans["packed"])
        ratio = bare / flops_per_s["packed"]
        bench.show("our_step_over_bare_torch", ratio, goal="<= 1", **facts)


def _config_of(numbers: tuple[Any, ...], bench: Bench) -> Qwen2Config:
    hidden, ffn, layers, heads, groups, tied, _goal = numbers
    words = 151_936 if bench.is_gpu else 1000
    if bench.is_gpu:
        layer = hidden * (2 * hidden + 2 * hidden * groups // heads + 3 * ffn)
        room = ROOM * torch.cuda.get_device_properties(0).total_memory / STATE_BYTES
        layers = min(layers, int((room - (1 if tied else 2) * words * hidden) / layer))
    return Qwen2Config(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=32_768,
        tie_word_embeddings=tied,
        architectures=["Qwen2ForCausalLM"],
    )


def _log_normal(longest: int) -> NDArray[np.int32]:
    draws = np.random.default_rng(0).lognormal(np.log(368), 1.05, 4000)
    return np.clip(draws, 16, longest).astype(np.int32)


def _planner(tokens: Tokens, shape: Any, run: Any, *, batch: int, cap: int) -> Planner:
    cost = CostModel.of(
        shape.num_matmul_parameters, num_layers=shape.num_layers, hidden_size=shape.hidden_size
    )
    options = PlanOptions(
        seed=0,
        global_batch_size=max(1, batch),
        shuffle=True,
        packing=True,
        micro_batch_tokens=cap,
        layout=layout_of(run.parallel),
        cost=cost,
    )
    return Planner(tokens.lengths, tokens.supervised, options=options)


def _flops(shape: Any, tokens: Tokens, plan: StepPlan) -> float:
    return flops_per_step(
        num_matmul_parameters=shape.num_matmul_parameters,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        lengths=tokens.lengths[list(plan.sample_ids)].tolist(),
    )


def _run_steps(engine: Engine, planner: Planner, steps: range) -> list[StepPlan]:
    plans = [planner.step(step) for step in (*steps, steps[-1] + 1)]
    for plan, following in itertools.pairwise(plans):
        engine.train_step(plan.work_for(0, learning_rate=1e-5, following=following))
    return plans[:-1]


def _timed(engine: Engine, planner: Planner) -> tuple[float, list[StepPlan]]:
    """Seconds of some steps after the warm-up, the device's work included."""
    _run_steps(engine, planner, range(1, 1 + WARM_UP))
    _wait()
    started = time.perf_counter()
    plans = _run_steps(engine, planner, range(1 + WARM_UP, 1 + WARM_UP + STEPS))
    _wait()
    return time.perf_counter() - started, plans


def _profile(bench: Bench, engine: Engine, planner: Planner, name: str) -> None:
    """The share of some steps in which no kernel runs, and their kernels by time in a file."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.is_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        _run_steps(engine, planner, range(20, 23))
        _wait()
    if bench.out is not None:
        bench.out.mkdir(parents=True, exist_ok=True)
        key = "self_cuda_time_total" if bench.is_gpu else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=80)
        (bench.out / f"kernels_{name}.txt").write_text(table, encoding="utf-8")
    if bench.is_gpu:
        spans = sorted(_kernel_spans(profile))
        busy, end = 0.0, spans[0][0]
        for first, last in spans:
            busy += max(0.0, last - max(first, end))
            end = max(end, last)
        idle = 1 - busy / (end - spans[0][0])
        bench.show("gpu_idle", idle, goal="<= 0.02", shape=name)


def _kernel_spans(profile: Any) -> Iterator[tuple[float, float]]:
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            yield event.time_range.start, event.time_range.end


def _bare_flops_per_s(config: Any, shape: Any, tokens: Tokens, planner: Planner) -> float:
    """Transformers with torch's compiler on the same packs: attention by SDPA and positions."""
    device = torch.device(torch.cuda.current_device())
    with _default_dtype(torch.bfloat16), torch.device(device):
        bare = Qwen2ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-5, fused=True)
    model: Callable[..., Any] = torch.compile(bare, dynamic=True) if device.type == "cuda" else bare

    def step(plan: StepPlan) -> None:
        for ids in plan.ranks[0]:
            parts = [torch.from_numpy(tokens.sample(index)[0].astype(np.int64)) for index in ids]
            positions = torch.cat([torch.arange(len(part)) for part in parts])[None].to(device)
            ids_T = torch.cat(parts)[None].to(device)
            model(input_ids=ids_T, position_ids=positions, labels=ids_T).loss.backward()
        torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    plans = [planner.step(number) for number in range(1, 1 + WARM_UP + STEPS)]
    for plan in plans[:WARM_UP]:
        step(plan)
    _wait()
    started = time.perf_counter()
    for plan in plans[WARM_UP:]:
        step(plan)
    _wait()
    seconds = time.perf_counter() - started
    return sum(_flops(shape, tokens, plan) for plan in plans[WARM_UP:]) / seconds


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
