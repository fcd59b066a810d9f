"""Keys of the section `train` that a plain run leaves alone, and the checks that need no model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from roll_sft.base.text import shown
from roll_sft.config.keys import key

if TYPE_CHECKING:
    from roll_sft.config.schema import RunConfig, TrainConfig

ScheduleKind: TypeAlias = Literal[
    "cosine", "linear", "constant", "wsd", "inverse_sqrt", "polynomial", "cosine_with_restarts"
]
TIMESCALE = 10_000  # of inverse_sqrt without warmup, as in transformers


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeKeys:
    """The keys of recipes; the section `train` has them beside its own."""

    wsd_decay_ratio: float = key(0.1, "Share of steps that wsd decays over.", at_least=0, at_most=1)
    polynomial_power: float = key(
        1.0, "Power of the polynomial schedule; 1 is linear.", above=0, at_most=1000
    )
    cosine_cycles: int = key(
        1,
        "Times that cosine_with_restarts falls from the highest rate.",
        unit="cycles",
        at_least=1,
        at_most=1_000_000,
    )
    inverse_sqrt_timescale: int | None = key(
        None,
        "inverse_sqrt divides by the root of steps / timescale; null takes the warmup's steps, or"
        f" {TIMESCALE} without warmup.",
        unit="steps",
        at_least=1,
    )
    freeze: list[str] = key(
        [],
        "Modules that are not trained: parts of their names, wildcards allowed, such as"
        " embed_tokens or layers.[0-3].mlp.",
    )
    num_layers_unfrozen: int = key(
        -1,
        "Last layers to train; those before and the embedding are not, and with 0 the head is not."
        " -1 trains all.",
        unit="layers",
        at_least=-1,
    )

    @property
    def freezes(self) -> bool:
        """Whether a part of the model is not trained."""
        return bool(self.freeze) or self.num_layers_unfrozen >= 0


def schedule_parameter(train: "TrainConfig", *, warmup_steps: int) -> float | None:
    """What the schedule of `train` has beside rates and steps; None for most kinds."""
    return {
        "polynomial": train.polynomial_power,
        "cosine_with_restarts": train.cosine_cycles,
        "inverse_sqrt": train.inverse_sqrt_timescale or warmup_steps or TIMESCALE,
    }.get(train.lr_scheduler_type)


_OF_SCHEDULES = {
    "polynomial_power": "polynomial",
    "cosine_cycles": "cosine_with_restarts",
    "inverse_sqrt_timescale": "inverse_sqrt",
}


def recipe_problems(config: "RunConfig") -> Iterator[str]:
    """What is wrong with the keys of recipes, alone and with the other sections."""
    train = config.train
    for name, kind in _OF_SCHEDULES.items():
        if _is_set(train, name) and train.lr_scheduler_type != kind:
            yield (
                f"train.{name}: {getattr(train, name)} has no effect with"
                f" train.lr_scheduler_type={train.lr_scheduler_type}; set {kind}, or leave it out"
            )
    for name in ("freeze", "num_layers_unfrozen"):
        if config.lora.rank and _is_set(train, name):
            yield (
                f"train.{name}: {shown(getattr(train, name))} has no effect with lora.rank"
                f" {config.lora.rank}, which trains adapters alone; choose them with"
                " lora.target_modules"
            )


def _is_set(train: Any, name: str) -> bool:
    return bool(getattr(train, name) != getattr(RecipeKeys(), name))
