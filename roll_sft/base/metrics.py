"""What a step reports, and the arithmetic of tokens, FLOPs and chunks, with units in the names.

`StepMetrics` and `EvalMetrics` come from the reporting rank. `StepRecord` is one line of
`steps.jsonl`, which the driver makes from a step's plan and its metrics.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roll_sft.base.expert_load import ExpertLoad

# Start of a device's name -> dense bf16 peak in FLOP/s, from the vendors' datasheets (no sparsity).
# The longest start that fits counts: variants of one chip differ in clock and power.
PEAK_FLOPS_BF16 = {
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
}

# Of logits. On a CPU chunks are this small only where logits are large: below, one chunk is faster.
SMALL_LOGITS_BYTES = 16 << 20
CHUNKS, MIN_ROWS, MAX_ROWS = 8, 128, 512
# On a GPU each chunk reads and writes the whole fp32 gradient of the weight, so few large chunks
# are faster. The logits of one, in half precision, and their gradient take this much each.
GPU_LOGITS_BYTES = 640 << 20


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer step, as the reporting rank saw it; sums are over the whole global batch."""

    step: int
    loss_sum: float  # nats over all supervised tokens
    supervised_tokens: int
    grad_norm: float  # before clipping
    learning_rate: float
    step_time_s: float
    data_wait_s: float
    peak_memory_gib: float  # since the step before: of the device, or on a CPU the process's own
    is_skipped: bool = False  # no update was made; see training/records.py
    told: tuple[float, ...] = ()  # of a recipe's loss; see data/steps/objective.py
    experts: "ExpertLoad | None" = None


@dataclass(frozen=True, slots=True)
class EvalMetrics:
    """Loss of one chunk of a validation set, summed over its supervised tokens.

    `correct_tokens` are those whose label is the likeliest token. `parts` are the same of turns and
    tool calls; see `engine/validation.py`.
    """

    loss_sum: float
    supervised_tokens: int
    correct_tokens: int = 0
    parts: Mapping[str, "EvalMetrics"] = field(default_factory=dict)

    def __add__(self, other: "EvalMetrics") -> "EvalMetrics":
        names = {**self.parts, **other.parts}
        none = EvalMetrics(0.0, 0)
        return EvalMetrics(
            self.loss_sum + other.loss_sum,
            self.supervised_tokens + other.supervised_tokens,
            self.correct_tokens + other.correct_tokens,
            {name: self.parts.get(name, none) + other.parts.get(name, none) for name in names},
        )


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of `steps.jsonl`; the field names are public."""

    step: int
    epoch: float
    train_loss: float
    grad_norm: float
    learning_rate: float
    supervised_tokens: int
    total_tokens: int
    total_tokens_including_padding: int
    per_device_tps: float
    per_device_tps_including_padding: float
    step_time_s: float
    data_wait_s: float
    mfu: float | None
    peak_memory_gib: float
    dp_imbalance: float
    pack_fill: float
    sample_ids_sha256: str


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """One line of `eval.jsonl`; the field names are public."""

    step: int
    name: str
    loss: float
    perplexity: float
    supervised_tokens: int
    time_s: float
    token_accuracy: float
    best_loss: float
    best_step: int
    parts: Mapping[str, Mapping[str, float]]


def flops_per_step(
    *,
    num_matmul_parameters: float,
    num_layers: int,
    attention_width: int,
    lengths: list[int],
    windows: Mapping[int, int] = MappingProxyType({}),
) -> float:
    """Model FLOPs of forward and backward over samples of `lengths` real tokens.

    6NT for the matmuls (N with the LM head, without the input embedding) and 6 L w s^2 for causal
    attention inside each document (w is heads x head_dim), so neither padding nor packing counts.
    `windows` says how many layers have a window of so many tokens, which hides (s - window)^2.
    """
    squares = num_layers * sum(length * length for length in lengths)
    for window, count in windows.items():
        squares -= count * sum(max(0, length - window) ** 2 for length in lengths)
    return 6.0 * num_matmul_parameters * sum(lengths) + 6.0 * attention_width * squares


@functools.cache
def peak_flops(device_name: str | None) -> float | None:
    """Datasheet bf16 peak of a device in FLOP/s; None for a CPU or a device not in the table."""
    for name in sorted(PEAK_FLOPS_BF16, key=len, reverse=True):
        # A whole word: an "A100X" is another device than an "A100-SXM4-80GB".
        if re.match(rf"{name}\b", device_name or ""):
            return PEAK_FLOPS_BF16[name]
    return None


def chunk_rows(rows: int, width: int, *, on_gpu: bool) -> int:
    """How many of `rows` rows the head takes at a time, for logits [rows, width]."""
    if on_gpu:
        most = max(GPU_LOGITS_BYTES // (2 * width), MIN_ROWS)
        num_chunks = max(1, -(-rows // most))
        return max(1, -(-rows // num_chunks))
    if rows * width * 4 <= SMALL_LOGITS_BYTES:
        return max(rows, 1)
    return min(max(rows // CHUNKS, MIN_ROWS), MAX_ROWS)


def format_seconds(seconds: float) -> str:
    """`0:02:13`, from a day on `1 d 03:00:00`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (
        f"{days} d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"
    )
