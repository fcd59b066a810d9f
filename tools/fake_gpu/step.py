"""One rank of a case: its engine on fake tensors, and a step of it under the meter."""

from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch._subclasses.fake_tensor import unset_fake_temporarily

from roll_sft.config.schema import layout_of
from roll_sft.data.steps.packing import CostModel
from roll_sft.data.steps.plan import Planner, PlanOptions
from roll_sft.data.tokens.cache import TokenData
from roll_sft.engine import fused
from roll_sft.engine.adapters import lora
from roll_sft.engine.engine import Engine
from roll_sft.engine.micro_batch import MicroBatch
from roll_sft.engine.optimizer import make_optimizer_state
from roll_sft.engine.process_groups import Rendezvous, process_groups
from roll_sft.models.source import ModelSource, family_of
from tools.fake_gpu import device
from tools.fake_gpu.cases import PACK_TOKENS, Case, Tokens
from tools.fake_gpu.compiled import FakeCompiler
from tools.fake_gpu.live import LiveBytes
from tools.fake_gpu.meter import Counts, Meter
from tools.fake_gpu.waits import Wait, Waits

NORM_SQUARED = 4.0  # what the device answers; its root is above the norm that is clipped to


@dataclass(frozen=True, slots=True)
class Measured:
    """A step of one rank."""

    num_packs: int
    num_layers: int  # of the rank
    passes: Counts  # forward and backward of all packs, and the reduction of gradients
    update: Counts
    waits: tuple[Wait, ...]
    misplaced: tuple[str, ...]
    state_bytes: int  # that live between steps
    peak_bytes: int
    at_peak: Counter[tuple[str, str]]  # the bytes at the peak by operation and function


class FakeWeights:
    """Tensors of a model that hold nothing, on the host."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def names(self) -> frozenset[str]:
        """All of the family's."""
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor `name`."""
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, bfloat16."""
        return torch.empty(self._shapes[name], dtype=torch.bfloat16)

    def read_slice(self, name: str, *, dim: int, start: int, stop: int) -> torch.Tensor:
        """Part of the tensor `name`."""
        return self.read(name).narrow(dim, start, stop - start)


class Wire:
    """The values that come from elsewhere: shapes of other stages' tensors, and the loss."""

    def __init__(self) -> None:
        self.num_supervised = 0
        self._incoming: deque[list[int]] = deque()
        self._sent: deque[list[int]] = deque()
        self._answers: deque[list[int]] = deque()

    def begin(self, incoming: list[list[int]]) -> None:
        """A step in which stage before this one sends tensors of the shapes `incoming`."""
        self._incoming = deque(incoming)
        self._sent.clear()

    def exchange(self, *, sent: torch.Tensor | None, is_prev: bool, is_next: bool) -> None:
        """Shapes are about to be exchanged; the gradient of what is sent will have its shape."""
        if is_prev:
            self._answers.append(self._incoming.popleft())
        if sent is not None:
            self._sent.append(list(sent.shape))
        if is_next:
            self._answers.append(self._sent.popleft())

    def read(self, tensor: torch.Tensor, waits: Waits) -> list[Any]:
        """The values of a fake tensor: a shape, or the loss and how many tokens it is of."""
        if tensor.is_cuda:
            waits.add("tolist")
        if tensor.dtype == torch.int64:
            return self._answers.popleft()
        return [1.0, float(self.num_supervised)]


class Rank:
    """Runs cases one after another in this process; makes the process a fake one for good."""

    def __init__(self) -> None:
        self._meter, self._wire = Meter(Waits()), Wire()
        device.install(self._meter, lambda tensor: self._wire.read(tensor, self._meter.waits))
        device.fake_groups()
        self._feed_shapes()
        _find_rows_of_adapters()
        compiler: Any = FakeCompiler(self._meter)
        fused._compiled = compiler

    def measure(self, case: Case) -> Measured:
        """What a step of `case` does."""
        config = case.config()
        layout = layout_of(config.parallel)
        rendezvous = Rendezvous(0, case.rank, layout.world_size, 60.0, 60.0)
        tokens: Any = Tokens(case)
        family = family_of(case.model())
        shape = family.shape(case.model())
        store: Any = object()
        with (
            process_groups(rendezvous, layout, device="cuda", store=store),
            torch.autograd.set_multithreading_enabled(False),
            device.fake_mode(),
            self._meter,
        ):
            weights: Any = FakeWeights(dict(family.hf_shapes(shape)))
            self._meter.number = 0.0
            self._meter.live = LiveBytes()  # what an earlier case left does not count
            engine = Engine(
                config, source=ModelSource(shape, opened=weights), data=TokenData(tokens, {})
            )
            options = PlanOptions(
                seed=0,
                global_batch_size=case.samples_per_step,
                shuffle=True,
                packing=True,
                micro_batch_tokens=PACK_TOKENS,
                layout=layout,
                cost=CostModel.of(
                    shape.num_matmul_parameters,
                    num_layers=shape.num_layers,
                    attention_width=shape.attention_width,
                ),
            )
            planner = Planner(tokens.lengths, tokens.supervised, options=options)
            return self._steps(engine, planner, data_rank=layout.coordinate(case.rank).data_rank)

    def _steps(self, engine: Engine, planner: Planner, *, data_rank: int) -> Measured:
        meter = self._meter
        meter.number = NORM_SQUARED
        passes = Counts()
        accumulate = engine.accumulate_gradients

        def accumulate_gradients(batches: list[MicroBatch]) -> None:
            nonlocal passes
            config = engine._transformer
            shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
            self._wire.begin(
                [
                    [batch.pack.tokens_T.shape[1] // shards, 1, config.hidden_size]
                    for batch in batches
                ]
            )
            accumulate(batches)
            passes, meter.counts = meter.counts, Counts()

        engine.accumulate_gradients = accumulate_gradients  # type: ignore[method-assign]
        make_optimizer_state(engine.optimizer, step=0)  # else the first step would do so
        plan, following = planner.step(1), planner.step(2)
        work = plan.work_for(data_rank, learning_rate=1e-5, following=following)
        engine._ahead.begin(work.micro_batches)  # in a thread, where tensors are real
        self._wire.num_supervised = work.supervised_tokens
        meter.reset_counts()
        meter.live.begin_peak()
        state_bytes = meter.live.now
        engine.train_step(work)
        update, meter.counts = meter.counts, Counts()
        return Measured(
            num_packs=len(work.micro_batches),
            num_layers=sum(len(chunk.decoder.layers) for chunk in engine.chunks),
            passes=passes,
            update=update,
            waits=tuple(meter.waits),
            misplaced=(*sorted(meter.misplaced), *sorted(meter.wide)),
            state_bytes=state_bytes,
            peak_bytes=meter.live.peak,
            at_peak=meter.live.at_peak,
        )

    def _feed_shapes(self) -> None:
        """Answer what stages tell each other where packs differ in length."""
        wire, exchange = self._wire, P2PCommunicator._communicate_shapes

        def communicate(
            self: Any, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool
        ) -> Any:
            wire.exchange(sent=send_next, is_prev=recv_prev, is_next=recv_next)
            return exchange(self, send_next, send_prev, recv_prev, recv_next)

        P2PCommunicator._communicate_shapes = communicate


def _find_rows_of_adapters() -> None:
    """Which rows of a weight have adapters is read from tensors on the host, so these are real."""
    find = lora._rows_of

    def found(weight: Any) -> Any:
        with unset_fake_temporarily():
            return find(weight)

    lora._rows_of = found
