"""A frozen linear layer and the adapters of its projections, as one function of autograd.

Autograd adds up the gradients of the inputs in a pass of its own. What adapters cost beside the
layer's own product are passes over [N, O], of which there are three: one forward, two backward.

Legend: N tokens, r rank, P adapted projections of a fused weight, I inputs and O outputs of the
layer on this tensor rank, R <= O outputs that have adapters. A is [P * r, I] and B is [R, r], those
of one projection after the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F


class FrozenLayer(Protocol):
    """The layer beside which adapters are."""

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, I] -> [N, O] with the bias, in memory of its own; differentiable."""
        ...

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """[N, O] -> [N, I], in memory of its own."""
        ...


@dataclass(frozen=True, slots=True)
class Projections:
    """Which outputs of the layer each projection's adapter adds to."""

    rank: int
    sizes: tuple[int, ...]  # how many outputs each projection has
    slices: tuple[slice, ...] | None  # these outputs, where each projection's lie together
    places: tuple[torch.Tensor, ...]  # else their int64 numbers, on the device
    num_outputs: int  # O

    def add(self, product: torch.Tensor, hidden: torch.Tensor, b: torch.Tensor) -> None:
        """Add `hidden` [N, P * r] by B to `product` [N, O]."""
        if self.slices is None:
            product.addmm_(hidden, self._joint(b).t())
            return
        for outputs, part, values in self._parts(hidden, b):
            product[:, outputs].addmm_(part, values.t())

    def hidden_gradient(self, gradient: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """That of `hidden` in `add`, [N, P * r]."""
        if self.slices is None:
            return gradient @ self._joint(b)
        found = gradient.new_empty(len(gradient), self.rank * len(self.sizes))
        for outputs, part, values in self._parts(found, b):
            part.copy_(gradient[:, outputs] @ values)
        return found

    def b_gradient(self, gradient: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """That of `b` in `add`, [R, r]."""
        if self.slices is not None:
            pairs = zip(self.slices, hidden.split(self.rank, dim=1), strict=True)
            return torch.cat([gradient[:, outputs].t() @ part for outputs, part in pairs])
        joint = (gradient.t() @ hidden).split(self.rank, dim=1)
        found = zip(self.places, joint, strict=True)
        return torch.cat([columns[places] for places, columns in found])

    def _parts(
        self, hidden: torch.Tensor, b: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Of each projection its outputs, its columns of `hidden` and its rows of B."""
        assert self.slices is not None, "outputs lie scattered"
        columns = hidden.split(self.rank, dim=1)
        yield from zip(self.slices, columns, b.split(self.sizes), strict=True)

    def _joint(self, b: torch.Tensor) -> torch.Tensor:
        """[O, P * r]: each row of B in the columns of its projection, in the layer's order.

        One product of it is faster than one of each projection, whose outputs lie scattered.
        """
        joint = b.new_zeros(self.num_outputs, self.rank * len(self.sizes))
        parts = zip(self.places, joint.split(self.rank, dim=1), b.split(self.sizes), strict=True)
        for places, columns, values in parts:
            columns[places] = values
        return joint


def slices_of(places: Sequence[torch.Tensor]) -> tuple[slice, ...] | None:
    """The int64 `places` of each projection's outputs as slices; None if some lie apart."""
    slices = []
    for each in places:
        first = int(each[0]) if len(each) else 0
        if not torch.equal(each, torch.arange(first, first + len(each))):
            return None
        slices.append(slice(first, first + len(each)))
    return tuple(slices)


class AdaptedProduct(torch.autograd.Function):
    """`layer` of rows, and scale * B A of them: [N, I] -> [N, O]."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        layer: FrozenLayer,
        where: tuple[Projections, float],
    ) -> torch.Tensor:
        projections, scale = where
        hidden = F.linear(rows, a).mul_(scale)
        product = layer.product(rows)
        projections.add(product, hidden, b)
        ctx.save_for_backward(rows, hidden, a, b)
        ctx.layer, ctx.where = layer, where
        return product

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, None, None]:
        rows, hidden, a, b = ctx.saved_tensors
        projections, scale = ctx.where
        hidden_gradient = projections.hidden_gradient(gradient, b).mul_(scale)
        rows_gradient = None
        if ctx.needs_input_grad[0]:
            rows_gradient = ctx.layer.input_gradient(gradient).addmm_(hidden_gradient, a)
        b_gradient = projections.b_gradient(gradient, hidden)
        return rows_gradient, hidden_gradient.t() @ rows, b_gradient, None, None


class AddedProduct(torch.autograd.Function):
    """`product` [N, O], which is overwritten, and scale * B of `hidden` [N, P * r]."""

    @staticmethod
    def forward(
        ctx: Any,
        product: torch.Tensor,
        hidden: torch.Tensor,
        b: torch.Tensor,
        where: tuple[Projections, float],
    ) -> torch.Tensor:
        projections, scale = where
        hidden = hidden * scale
        projections.add(product, hidden, b)
        ctx.save_for_backward(hidden, b)
        ctx.where = where
        ctx.mark_dirty(product)
        return product

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        hidden, b = ctx.saved_tensors
        projections, scale = ctx.where
        hidden_gradient = projections.hidden_gradient(gradient, b).mul_(scale)
        return gradient, hidden_gradient, projections.b_gradient(gradient, hidden), None
