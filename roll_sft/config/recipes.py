"""Keys of the section `train` that a plain run leaves alone, and the checks that need no model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from roll_sft.base.text import shown
from roll_sft.config.keeping import KeepingKeys
from roll_sft.config.keys import key

if TYPE_CHECKING:
    from roll_sft.config.schema import RunConfig, TrainConfig

ScheduleKind: TypeAlias = Literal[
    "cosine", "linear", "constant", "wsd", "inverse_sqrt", "polynomial", "cosine_with_restarts"
]
_LOSS = ("loss", "loss_reduction", "label_smoothing", "z_loss_coef")
CHANGE_STEP = (*_LOSS, "neftune_noise_alpha", "learning_rate_factors", "weight_decay_exclude")
MOST_FACTOR = 1e6
TIMESCALE = 10_000  # of inverse_sqrt without warmup, as in transformers


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeKeys(KeepingKeys):
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

    learning_rate_factors: dict[str, Any] = key(
        {},
        "Factors of the learning rate by patterns of modules, such as {embeddings: 0.1}; the last"
        " that fits counts.",
    )
    weight_decay_exclude: list[str] = key(
        [], "Modules without weight decay, by patterns as in freeze, such as embeddings."
    )
    loss: Literal["token_mean", "sample_mean"] = key(
        "token_mean",
        "What is minimised: the mean over supervised tokens, or over samples of each one's mean.",
    )
    loss_reduction: Literal["mean", "sum"] = key(
        "mean",
        "mean divides as train.loss says; sum adds up tokens and divides by samples, as Tulu 3"
        " trained.",
    )
    label_smoothing: float = key(
        0.0,
        "Share of each label that all tokens of the vocabulary have in common; below 1.",
        at_least=0,
    )
    z_loss_coef: float = key(
        0.0,
        "Adds this times the square of the logits' log-sum-exp to each token's loss.",
        at_least=0,
        at_most=1e6,
    )
    neftune_noise_alpha: float = key(
        0.0,
        "NEFTune: noise on embeddings in training, up to alpha / sqrt(tokens of the sample x"
        " hidden size).",
        at_least=0,
        at_most=1e6,
    )

    early_stopping: str | None = key(
        None,
        "Name of a validation set; the run ends when its loss improves no more.",
    )
    early_stopping_patience: int = key(
        3, "Evaluations without an improvement that end a run.", unit="evaluations", at_least=1
    )
    early_stopping_min_delta: float = key(
        0.0, "A loss improves if it is below the best by more than this.", at_least=0, at_most=1e6
    )

    @property
    def has_groups(self) -> bool:
        """Whether parameters have a learning rate or a weight decay of their own."""
        return bool(self.learning_rate_factors or self.weight_decay_exclude)

    @property
    def changes_loss(self) -> bool:
        """Whether a step minimises something else than the mean over tokens."""
        return any(is_set(self, name) for name in _LOSS)

    @property
    def changed_keys(self) -> tuple[str, ...]:
        """The keys by which a step computes something else than a plain one of all weights."""
        return tuple(name for name in CHANGE_STEP if is_set(self, name))

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
        if is_set(train, name) and train.lr_scheduler_type != kind:
            yield (
                f"train.{name}: {getattr(train, name)} has no effect with"
                f" train.lr_scheduler_type={train.lr_scheduler_type}; set {kind}, or leave it out"
            )
    yield from _stopping_problems(config)
    for pattern, factor in train.learning_rate_factors.items():
        is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if not (is_number and 0 < factor <= MOST_FACTOR):
            yield (
                f"train.learning_rate_factors: {shown(factor)} of {shown(pattern)} must be a number"
                f" above 0, at most {MOST_FACTOR:g}; train.freeze leaves modules out of training"
            )
    if train.label_smoothing >= 1:
        yield f"train.label_smoothing: {train.label_smoothing} must be below 1"
    if train.loss == "sample_mean" and train.loss_reduction == "sum":
        yield (
            "train.loss_reduction: sum is of tokens, and train.loss=sample_mean takes the mean of"
            " each sample; set one of them"
        )
    for name in ("freeze", "num_layers_unfrozen"):
        if config.lora.rank and is_set(train, name):
            yield (
                f"train.{name}: {shown(getattr(train, name))} has no effect with lora.rank"
                f" {config.lora.rank}, which trains adapters alone; choose them with"
                " lora.target_modules"
            )


def _stopping_problems(config: "RunConfig") -> Iterator[str]:
    train, name = config.train, config.train.early_stopping
    if name is None:
        for key_name in ("early_stopping_patience", "early_stopping_min_delta"):
            if is_set(train, key_name):
                yield (
                    f"train.{key_name}: {getattr(train, key_name)} has no effect without"
                    " train.early_stopping; name a validation set there"
                )
        return
    from roll_sft.config.schema import source_name  # which imports this module

    sets = [source_name(each) for each in config.data.validation]
    if name not in sets:
        yield (
            f"train.early_stopping: {shown(name)} is no validation set"
            f" ({', '.join(sets) or 'none is given'}); name one of data.validation"
        )
    if train.eval_steps is None:
        yield (
            f"train.early_stopping: {shown(name)} is evaluated at the end only; set"
            " train.eval_steps"
        )


def is_set(train: Any, name: str) -> bool:
    """Whether the key `name` of a recipe differs from its default."""
    return bool(getattr(train, name) != getattr(RecipeKeys(), name))
