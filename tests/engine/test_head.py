"""The head in chunks gives the loss and the gradients of whole logits, on one rank and on two."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from roll_sft.base.metrics import chunk_rows
from roll_sft.config.schema import layout_of
from roll_sft.engine import loss
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


def added_to_buffer(dtype: torch.dtype, shares_embedding: bool) -> dict[str, Any]:
    """On a rank of a pool: what a head that adds to the buffer leaves, beside one that does not.

    Few rows, in chunks, so that nothing but the weight has the weight's size.
    """
    from megatron.core import parallel_state

    hidden, weight, labels = (each[:20] if len(each) == ROWS else each for each in inputs())
    hidden, width = hidden.to(dtype), WORDS // parallel_state.get_tensor_model_parallel_world_size()
    first = parallel_state.get_tensor_model_parallel_rank() * width
    local = weight[first : first + width].to(dtype)
    plain, exact, ours = (
        torch.nn.Parameter(each.clone()) for each in (local, local.double(), local)
    )
    # As DistributedDataParallel and an embedding of the same weight mark it.
    marks: dict[str, Any] = {"main_grad": torch.zeros(width, HIDDEN)}
    vars(ours).update(marks | ({"zero_out_wgrad": True} if shares_embedding else {}))
    sizes, labels_of = _Sizes(), {"labels": labels, "vocab_size": REAL_WORDS}
    with patch.object(loss, "chunk_rows", lambda *_, **__: 7):
        whole = loss.cross_entropy_of_rows(hidden, plain, **labels_of)
        whole.sum().backward()
        loss.cross_entropy_of_rows(hidden.double(), exact, **labels_of).sum().backward()
        rows = hidden.requires_grad_()
        with sizes:
            losses = loss.cross_entropy_of_rows(rows, ours, **labels_of, adds_to_buffer=True)
            losses.sum().backward()
    assert plain.grad is not None
    assert exact.grad is not None
    return {
        "same losses": torch.equal(losses, whole),
        "same gradient": torch.equal(marks["main_grad"], plain.grad),
        "error": float((marks["main_grad"] - exact.grad).norm()),
        "error otherwise": float((plain.grad - exact.grad).norm()),
        "is small": sizes.largest < ours.numel(),
        "gradient": None if ours.grad is None else ours.grad._nnz(),
        "is added": getattr(ours, "grad_added_to_main_grad", None),
    }


class _Sizes(TorchDispatchMode):
    """The most numbers of a tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        before = {_memory(each) for each in args if isinstance(each, torch.Tensor)}
        if isinstance(made, torch.Tensor) and _memory(made) not in before:
            self.largest = max(self.largest, made.numel() if made.layout == torch.strided else 0)
        return made


def _memory(tensor: torch.Tensor) -> int | None:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else None


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_head_adds_to_the_buffer_and_makes_nothing_of_its_size(
    workers: int, pool: RankPool
) -> None:
    parallel = {"num_workers": workers, "tensor_model_parallel_size": workers}
    layout = layout_of(parity.parity_config(parity.Path("unused"), parallel=parallel).parallel)
    for found in pool.run(added_to_buffer, layout, torch.float32, False):
        assert found["same losses"]
        assert found["same gradient"]
        assert found["is small"]
        assert (found["gradient"], found["is added"]) == (0, True)
    for found in pool.run(added_to_buffer, layout, torch.float32, True):
        assert found["same gradient"]
        assert (found["gradient"], found["is added"]) == (None, None)
    # In half precision nothing is rounded on the way to the buffer.
    for found in pool.run(added_to_buffer, layout, torch.bfloat16, False):
        assert found["same losses"]
        assert found["error"] < 0.95 * found["error otherwise"]


@pytest.mark.parametrize("num_real", [8, 6])
def test_the_compiled_parts_of_the_softmax_are_a_softmax(num_real: int) -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    logits[:, 6:] += 9.0  # padding that would be noticed
    local = torch.tensor([[0], [3], [-1], [5], [2]])
    wanted = logits[:, :num_real].softmax(dim=1)
    for row, column in enumerate(local[:, 0].tolist()):
        wanted[row, column] -= float(column >= 0)
    largest, total = loss.exponential_sums(logits, num_real)
    assert torch.equal(largest, logits[:, :num_real].amax(dim=1, keepdim=True))
    sums = largest + total.log()
    close(sums[:, 0], torch.logsumexp(logits[:, :num_real], dim=1), 1e-6)
    gradient = loss.logit_gradient(logits, largest, total, local, num_real)
    close(gradient[:, :num_real], wanted, 1e-6)
    assert not gradient[:, num_real:].any()


def test_a_loss_that_weighs_rows_differently_is_refused() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(AssertionError, match="one factor for all"):
        loss.HeadLoss.backward(None, weights)


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
