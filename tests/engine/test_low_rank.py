"""The product of a frozen layer and its adapters against autograd's, in float64."""

import pytest
import torch
import torch.nn.functional as F

from roll_sft.engine.adapters.adapted_linear import FrozenDense
from roll_sft.engine.adapters.low_rank import AdaptedProduct, AddedProduct, Projections, slices_of

RANK, SCALE = 2, 0.75
# Where each projection's outputs lie among 12: together, between those of others, in part.
PLACES = {
    "together": [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]],
    "scattered": [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]],
    "one": [[4, 5, 6]],
    "none_here": [[0, 1], []],
}


@pytest.fixture(params=PLACES)
def projections(request: pytest.FixtureRequest) -> Projections:
    places = tuple(torch.tensor(each, dtype=torch.int64) for each in PLACES[request.param])
    slices = slices_of(places)
    assert (slices is None) == (request.param == "scattered")
    return Projections(RANK, tuple(map(len, places)), slices, places, num_outputs=12)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def added(hidden: torch.Tensor, b: torch.Tensor, projections: Projections) -> torch.Tensor:
    """scale * B of `hidden`, projection by projection."""
    product = hidden.new_zeros(len(hidden), 12)
    sizes = [len(places) for places in projections.places]
    parts = zip(projections.places, hidden.split(RANK, dim=1), b.split(sizes), strict=True)
    for places, part, values in parts:
        product = product.index_add(1, places, SCALE * part @ values.t())
    return product


@pytest.mark.parametrize("has_bias", [True, False])
def test_product_and_gradients_are_autograds(projections: Projections, has_bias: bool) -> None:
    torch.manual_seed(5)
    count = len(projections.places)
    rows, a, b = (
        numbers(7, 4),
        numbers(RANK * count, 4),
        numbers(sum(map(len, projections.places)), RANK),
    )
    weight, bias = numbers(12, 4).detach(), numbers(12).detach() if has_bias else None
    wanted = F.linear(rows, weight, bias) + added(F.linear(rows, a), b, projections)
    found = AdaptedProduct.apply(rows, a, b, FrozenDense(weight, bias), (projections, SCALE))
    check(found, wanted, (rows, a, b))


def test_what_is_added_and_its_gradients_are_autograds(projections: Projections) -> None:
    torch.manual_seed(6)
    product, hidden = numbers(7, 12), numbers(7, RANK * len(projections.places))
    b = numbers(sum(map(len, projections.places)), RANK)
    wanted = product + added(hidden, b, projections)
    found = AddedProduct.apply(product * 1, hidden, b, (projections, SCALE))
    check(found, wanted, (product, hidden, b))


def check(found: torch.Tensor, wanted: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    gradient = torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    theirs = torch.autograd.grad(wanted, inputs, gradient)
    for one, other in zip(torch.autograd.grad(found, inputs, gradient), theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
