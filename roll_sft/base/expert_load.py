"""What a step reports of a model's experts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Tokens of one step on the experts, for its line of `steps.jsonl`; padding goes to none.

    `tokens_per_expert` sums over layers, `expert_max_over_mean` is that of the worst layer, and
    `expert_aux_loss` is without its coefficient. The field names are public.
    """

    expert_aux_loss: float
    expert_max_over_mean: float
    dropped_tokens: int
    tokens_per_expert: tuple[int, ...]
