"""Weights in NF4 with double quantisation, with the codes that bitsandbytes gives them.

bitsandbytes flattens a weight and cuts it into blocks of 64 numbers, each with a 4-bit code and the
largest magnitude of its block. These magnitudes, less their mean, get 8-bit codes in groups of 256
blocks. Here each Hugging Face tensor is quantised whole, and rows and columns of the codes are then
cut for a tensor rank. Blocks must not straddle rows or the cut, see `block_problems`. So the codes
are the same on every layout.

Legend: O outputs and I inputs of a weight, R rows and C columns of a rank's part of it.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from roll_sft.config.lora import ALL_LINEAR, LoraConfig
from roll_sft.models.adapters.adapter import AdaptedWeight, adapted_weights
from roll_sft.models.family import Family
from roll_sft.models.files.safetensors_in import Shape, TensorSource
from roll_sft.models.shape import ModelShape

BLOCK, GROUP = 64, 256  # numbers in a block, blocks in a group: the library's defaults
INSTALL = "pip install 'bitsandbytes>=0.50'"


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [R, C], or a tensor rank's part of it. All on one device."""

    codes: torch.Tensor  # uint8 [R, C / 2], the first of two codes in the upper bits
    block_codes: torch.Tensor  # uint8 [R, C / 64]
    first_blocks: torch.Tensor  # int32 [R]: the number of a row's first block; see `group_scales`
    group_scales: torch.Tensor  # float32 [G]; that of block b is number b // 256
    offsets: torch.Tensor  # float32 [R]: what is added to the magnitudes of a row's blocks
    dtype: torch.dtype  # of the weight

    @property
    def shape(self) -> Shape:
        """(R, C)."""
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def num_bytes(self) -> int:
        """Of all that is held."""
        held = (self.codes, self.block_codes, self.first_blocks, self.group_scales, self.offsets)
        return sum(tensor.nbytes for tensor in held)

    def dequantized(self) -> torch.Tensor:
        """The weight [R, C], as the library computes it, to the last bit."""
        blocks = torch.arange(self.block_codes.shape[1], device=self.codes.device)
        groups = (self.first_blocks[:, None] + blocks) // GROUP
        magnitudes = _magnitudes(self.codes.device)[self.block_codes.int()]
        magnitudes = magnitudes.mul_(self.group_scales[groups]).add_(self.offsets[:, None])
        values: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.codes.view(-1, 1), magnitudes.view(-1), BLOCK, "nf4", self.shape, self.dtype
        )
        return values

    def part(self, rows: torch.Tensor, *, start: int, stop: int) -> "QuantizedWeight":
        """The rows of numbers `rows` (int64) and their columns from `start` to `stop`."""
        rows = rows.to(self.codes.device)
        return replace(
            self,
            codes=self.codes[rows, start // 2 : stop // 2].contiguous(),
            block_codes=self.block_codes[rows, start // BLOCK : stop // BLOCK].contiguous(),
            first_blocks=self.first_blocks[rows] + start // BLOCK,
            offsets=self.offsets[rows],
        )


def quantized(weight: torch.Tensor) -> QuantizedWeight:
    """`weight` [O, I] in NF4; I is a multiple of 64. On the device of `weight`."""
    num_rows, num_columns = weight.shape
    assert num_columns % BLOCK == 0, f"blocks straddle rows of {num_columns} numbers"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the mean of the magnitudes depends on their number
    try:
        codes, state = _library().quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
    finally:
        torch.set_num_threads(threads)
    blocks_per_row = num_columns // BLOCK
    first_blocks = torch.arange(num_rows, dtype=torch.int32, device=weight.device)
    return QuantizedWeight(
        codes=codes.view(num_rows, num_columns // 2),
        block_codes=state.absmax.view(num_rows, blocks_per_row),
        first_blocks=first_blocks * blocks_per_row,
        group_scales=state.state2.absmax,
        offsets=state.offset.expand(num_rows).contiguous(),
        dtype=weight.dtype,
    )


def quantized_part(
    weight: AdaptedWeight,
    source: TensorSource,
    *,
    like: torch.Tensor,
    tensor_rank: int,
    tensor_size: int,
) -> QuantizedWeight:
    """The part of a fused weight of Megatron's that a tensor rank holds.

    `like` has the dtype that the weight is rounded to before it is quantised, and the device. Each
    Hugging Face tensor is read and quantised whole, one at a time.
    """
    tensors = (source.read(name) for name in weight.mapping.hf_shapes)
    whole = _stacked([quantized(each.to(like.device, like.dtype)) for each in tensors])
    rows = weight.rows_of_rank(tensor_rank=tensor_rank, tensor_size=tensor_size)
    width = weight.num_inputs // (tensor_size if weight.is_row_parallel else 1)
    start = tensor_rank * width if weight.is_row_parallel else 0
    return whole.part(rows, start=start, stop=start + width)


def quantized_weights(
    family: Family, shape: ModelShape, lora: LoraConfig
) -> dict[str, AdaptedWeight]:
    """Megatron parameter name -> each weight that `lora.quantize_base` quantises.

    These are the linear layers that transformers quantises, adapted or not: all but the head.
    """
    if lora.quantize_base == "none":
        return {}
    return adapted_weights(family, shape, replace(lora, target_modules=[ALL_LINEAR]))


def bytes_of(num_rows: float, num_columns: float) -> float:
    """What a `QuantizedWeight` of that shape holds: codes, codes of blocks, groups, and rows."""
    blocks = num_rows * num_columns / BLOCK
    return blocks * (BLOCK / 2 + 1 + 4 / GROUP) + 8 * num_rows


def library_problem() -> str | None:
    """Why weights cannot be quantised here, in words; None if they can."""
    if find_spec("bitsandbytes") is not None:
        return None
    return f"lora.quantize_base: nf4 needs bitsandbytes, which is not installed; {INSTALL}"


def block_problems(
    family: Family, shape: ModelShape, lora: LoraConfig, *, tensor_size: int
) -> Iterator[str]:
    """Which blocks would straddle rows, or the tensor ranks."""
    widths = {}
    for weight in quantized_weights(family, shape, lora).values():
        for module in weight.modules:
            cut = tensor_size if weight.is_row_parallel else 1
            widths[module.rpartition(".")[2]] = (weight.num_inputs, cut)
    for name, (inputs, cut) in widths.items():
        if inputs % (BLOCK * cut) == 0:
            continue
        if inputs % BLOCK:
            yield (
                f"lora.quantize_base: nf4 has blocks of {BLOCK} numbers, and {name} has {inputs}"
                " inputs, which is no multiple of it; leave lora.quantize_base out"
            )
            continue
        yield (
            f"parallel.tensor_model_parallel_size: {cut} cuts the {inputs} inputs of {name} through"
            f" blocks of {BLOCK} numbers (lora.quantize_base=nf4); choose a divisor of"
            f" {inputs // BLOCK}"
        )


class DequantizedSource:
    """Weights of `source` as a run with a quantised base computes with them.

    The tensors `names` are rounded to `dtype`, quantised and dequantised; the others are as read.
    """

    def __init__(self, source: TensorSource, *, names: frozenset[str], dtype: torch.dtype) -> None:
        self._source, self._names, self._dtype = source, names, dtype

    def __str__(self) -> str:
        return str(self._source)

    def names(self) -> frozenset[str]:
        return self._source.names()

    def shape(self, name: str) -> Shape:
        return self._source.shape(name)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own if it is one of `names`."""
        tensor = self._source.read(name)
        if name not in self._names:
            return tensor
        return quantized(tensor.to(self._dtype)).dequantized()

    def read_slice(self, name: str, *, start: int, stop: int, dim: int) -> torch.Tensor:
        return self.read(name).narrow(dim, start, stop - start).contiguous()


def _library() -> Any:
    """bitsandbytes, which is typed in part.

    On CPUs with AVX512-BF16 it asks the package `kernels`, where that is installed, for code from
    the hub, of a product that is not used here. A run fetches no code, so the package is hidden.
    """
    if "bitsandbytes" in sys.modules:
        return import_module("bitsandbytes.functional")
    hidden: Any = None
    found = sys.modules.pop("kernels", None)
    sys.modules["kernels"] = hidden
    try:
        return import_module("bitsandbytes.functional")
    finally:
        del sys.modules["kernels"]
        if found is not None:
            sys.modules["kernels"] = found


def _stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of all `weights` one after the other; each keeps its groups to itself."""
    first, blocks = 0, []
    for weight in weights:
        blocks.append(weight.first_blocks + first * GROUP)
        first += len(weight.group_scales)
    return QuantizedWeight(
        codes=torch.cat([each.codes for each in weights]),
        block_codes=torch.cat([each.block_codes for each in weights]),
        first_blocks=torch.cat(blocks),
        group_scales=torch.cat([each.group_scales for each in weights]),
        offsets=torch.cat([each.offsets for each in weights]),
        dtype=weights[0].dtype,
    )


@functools.cache
def _magnitudes(device: torch.device) -> torch.Tensor:
    """What the 256 codes of a block's magnitude stand for, float32 on `device`; 1 at most."""
    table: torch.Tensor = _library().create_dynamic_map().to(device)
    return table
