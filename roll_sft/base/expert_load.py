"""What a step reports of a model's experts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Tokens of one step on the experts, for its line of `steps.jsonl`; padding goes to none.

    `tokens_per_expert` sums over layers, `expert_max_over_mean` is that of the worst layer, and
    `expert_aux_loss` and `expert_z_loss` are without their coefficients; the second is None where
    that is 0. The field names are public.
    """

    expert_aux_loss: float
    expert_max_over_mean: float
    dropped_tokens: int
    tokens_per_expert: tuple[int, ...]
    expert_z_loss: float | None = None
