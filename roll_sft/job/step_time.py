"""Seconds of a training step on a layout, by published formulas. Their ratios rank layouts.

Each exchange is counted as if nothing hid it, and every kernel as if it ran at one rate: so the
times are no forecast. Activations and weights are bf16, gradients fp32.

Legend: t, p, c, d tensor, pipeline, context and data size, v virtual stages, m micro-batches of a
data rank in a step, T tokens of a micro-batch on one context rank, h hidden size, k width of all
keys, L layers of a stage, P parameters of a rank. A ring of g ranks passes (g-1)/g of a tensor
through each rank, to gather or to reduce-scatter it.

- compute: 6NT FLOPs and the attention's (`base.metrics.flops_per_step`), over t p c, and over the
  layers of the fullest stage.
- recompute: one more forward of what is recomputed, half of its backward's FLOPs (Korthikanti et
  al. 2022, arXiv:2205.05198): the layers, or of each its MLP or its attention's scores. Norms cost
  no product.
- bubble: (p-1) / (v m) of all that a stage does in a step (Narayanan et al. 2021,
  arXiv:2104.04473, section 2.2).
- tensor: 8 T h (t-1)/t numbers for each layer and micro-batch (the same, section 3.2); sequence
  parallelism exchanges as many (arXiv:2205.05198, section 4.2.2). A layer that is recomputed adds
  half, an MLP a quarter.
- context: keys and values of the pack gathered in the forward, their gradients reduce-scattered in
  the backward (Llama Team 2024, arXiv:2407.21783, section 3.3.2): 4 T k (c-1) / t numbers.
- pipeline: T h / t numbers each way, for each virtual stage and micro-batch (arXiv:2104.04473,
  sections 3.2 and 4.1).
- experts: T h n (e-1)/e / t numbers to n of the experts on e ranks and back, forward and backward,
  for each layer and micro-batch; counted with the tensor ranks' exchanges.
- data: P gradients reduce-scattered and P weights gathered, once a step, over d c ranks (ZeRO,
  Rajbhandari et al. 2020, arXiv:1910.02054, section 7).
"""

import math
from collections.abc import Collection
from dataclasses import astuple, dataclass

from roll_sft.base.layout import ParallelLayout, round_up
from roll_sft.base.metrics import flops_per_step
from roll_sft.job.expert_time import active_mlp, exchanged_tokens_s, gradients_s
from roll_sft.models.shape import ModelShape

ACTIVATION_BYTES, GRADIENT_BYTES, WEIGHT_BYTES = 2, 4, 2
COLLECTIVES_PER_LAYER = 8  # of tensor ranks, forward and backward


@dataclass(frozen=True, slots=True)
class Machine:
    """What times are computed with: an H100 SXM in nodes of eight, each with a 400 Gb/s port.

    Of the datasheets, 60 % for matrix products and 80 % for exchanges, in one direction.
    """

    gpus_per_node: int = 8
    flops_per_s: float = 0.6 * 989e12
    node_bytes_per_s: float = 0.8 * 450e9
    network_bytes_per_s: float = 0.8 * 50e9
    collective_s: float = 20e-6  # the least time of an exchange, however small


@dataclass(frozen=True, slots=True)
class Work:
    """What a step holds."""

    tokens: float
    samples: float
    pack_tokens: int  # that a micro-batch holds at most


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step, by what they go to."""

    compute_s: float
    recompute_s: float
    bubble_s: float
    tensor_s: float
    context_s: float
    pipeline_s: float
    data_s: float

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        total: float = sum(astuple(self))
        return total


def micro_batches(work: Work, layout: ParallelLayout) -> int:
    """Of a data rank in a step; a rank without a sample runs one of padding."""
    tokens = work.tokens / _busy_ranks(work, layout)
    return round_up(max(1, math.ceil(tokens / work.pack_tokens)), layout.micro_batch_multiple)


def step_time(
    shape: ModelShape,
    layout: ParallelLayout,
    work: Work,
    *,
    recompute: Collection[str],
    machine: Machine,
) -> StepTime:
    """Seconds of one step of `work`; `recompute` is the value of `train.recompute`."""
    tensor, stages, context = layout.tensor_size, layout.pipeline_size, layout.context_size
    chunks = stages * layout.virtual_size
    chunk_layers = -(-shape.num_layers // chunks)
    uneven = chunk_layers * chunks / shape.num_layers
    compute = _rank_s(_step_flops(shape, work), layout, work, machine) * uneven
    again = _rank_s(_recomputed_flops(shape, work, recompute), layout, work, machine) * uneven
    rank_tokens = work.tokens / _busy_ranks(work, layout) / context
    number = micro_batches(work, layout)
    passes = chunk_layers * layout.virtual_size * number  # of a micro-batch through a layer
    hidden = rank_tokens / number * shape.hidden_size * ACTIVATION_BYTES
    keys = 2 * rank_tokens / number * shape.num_key_value_heads * shape.head_dim * ACTIVATION_BYTES
    is_full = _has(recompute, "full")
    tensor_times = 1.5 if is_full else 1.25 if _has(recompute, "mlp") else 1.0
    context_times = 1.5 if is_full or _has(recompute, "core_attn") else 1.0
    exchange = _Exchange(machine)
    tensor_s = (
        passes
        * COLLECTIVES_PER_LAYER
        * tensor_times
        * exchange.seconds(hidden, tensor, span=tensor)
    )
    context_s = (passes * 2 * context_times) * exchange.seconds(
        keys * context / tensor, context, span=tensor * context
    )
    sends = 2 * layout.virtual_size * number if stages > 1 else 0
    pipeline_s = sends * exchange.send_s(hidden / tensor, span=layout.world_size)
    tensor_s += (
        passes
        * tensor_times
        * exchanged_tokens_s(shape, layout, hidden_bytes=hidden, exchange=exchange.seconds)
    )
    data_s = sum(
        gradients_s(shape, layout, bytes_of_each=each, exchange=exchange.seconds)
        for each in (GRADIENT_BYTES, WEIGHT_BYTES)
    )
    busy_s = compute + again + tensor_s + context_s + pipeline_s
    bubble_s = (stages - 1) / (layout.virtual_size * number) * busy_s
    return StepTime(compute, again, bubble_s, tensor_s, context_s, pipeline_s, data_s)


@dataclass(frozen=True, slots=True)
class _Exchange:
    """Exchanges between ranks that lie within `span` consecutive ones: in a node, or across."""

    machine: Machine

    def seconds(self, size: float, ranks: int, *, span: int) -> float:
        """To gather or to reduce-scatter a tensor of `size` bytes over `ranks`."""
        return 0.0 if ranks == 1 else self.send_s(size * (ranks - 1) / ranks, span=span)

    def send_s(self, size: float, *, span: int) -> float:
        """To pass `size` bytes on to the next rank."""
        is_local = span <= self.machine.gpus_per_node
        rate = self.machine.node_bytes_per_s if is_local else self.machine.network_bytes_per_s
        return self.machine.collective_s + size / rate


def _has(recompute: Collection[str], name: str) -> bool:
    """Whether `train.recompute` names `name`; selective is a name of core_attn's."""
    names = [recompute] if isinstance(recompute, str) else recompute
    return name in names or (name == "core_attn" and "selective" in names)


def _mean_length(work: Work) -> int:
    return max(1, round(work.tokens / work.samples))


def _step_flops(shape: ModelShape, work: Work) -> float:
    """Of forward and backward of all samples, each of the mean length."""
    length = _mean_length(work)
    flops = flops_per_step(
        num_matmul_parameters=shape.num_matmul_parameters,
        num_layers=shape.num_layers,
        attention_width=shape.attention_width,
        lengths=[length],
        windows=shape.windows,
    )
    return flops * work.tokens / length


def _recomputed_flops(shape: ModelShape, work: Work, recompute: Collection[str]) -> float:
    """Of the forward of what is recomputed: two for each weight and token, and its scores."""
    head = shape.vocab_size * shape.hidden_size
    mlp = active_mlp(shape)
    length = _mean_length(work)
    unseen = sum(n * max(0, length - window) ** 2 for window, n in shape.windows.items())
    scores = shape.attention_width * (length * shape.num_layers - unseen / length)
    is_full = _has(recompute, "full")
    numbers: float = shape.num_matmul_parameters - head if is_full else 0
    numbers += mlp if _has(recompute, "mlp") else 0
    numbers += scores if is_full or _has(recompute, "core_attn") else 0
    return 2.0 * numbers * work.tokens


def _rank_s(flops: float, layout: ParallelLayout, work: Work, machine: Machine) -> float:
    """Seconds of `flops` of a step on each rank, if the layers are dealt evenly."""
    degrees = layout.tensor_size * layout.pipeline_size * layout.context_size
    return flops / _busy_ranks(work, layout) / degrees / machine.flops_per_s


def _busy_ranks(work: Work, layout: ParallelLayout) -> float:
    """Data ranks that have a sample in each step."""
    return max(1.0, min(layout.data_size, work.samples))
