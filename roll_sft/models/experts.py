"""`ExpertShape`: all the numbers of the experts of a decoder. Imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roll_sft.models.shape import ModelShape


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The experts that take the place of every layer's MLP.

    A router of `num_experts` x hidden size weights gives each token a softmax over all experts, of
    which the `experts_per_token` largest are chosen. With `is_normalized` their weights are divided
    by their sum. `shared_ffn_hidden_size` is the width of an MLP that every token goes through, 0
    if there is none; with `has_shared_gate` a sigmoid of one more product scales its output.
    `aux_loss_coef` is the coefficient of the auxiliary loss in the model's config.json. With
    `has_biases` the router and every projection of an expert have one, and experts are of gpt-oss'
    kind: their gates g and what these gate, u, are clamped by `gate_limit`, and an expert projects
    (u + 1) * g * sigmoid(`gate_slope` * g).
    """

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int
    is_normalized: bool
    aux_loss_coef: float
    shared_ffn_hidden_size: int = 0
    has_shared_gate: bool = False
    has_biases: bool = False
    gate_limit: float = 0.0
    gate_slope: float = 1.0

    def width(self, *, is_active: bool) -> int:
        """Rows of the router and of all expert matrices of a layer, each of hidden size columns.

        With `is_active` those that a token is multiplied by.
        """
        number = self.experts_per_token if is_active else self.num_experts
        widths = number * self.ffn_hidden_size + self.shared_ffn_hidden_size
        return self.num_experts + self.has_shared_gate + 3 * widths

    def num_biases(self, hidden_size: int, *, is_active: bool = False) -> int:
        """Of the router and of all experts of a layer, or with `is_active` of those of a token."""
        number = self.experts_per_token if is_active else self.num_experts
        each = 2 * self.ffn_hidden_size + hidden_size
        return self.has_biases * (self.num_experts + number * each)


def num_active_parameters(shape: "ModelShape") -> int:
    """Trained numbers that one token uses, without the experts that it is not sent to."""
    assert shape.experts is not None, f"{shape.architecture} has no experts"
    every, active = (
        shape.hidden_size * shape.experts.width(is_active=each)
        + shape.experts.num_biases(shape.hidden_size, is_active=each)
        for each in (False, True)
    )
    return shape.num_parameters - shape.num_layers * (every - active)
