"""The layouts that a model can have on a number of GPUs, with the memory and the time of each.

Each layout appears once, with the recomputation and the virtual stages that suit it best. Memory is
estimated by `job.memory`, time by `job.step_time`.
"""

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from roll_sft.base.layout import ParallelLayout
from roll_sft.config.schema import ParallelConfig, RecomputeModule, RunConfig, layout_of
from roll_sft.job.job import micro_batch_tokens
from roll_sft.job.memory import MemoryEstimate, estimate
from roll_sft.job.model import model_problems
from roll_sft.job.step_time import Machine, StepTime, Work, micro_batches, step_time
from roll_sft.models.shape import ModelShape

# Megatron-Core's guide to parallelism: context parallelism is for samples of 8K tokens and more.
LEAST_CONTEXT_TOKENS = 4096  # that the longest sample leaves to each context rank
TIE = 1.05  # the estimate tells no two times apart that are closer
OVERHEAD_GIB = 5.0  # of CUDA's context, NCCL's buffers and fragments, which no estimate counts
MOST_AXES = 5
# From what costs least to what frees most.
RECOMPUTE: tuple[Literal["none", "full"] | list[RecomputeModule], ...] = (
    "none",
    ["core_attn", "layernorm"],
    ["core_attn", "mlp", "layernorm"],
    "full",
)
DEGREES = (
    "num_workers",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "sequence_parallel",
    "device",
)


@dataclass(frozen=True, slots=True)
class Gpus:
    """What layouts are wanted for."""

    number: int
    memory_gib: float  # of each
    per_node: int

    @property
    def room_gib(self) -> float:
        """What an estimate may come to."""
        return self.memory_gib - OVERHEAD_GIB


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout with its recomputation, and what it would take."""

    config: RunConfig
    layout: ParallelLayout
    memory: MemoryEstimate
    time: StepTime
    micro_batches: int  # of a data rank in a step

    @property
    def degrees(self) -> str:
        """Such as TP2 PP1 CP1 DP4."""
        sizes = {
            "TP": self.layout.tensor_size,
            "PP": self.layout.pipeline_size,
            "CP": self.layout.context_size,
            "DP": self.layout.data_size,
            **({"EP": self.layout.expert_size} if self.layout.expert_size > 1 else {}),
        }
        return " ".join(f"{axis}{size}" for axis, size in sizes.items())

    @property
    def axes(self) -> tuple[str, ...]:
        """What it needs beside data parallelism; each is one more thing to get right."""
        layout = self.layout
        used = {
            "tensor": layout.tensor_size > 1,
            "pipeline": layout.pipeline_size > 1,
            "virtual stages": layout.virtual_size > 1,
            "context": layout.context_size > 1,
            "expert": layout.expert_size > 1,
            "recomputation": self.config.train.recompute != "none",
        }
        return tuple(axis for axis, is_used in used.items() if is_used)

    def overrides(self, given: RunConfig) -> str:
        """What the command line of `given` needs besides, for this layout."""
        values = {
            **{f"parallel.{name}": _pair(name, self.config, given) for name in DEGREES},
            "train.recompute": (self.config.train.recompute, given.train.recompute),
        }
        return " ".join(
            shlex.quote(f"{name}={shown_value(value)}")
            for name, (value, before) in values.items()
            if value != before
        )


def shown_value(value: object) -> str:
    """`value` as a command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value).lower()


def _pair(name: str, config: RunConfig, given: RunConfig) -> tuple[object, object]:
    return getattr(config.parallel, name), getattr(given.parallel, name)


def candidates(
    config: RunConfig, shape: ModelShape, work: Work, gpus: Gpus
) -> tuple[Candidate, ...]:
    """Every layout that can run, best first.

    First those that fit: of those within `TIE` of the quickest the one of the fewest axes, the
    others by time. Then the rest, by memory.
    """
    every = list(variants(config, shape, work, gpus))
    quickest_s = min((each.time.total_s for each in every if fits(each, gpus)), default=0.0)

    def order(each: Candidate) -> tuple[bool, int, float]:
        if not fits(each, gpus):
            return True, 0, each.memory.total_gib
        is_tie = each.time.total_s <= TIE * quickest_s
        return False, len(each.axes) if is_tie else MOST_AXES + 1, each.time.total_s

    best: dict[str, Candidate] = {}
    for each in sorted(every, key=order):
        best.setdefault(each.degrees, each)
    return tuple(best.values())


def fits(candidate: Candidate, gpus: Gpus) -> bool:
    """Whether the memory that `candidate` is estimated to need is there."""
    return candidate.memory.total_gib <= gpus.room_gib


def refusals(config: RunConfig, shape: ModelShape, gpus: Gpus) -> list[str]:
    """Why the model cannot have some of the degrees at all, each reason once."""
    problems = (
        problem
        for parallel in splits(config, shape, gpus)
        if parallel.virtual_pipeline_model_parallel_size is None
        for problem in model_problems(replace(config, parallel=parallel), shape)
    )
    return list(dict.fromkeys(problems))


def variants(config: RunConfig, shape: ModelShape, work: Work, gpus: Gpus) -> Iterator[Candidate]:
    """Every layout that can run, with and without recomputation and virtual stages."""
    machine = Machine(gpus_per_node=gpus.per_node)
    for parallel in splits(config, shape, gpus):
        layout = layout_of(parallel)
        for recompute in RECOMPUTE:
            train = replace(config.train, recompute=recompute)
            asked = replace(config, parallel=parallel, train=train)
            if any(model_problems(asked, shape)):
                continue
            packed = replace(work, pack_tokens=micro_batch_tokens(asked, layout))
            yield Candidate(
                config=asked,
                layout=layout,
                memory=estimate(asked, shape),
                time=step_time(shape, layout, packed, recompute=recompute, machine=machine),
                micro_batches=micro_batches(packed, layout),
            )


def splits(config: RunConfig, shape: ModelShape, gpus: Gpus) -> Iterator[ParallelConfig]:
    """Degrees that divide the GPUs, and the experts; tensor ranks share a node, as Ray places them.

    Sequence parallelism is on: it exchanges no more, and cuts what tensor ranks else hold alike.
    """
    most_context = max(1, config.data.sequence_length // LEAST_CONTEXT_TOKENS)
    for tensor in _divisors(min(gpus.per_node, gpus.number)):
        for stages in _divisors(gpus.number // tensor):
            for context in _divisors(gpus.number // tensor // stages):
                if context > most_context:
                    break
                num_experts = shape.experts.num_experts if shape.experts else 1
                for experts in _divisors(math.gcd(num_experts, gpus.number // stages)):
                    for virtual in (None, 2) if stages > 1 else (None,):
                        yield replace(
                            config.parallel,
                            num_workers=gpus.number,
                            tensor_model_parallel_size=tensor,
                            pipeline_model_parallel_size=stages,
                            virtual_pipeline_model_parallel_size=virtual,
                            context_parallel_size=context,
                            expert_model_parallel_size=experts,
                            sequence_parallel=tensor > 1,
                        )


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
