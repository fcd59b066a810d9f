"""`ExpertShape`: all the numbers of the experts of a decoder. Imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roll_sft.models.shape import ModelShape


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The experts that take the place of the layers' MLP.

    A router of `num_experts` x hidden size weights gives each token a score for each expert: a
    softmax over all of them, or with `has_sigmoid` each one's sigmoid. The `experts_per_token` of
    the largest scores are chosen. A router with `has_sigmoid` adds a bias to the scores for the
    choice alone, and chooses among the `groups_per_token` of `num_groups` groups whose two best
    have the largest sum. With `is_normalized` the scores of the chosen are divided by their sum;
    `weight_scale` multiplies them. The first `num_dense_layers` layers have an MLP.
    `shared_ffn_hidden_size` is the width of an MLP that every token goes through, 0 if there is
    none; with `has_shared_gate` a sigmoid of one more product scales its output. `aux_loss_coef` is
    the coefficient of the auxiliary loss in the model's config.json. With `has_biases` the router
    and every projection of an expert have one, and experts are of gpt-oss' kind: their gates g and
    what these gate, u, are clamped by `gate_limit`, and an expert projects
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
    has_sigmoid: bool = False
    num_groups: int = 1
    groups_per_token: int = 1
    weight_scale: float = 1.0
    num_dense_layers: int = 0

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
    return shape.num_parameters - shape.num_expert_layers * (every - active)
