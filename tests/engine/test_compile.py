"""Compiled functions are the plain ones: values, gradients, whole runs; one compilation for all
lengths, and one line where there is no compiler."""

import importlib.util
import logging
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from roll_sft.base.errors import ConfigError
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.engine import fused
from roll_sft.engine.fused import choose_compile, run_compiled
from roll_sft.engine.layers import SwiGLU, swiglu
from tests import parity
from tests.compiled import BOUNDS, FFN, FUNCTIONS, arguments, distance, flat, outcome
from tests.pool import RankPool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler"),
]

LENGTHS = (7, 12, 33, 2, 130)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_compiled_function_is_the_plain_one_at_every_length(
    name: str, dtype: torch.dtype
) -> None:
    function, plain = FUNCTIONS[name]
    before = graphs()
    for length in LENGTHS:
        rows, rest = arguments(name, length, dtype)
        found = outcome(lambda rows, *rest: run_compiled(function, rows, *rest), rows, rest)
        wanted = outcome(lambda rows, *rest: plain(*rows, *rest), rows, rest)
        for ours, theirs, bound in zip(
            found, wanted, (*BOUNDS[dtype], BOUNDS[dtype][1]), strict=False
        ):
            assert ours.dtype == theirs.dtype == dtype
            assert distance(ours, theirs) < bound
        if dtype == torch.bfloat16:  # rounded once, so at least as near to what fp32 gives
            exact = flat(
                plain(
                    *(each.float() if each.is_floating_point() else each for each in rows),
                    *(each.float() if isinstance(each, torch.Tensor) else each for each in rest),
                )
            )
            assert distance(found[0], exact) <= distance(wanted[0], exact) * 1.01
    assert graphs() - before == 1


def test_nothing_but_activations_is_written() -> None:
    import torch._inductor.config as inductor
    from torch._inductor.utils import run_and_get_code

    rows = [torch.randn(LENGTHS[0], 6 * FFN).bfloat16()]  # a width not compiled before
    with inductor.patch(force_disable_caches=True):
        _, codes = run_and_get_code(outcome, lambda rows: run_compiled(swiglu, rows), rows, [])
    assert len(codes) == 2, "forward and backward"
    for code in codes:
        assert "BFloat16* out_ptr" in code
        assert "float* out_ptr" not in code, "an fp32 intermediate goes through memory"


def graphs() -> int:
    """Compilations in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def trained(config: RunConfig) -> tuple[list[dict[str, float]], list[int]]:
    """In a pool: the steps of a run, and how many compilations each of two such runs adds."""
    counts = [graphs()]
    for _ in range(2):
        steps = parity.engine_run(config, None) or []
        counts.append(graphs())
    return steps, [after - before for before, after in pairwise(counts)]


def test_a_compiled_run_equals_the_plain_run(tmp_path: Path, pool: RankPool) -> None:
    # With recomputation every function runs without gradients, too, and again within the backward.
    # Compiled runs on several ranks are among those of `make parity`.
    parity.write_model(tmp_path / "model", num_layers=2)
    parity.write_rows(tmp_path / "rows.jsonl")
    runs = []
    for compiled in (True, False):
        config = parity.parity_config(
            tmp_path,
            deterministic=True,
            model={"compile": compiled},
            train={"recompute": "full", "max_steps": 4},
        )
        runs.append(pool.run(trained, layout_of(config.parallel), config)[0])
    (ours, compilations), (theirs, none) = runs
    assert compilations[0] > 0
    assert compilations[1] == 0, "a pack of a known width was compiled again"
    assert none == [0, 0]
    for left, right in zip(ours, theirs, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-6)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-5)


def test_an_expert_that_gets_no_token_is_activated_too() -> None:
    activation = SwiGLU(SimpleNamespace(activation_func=F.silu))
    for length in (3, 0, 1):
        (pairs,), _ = arguments("swiglu", length, torch.bfloat16)
        pairs.requires_grad_()
        activated = activation(pairs)
        assert activated.shape == (length, FFN)
        activated.sum().backward()
        assert pairs.grad is not None
        assert pairs.grad.shape == pairs.shape


def test_without_a_compiler_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch._inductor.config as inductor

    torch._dynamo.reset()  # what was compiled in this process before
    broken = {"cpp.cxx": ("/nowhere/c++",), "force_disable_caches": True}
    cpu = torch.device("cpu")
    asked = r"model\.compile: true\b.*C\+\+ compiler.*model\.compile=false"
    with inductor.patch(broken), pytest.raises(ConfigError, match=asked):
        choose_compile(True, device=cpu)
    with inductor.patch(broken), pytest.raises(ConfigError, match=r"<lambda> of \[2, 4\]"):
        run_compiled(lambda numbers: numbers.exp().tanh(), [torch.ones(2, 4)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert not choose_compile(None, device=torch.device("cuda"))
    (line,) = [each.getMessage() for each in caplog.records if each.name == fused.LOG.name]
    assert line.startswith("model.compile: off")
    assert "triton is not installed" in line
    assert not choose_compile(None, device=cpu)
    assert not choose_compile(False, device=torch.device("cuda"))
