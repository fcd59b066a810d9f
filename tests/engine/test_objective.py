"""Loss terms in the head against torch's cross_entropy on whole logits, on one rank and on two."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from roll_sft.base.layout import ParallelLayout
from roll_sft.config.schema import TrainConfig
from roll_sft.data.steps.objective import row_factors, step_scale
from roll_sft.engine import loss
from tests.engine.test_head import REAL_WORDS, ROWS, WORDS, inputs
from tests.pool import RankPool

KEYS: dict[str, dict[str, Any]] = {
    "smoothing": {"label_smoothing": 0.1},
    "z": {"z_loss_coef": 1e-2},
    "both": {"label_smoothing": 0.2, "z_loss_coef": 3e-3},
}
SCALE = 0.7
FACTORS = torch.linspace(0, 2, ROWS)


def in_chunks(keys: dict[str, Any], is_compiled: bool) -> dict[str, Any]:
    """On a rank of a pool: the objective of each row, gradients of its sum, and what is told."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    from roll_sft.engine.micro_batch import SupervisedRows
    from roll_sft.engine.recipes.objective import Terms, objective_of_rows

    hidden, weight, labels = inputs()
    width = WORDS // parallel_state.get_tensor_model_parallel_world_size()
    first = parallel_state.get_tensor_model_parallel_rank() * width
    ours = weight[first : first + width].clone().requires_grad_()
    rows = hidden.requires_grad_()
    terms = Terms(TrainConfig(**keys), is_compiled=is_compiled, scale=SCALE)
    config = SimpleNamespace(loss_terms=terms, variation=None, gradient_accumulation_fusion=False)
    context = SupervisedRows(torch.arange(ROWS), None, labels, REAL_WORDS, False, FACTORS)
    small, loss.chunk_rows = loss.chunk_rows, lambda *_, **__: 7
    try:
        entered = copy_to_tensor_model_parallel_region(rows)
        objective = objective_of_rows(entered, ours, context, config=config)
    finally:
        loss.chunk_rows = small
    objective.sum().backward()
    told = terms.report(torch.zeros(2, dtype=torch.float64))
    return {"rows": objective.detach(), "hidden": rows.grad, "weight": ours.grad, "told": told}


def whole(keys: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same of whole logits in float64."""
    hidden, weight, labels = (each.double() if each.is_floating_point() else each
                              for each in inputs())  # fmt: skip
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = (hidden @ weight.t())[:, :REAL_WORDS]
    share, coef = keys.get("label_smoothing", 0.0), keys.get("z_loss_coef", 0.0)
    plain = F.cross_entropy(logits, labels, reduction="none")
    smoothed = F.cross_entropy(logits, labels, reduction="none", label_smoothing=share)
    z_loss = coef * logits.logsumexp(1).square()
    rows = (smoothed + z_loss) * FACTORS.double() * SCALE
    rows.sum().backward()
    parts = (plain, rows, smoothed - plain, z_loss)
    loss_sum, *sums = (part.detach().sum() for part in parts)
    told = torch.stack([loss_sum, torch.zeros(()).double(), *sums])
    assert hidden.grad is not None
    assert weight.grad is not None
    return {"rows": rows.detach(), "hidden": hidden.grad, "weight": weight.grad, "told": told}


def check(keys: dict[str, Any], workers: int, pool: RankPool, *, is_compiled: bool) -> None:
    layout = ParallelLayout(workers, tensor_size=workers)
    ranks, wanted = pool.run(in_chunks, layout, keys, is_compiled), whole(keys)
    for rank in ranks:
        torch.testing.assert_close(rank["rows"].double(), wanted["rows"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rank["told"], wanted["told"], rtol=1e-6, atol=1e-6)
    # Each rank holds its part of a sum over the ranks, and its own words of the weight.
    hidden = ranks[0]["hidden"]  # the copy into the region has added it up
    weight = torch.cat([rank["weight"] for rank in ranks])
    torch.testing.assert_close(hidden.double(), wanted["hidden"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.double(), wanted["weight"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", KEYS)
def test_terms_in_chunks_are_those_of_whole_logits(name: str, workers: int, pool: RankPool) -> None:
    check(KEYS[name], workers, pool, is_compiled=False)


@pytest.mark.slow
def test_compiled_terms_are_those_of_whole_logits(
    pool: RankPool, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--all-layouts"):
        pytest.skip("compiles for half a minute: with --all-layouts")
    check(KEYS["both"], 2, pool, is_compiled=True)


WEIGHTS = np.array([1.0, 0.5, 3.0], np.float32)
SUPERVISED = np.array([4, 1, 5], np.int32)


@pytest.mark.parametrize(
    ("keys", "weights", "factors", "denominator"),
    [
        ({}, WEIGHTS, WEIGHTS, 4 + 0.5 + 15),
        ({"loss": "sample_mean"}, None, [1 / 4, 1, 1 / 5], 3),
        ({"loss": "sample_mean"}, WEIGHTS, [1 / 4, 0.5, 3 / 5], 4.5),
        ({"loss_reduction": "sum"}, None, [1, 1, 1], 3),
        ({"loss_reduction": "sum"}, WEIGHTS, WEIGHTS, 3),
        ({"z_loss_coef": 1e-4}, None, [1, 1, 1], 10),
    ],
)
def test_factors_and_denominator_of_each_objective(
    keys: dict[str, Any], weights: Any, factors: Any, denominator: float
) -> None:
    train = TrainConfig(**keys)
    assert row_factors(train, SUPERVISED, weights) == pytest.approx(factors)
    assert step_scale(train, SUPERVISED, weights) == pytest.approx(10 / denominator)
