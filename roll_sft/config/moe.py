"""The section `moe`, of models with experts."""

from dataclasses import dataclass

from roll_sft.config.keys import key


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """What is trained of a model with experts besides the loss of its answers."""

    aux_loss_coef: float | None = key(
        None,
        "Coefficient of the loss that balances experts; null takes the model's own,"
        " 0 turns it off.",
        at_least=0,
        at_most=1e6,
    )
    z_loss_coef: float = key(
        0.0,
        "Coefficient of the z-loss of routers, which keeps their logits small.",
        at_least=0,
        at_most=1e6,
    )
    router_bias_update_rate: float = key(
        0.0,
        "Step of an expert's score bias, up below the mean load and down above it; GLM-4.5 and"
        " DeepSeek-V3 have them.",
        at_least=0,
        at_most=1,
    )
