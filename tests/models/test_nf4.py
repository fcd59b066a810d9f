"""Weights in NF4 against bitsandbytes, cut for tensor ranks, at every size."""

import sys

import pytest
import torch
from transformers import Qwen2Config

from roll_sft.config.lora import LoraConfig
from roll_sft.models.adapters import nf4
from roll_sft.models.source import family_named
from tests.models.helpers import DEFAULT_ROPE, MemorySource

functional = pytest.importorskip("bitsandbytes").functional

FAMILY = family_named("Qwen2ForCausalLM")
CONFIG = {
    "vocab_size": 40,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rope_parameters": DEFAULT_ROPE,
}
NF4 = LoraConfig(rank=4, quantize_base="nf4")


def shape_of(**changes: int) -> nf4.ModelShape:
    return FAMILY.shape(Qwen2Config(architectures=["Qwen2ForCausalLM"], **{**CONFIG, **changes}))


def of_library(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' codes, one a number [O, I], and what it dequantises them to."""
    codes, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    return unpacked(codes.view(len(weight), -1)), functional.dequantize_4bit(codes, state)


def unpacked(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [R, C / 2] of two codes -> [R, C] of one."""
    return torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_codes_and_values_are_the_librarys_on_every_tensor_rank(
    dtype: torch.dtype, tensor_size: int
) -> None:
    """At 4 ranks these share a group's query, key and value rows."""
    shape = shape_of()
    torch.manual_seed(3)
    # Blocks of unlike magnitudes, so that a wrong one shows.
    source = MemorySource(
        {
            name: torch.randn(size) * torch.rand(size[0], 1).exp()
            for name, size in FAMILY.hf_shapes(shape).items()
            if len(size) == 2
        }
    )
    library = {name: of_library(source.read(name).to(dtype)) for name in source.names()}
    codes, values = (
        MemorySource({name: each[number] for name, each in library.items()}) for number in (0, 1)
    )
    weights = nf4.quantized_weights(FAMILY, shape, NF4)
    assert len(weights) == 4
    for weight in weights.values():
        for rank in range(tensor_size):
            ranks = {"tensor_rank": rank, "tensor_size": tensor_size}
            part = nf4.quantized_part(weight, source, like=torch.empty((), dtype=dtype), **ranks)
            assert torch.equal(unpacked(part.codes), weight.mapping.local(codes, **ranks))
            wanted = weight.mapping.local(values, **ranks)
            assert part.dequantized().dtype == wanted.dtype == dtype
            assert torch.equal(part.dequantized(), wanted)


def test_a_base_takes_at_most_three_tenths_of_bf16() -> None:
    weight = nf4.quantized(torch.randn(1024, 896))
    assert weight.num_bytes == nf4.bytes_of(*weight.shape)
    assert weight.num_bytes <= 0.30 * 2 * 1024 * 896
    wide = nf4.bytes_of(28_672, 8192) / (2 * 28_672 * 8192)
    assert wide == pytest.approx((0.5 + 1 / 64 + 4 / (64 * 256)) / 2, rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "tensor_size", "named"),
    [
        ({"intermediate_size": 160}, 1, ["lora.quantize_base", "down_proj has 160 inputs"]),
        ({}, 8, ["parallel.tensor_model_parallel_size: 8", "256 inputs of o_proj", "divisor of 4"]),
    ],
)
def test_blocks_that_straddle_are_refused(
    changes: dict[str, int], tensor_size: int, named: list[str]
) -> None:
    found = list(nf4.block_problems(FAMILY, shape_of(**changes), NF4, tensor_size=tensor_size))
    assert all(part in found[0] for part in named), found


def test_the_library_is_loaded_without_kernels_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []

    def load(name: str) -> None:
        found.append("kernels" in sys.modules and sys.modules["kernels"] is None)

    monkeypatch.setattr(nf4, "import_module", load)
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    nf4._library()
    assert found == [True]
    assert "kernels" not in sys.modules


def test_a_missing_library_is_answered_with_the_install_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert nf4.library_problem() is None
    monkeypatch.setattr(nf4, "find_spec", lambda name: None)
    problem = nf4.library_problem() or ""
    assert "lora.quantize_base: nf4" in problem
    assert "pip install 'bitsandbytes" in problem
