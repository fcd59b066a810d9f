"""FLOPs of a step beside what transformers computes; peaks of devices; a process's own memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from roll_sft.base.metrics import flops_per_step, peak_flops
from roll_sft.data.steps.packing import CostModel
from roll_sft.models.source import family_of
from tests.parity import model_config


@pytest.mark.parametrize("kind", ["qwen3", "qwen2-tied", "llama"])
def test_flops_are_those_that_transformers_computes(kind: str) -> None:
    """qwen3 here has heads that are wider together than the hidden size."""
    config = model_config(kind, num_layers=2)
    config.architectures = [{"qwen3": "Qwen3", "llama": "Llama"}.get(kind, "Qwen2") + "ForCausalLM"]
    shape = family_of(config).shape(config)
    assert (shape.attention_width != shape.hidden_size) == (kind == "qwen3")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    parameters, found = shape.num_matmul_parameters, {}
    for length in (40, 160):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.zeros(1, length, dtype=torch.long))
        # Eager attention computes the half that the mask hides, too. A step is thrice a forward.
        attention = 3 * (counter.get_total_flops() - 2 * parameters * length) / 2
        found[length] = 6 * parameters * length + attention
        # The rotation and the like are element by element, or small.
        assert flops_per_step(
            num_matmul_parameters=parameters,
            num_layers=shape.num_layers,
            attention_width=shape.attention_width,
            lengths=[length],
        ) == pytest.approx(found[length], rel=0.02)
    cost = CostModel.of(
        parameters, num_layers=shape.num_layers, attention_width=shape.attention_width
    )
    assert cost(160) / cost(40) == pytest.approx(found[160] / found[40], rel=0.02)


def test_flops_count_every_token_in_the_matmuls_and_its_square_in_attention() -> None:
    found = flops_per_step(
        num_matmul_parameters=1000, num_layers=3, attention_width=7, lengths=[5, 11]
    )
    assert found == 6 * 1000 * 16 + 6 * 3 * 7 * (25 + 121)


def test_a_window_hides_the_tokens_before_it() -> None:
    sizes: dict[str, Any] = {"num_matmul_parameters": 0, "num_layers": 3, "attention_width": 7}
    found = flops_per_step(**sizes, lengths=[4, 400], windows={40: 2})
    # Twelve FLOPs for each column and each pair of a query and a key that it sees.
    pairs = sum(min(place + 1, 40) for n in (4, 400) for place in range(n))
    plain = sum(place + 1 for n in (4, 400) for place in range(n))
    assert found == pytest.approx(12 * 7 * (2 * pairs + plain), rel=0.01)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100X", None),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", None),
        (None, None),
    ],
)
def test_the_peak_of_a_device_is_that_of_its_variant(name: str | None, tera: int | None) -> None:
    assert peak_flops(name) == (None if tera is None else tera * 1e12)


MEASURE = """
import mmap, sys, torch
from roll_sft.engine import cpu_backend
cpu_backend.install()
def peak():
    found = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return found
peak()
before = peak()
with open(sys.argv[1], "rb") as source:
    mapped = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
sum(mapped[:: mmap.PAGESIZE])
after_file = peak()
bytearray(b"x") * (200 << 20)
for each in (after_file, peak(), peak()):
    print(round(each - before))
"""


@pytest.mark.slow
def test_peak_memory_is_a_process_s_own_and_of_the_time_since_the_last(tmp_path: Path) -> None:
    file = tmp_path / "cache"
    with file.open("wb") as tokens:
        for _ in range(100):
            tokens.write(bytes(1 << 20))
    command = [sys.executable, "-c", MEASURE, str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    mapped, own, later = map(int, result.stdout.split())
    assert mapped < 40, "100 MiB of a mapped file are counted"
    assert 160 < own < 240, "200 MiB that came and went are not seen"
    assert later < 40, "the peak of an earlier step is reported again"
