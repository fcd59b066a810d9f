"""Segments say what attends to what; every kernel computes segments."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from roll_sft.base.errors import ConfigError
from roll_sft.data.steps.batch import zigzag_indices
from roll_sft.engine import attention_kernels
from roll_sft.engine.attention_kernels import Heads, choose_kernel, sdpa, why_not
from roll_sft.engine.attention_packages import fa3, flash
from roll_sft.engine.micro_batch import Segments, segments_of

CPU = torch.device("cpu")
LENGTHS = (16, 8, 24)
BOUNDS = torch.tensor([0, 16, 24, 48], dtype=torch.int32)


def states(num_tokens: int, num_heads: int, seed: int) -> torch.Tensor:
    return torch.randn(num_tokens, num_heads, 8, generator=torch.Generator().manual_seed(seed))


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention written out, sample by sample, in float64: [P, H, E]."""
    outputs = []
    repeats = query.shape[1] // key.shape[1]
    for start, end in zip(BOUNDS[:-1].tolist(), BOUNDS[1:].tolist(), strict=True):
        q = query[start:end].double()
        k, v = (x[start:end].double().repeat_interleave(repeats, dim=1) for x in (key, value))
        scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~torch.ones(end - start, end - start).tril().bool(), -torch.inf)
        outputs.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), v))
    return torch.cat(outputs).float()


def packing_by_documentation(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """What flash-attn documents of `cu_seqlens` and a causal mask, from the bounds alone."""
    outputs = []
    bounds = zip(
        segments.query_bounds[:-1].tolist(),
        segments.query_bounds[1:].tolist(),
        segments.key_bounds[:-1].tolist(),
        segments.key_bounds[1:].tolist(),
        strict=True,
    )
    repeats = query.shape[1] // key.shape[1]
    for q0, q1, k0, k1 in bounds:
        k, v = (x[k0:k1].repeat_interleave(repeats, dim=1) for x in (key, value))
        scores = torch.einsum("qhe,khe->hqk", query[q0:q1], k) / query.shape[-1] ** 0.5
        visible = torch.ones(q1 - q0, k1 - k0).tril((k1 - k0) - (q1 - q0)).bool()
        scores = scores.masked_fill(~visible, -torch.inf)
        outputs.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("kernel", [sdpa, packing_by_documentation])
@pytest.mark.parametrize("context_size", [1, 2, 4])
def test_the_segments_of_all_context_ranks_make_plain_causal_attention(
    context_size: int, kernel: object
) -> None:
    query, key, value = states(48, 4, 1), states(48, 2, 2), states(48, 2, 3)
    wanted = dense(query, key, value)
    slices = [
        zigzag_indices(BOUNDS, context_size=context_size, context_rank=rank)
        for rank in range(context_size)
    ]
    gathered = torch.cat(slices)  # the order in which a gather brings the keys
    for rank, mine in enumerate(slices):
        segments = segments_of(BOUNDS, context_size=context_size, context_rank=rank)
        index = segments.key_index
        keys, values = (x if index is None else x[gathered][index] for x in (key, value))
        assert callable(kernel)
        output = kernel(query[mine], keys, values, segments)
        torch.testing.assert_close(output, wanted[mine], rtol=1e-5, atol=1e-6)


def test_a_sample_never_sees_another() -> None:
    query, key, value = states(48, 4, 1), states(48, 2, 2), states(48, 2, 3)
    segments = segments_of(BOUNDS, context_size=1, context_rank=0)
    before = sdpa(query, key, value, segments)
    key[16:24], value[16:24] = 9.0, -9.0
    after = sdpa(query, key, value, segments)
    assert torch.equal(before[:16], after[:16])
    assert torch.equal(before[24:], after[24:])
    assert not torch.equal(before[16:24], after[16:24])


HEADS = Heads(4, 2, 8)


def test_auto_takes_what_runs_here_and_a_missing_backend_is_named() -> None:
    assert choose_kernel("auto", device=CPU, dtype=torch.bfloat16, heads=HEADS) is sdpa
    cuda = torch.device("cuda")
    assert choose_kernel("auto", device=cuda, dtype=torch.float32, heads=HEADS) is sdpa
    for name in ("fa3", "flash"):
        reason = rf"model\.attention_backend: '{name}' .*ModuleNotFound"
        with pytest.raises(ConfigError, match=reason):
            choose_kernel(name, device=CPU, dtype=torch.bfloat16, heads=HEADS)


# What a package may hold: a namesake's folder, a build for another machine, wrong numbers.
PACKAGES = {
    "only a namesake": ("", "ImportError"),
    "another CUDA": ("raise OSError('undefined symbol: _ZN2at')", "undefined symbol"),
    "an old card": (
        "def flash_attn_varlen_func(*_, **__): raise RuntimeError('only supports Ampere')",
        "only supports Ampere",
    ),
    "no gradient": ("def flash_attn_varlen_func(q, *_, **__): return q.detach()", "grad"),
    "wrong numbers": ("def flash_attn_varlen_func(q, *_, **__): return q * 1.0", "differs"),
}


@pytest.mark.parametrize(("content", "reason"), PACKAGES.values(), ids=PACKAGES)
def test_a_package_that_does_not_work_is_passed_over_with_its_reason(
    content: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "flash_attn" / "__init__.py"
    package.parent.mkdir()
    package.write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    found = why_not(flash, CPU, torch.float32, HEADS)
    sys.modules.pop("flash_attn", None)
    assert found is not None
    assert reason in found


def test_auto_says_which_kernel_it_took_and_why_not_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The line of a machine with torch alone; varlen has a kernel for CUDA only.
    monkeypatch.setattr(attention_kernels, "varlen", packing_by_documentation)
    trial = attention_kernels._trial

    def on_cpu(kernel: Any, _: torch.device, dtype: torch.dtype, heads: Heads) -> Any:
        return trial(kernel, CPU, dtype, heads)

    monkeypatch.setattr(attention_kernels, "_trial", on_cpu)
    caplog.set_level("INFO")
    cuda = torch.device("cuda")
    kernel = choose_kernel("auto", device=cuda, dtype=torch.bfloat16, heads=HEADS)
    assert kernel is packing_by_documentation
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("model.attention_backend: varlen; not te (ModuleNotFoundError")
    assert "; not fa3 (ModuleNotFoundError: No module named 'flash_attn_interface')" in line
    assert "; not flash (ModuleNotFoundError" in line


# Stands for the operators that flash-attention 3 registers, and torch's own for CUDA then calls.
FA3_PACKAGE = """
import torch
OPERATORS = torch.library.Library("flash_attn_3", "FRAGMENT")
for name in ("fwd", "bwd"):
    if not hasattr(torch.ops.flash_attn_3, name):
        OPERATORS.define(name + "(Tensor query) -> Tensor")
"""


def test_flash_attention_3_is_left_where_it_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = torch.nn.attention.current_flash_attention_impl
    (tmp_path / "flash_attn_interface.py").write_text(FA3_PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    found: list[str | None] = []

    def and_note(*arguments: Any) -> torch.Tensor:
        try:
            return fa3(*arguments)
        finally:
            found.append(active())

    reason = why_not(and_note, CPU, torch.bfloat16, HEADS)
    sys.modules.pop("flash_attn_interface", None)
    assert found == ["FA3"]
    assert "_flash_attention_forward" in str(reason)  # which has no kernel for a CPU
    assert why_not(packing_by_documentation, CPU, torch.float32, HEADS) is None
    assert active() is None


def test_a_kernel_that_computes_segments_is_taken() -> None:
    assert why_not(packing_by_documentation, CPU, torch.float32, HEADS) is None
