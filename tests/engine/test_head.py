"""The head in chunks gives the loss and the gradients of whole logits, on one rank and on two."""

from typing import Any

import pytest
import torch

from roll_sft.config.schema import layout_of
from roll_sft.engine import loss
from roll_sft.engine.fused import chunk_rows
from tests import parity
from tests.pool import RankPool

ROWS, HIDDEN, WORDS, REAL_WORDS, FACTOR = 37, 16, 64, 61, 3.0


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(WORDS, HIDDEN, generator=generator)
    labels = torch.randint(0, REAL_WORDS, (ROWS,), generator=generator)
    labels[:2] = torch.tensor([0, REAL_WORDS - 1])
    return hidden, weight, labels


def chunked(dtype: torch.dtype, chunk: int, is_compiled: bool = False) -> dict[str, Any]:
    """On a rank of a pool: losses, the gradients of FACTOR times their sum, the rank's words."""
    options = {"vocab_size": REAL_WORDS, "is_compiled": is_compiled}
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    hidden, weight, labels = inputs()
    width = WORDS // parallel_state.get_tensor_model_parallel_world_size()
    first = parallel_state.get_tensor_model_parallel_rank() * width
    ours = weight[first : first + width].to(dtype).requires_grad_()
    rows = hidden.to(dtype).requires_grad_()
    small, loss.chunk_rows = loss.chunk_rows, lambda *_, **__: chunk
    try:
        entered = copy_to_tensor_model_parallel_region(rows)
        losses = loss.cross_entropy_of_rows(entered, ours, labels, **options)
        with torch.no_grad():
            again = loss.cross_entropy_of_rows(rows, ours, labels, **options)
    finally:
        loss.chunk_rows = small
    (losses.sum() * FACTOR).backward()
    assert rows.grad is not None
    assert ours.grad is not None
    return {
        "losses": losses.detach(),
        "without gradients": again,
        "hidden": rows.grad.float(),
        "weight": ours.grad.float(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("chunk", [7, ROWS])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_chunks_equal_whole_logits(
    workers: int, chunk: int, dtype: torch.dtype, tolerance: float, pool: RankPool
) -> None:
    check_head(workers, (dtype, chunk), tolerance, pool)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "dtype", "tolerance"), [(2, torch.float32, 1e-6), (1, torch.bfloat16, 2e-2)]
)
def test_a_compiled_head_equals_whole_logits(
    workers: int, dtype: torch.dtype, tolerance: float, pool: RankPool
) -> None:
    check_head(workers, (dtype, 7, True), tolerance, pool)


def check_head(workers: int, how: tuple[Any, ...], tolerance: float, pool: RankPool) -> None:
    """`how` is what `chunked` takes."""
    dtype = how[0]
    hidden, weight, labels = inputs()
    hidden, weight = (each.to(dtype).float().requires_grad_() for each in (hidden, weight))
    logits = hidden @ weight[:REAL_WORDS].t()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (losses.sum() * FACTOR).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    parallel = parity.parity_config(
        parity.Path("unused"),
        parallel={"num_workers": workers, "tensor_model_parallel_size": workers},
    ).parallel
    ranks = pool.run(chunked, layout_of(parallel), *how)
    for rank in ranks:
        assert rank["losses"].dtype == torch.float32
        assert torch.equal(rank["losses"], rank["without gradients"])
        close(rank["losses"], losses.detach(), tolerance)
        close(rank["hidden"], hidden.grad, 10 * tolerance)
    close(torch.cat([rank["weight"] for rank in ranks]), weight.grad, 10 * tolerance)


def close(ours: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert float((ours - wanted).norm() / wanted.norm()) < tolerance


def test_a_loss_that_weighs_rows_differently_is_refused() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(AssertionError, match="one factor for all"):
        loss._HeadLoss.backward(None, weights)


@pytest.mark.parametrize(
    ("rows", "width", "size"),
    [
        (500, 400, 500),
        (0, 400, 1),
        (410, 152_064, 128),
        (3_277, 152_064, 409),
        (8_192, 19_008, 512),
    ],
)
def test_chunks_are_a_small_part_of_large_logits(rows: int, width: int, size: int) -> None:
    assert chunk_rows(rows, width, on_gpu=False) == size


@pytest.mark.parametrize(
    ("rows", "width", "size"),
    [
        (0, 400, 1),
        (500, 400, 500),
        (2_000, 152_064, 2_000),
        (4_096, 152_064, 2_048),
        (8_192, 19_008, 8_192),
        (300, 10**8, 100),
    ],
)
def test_chunks_on_a_gpu_are_few_and_alike(rows: int, width: int, size: int) -> None:
    assert chunk_rows(rows, width, on_gpu=True) == size
