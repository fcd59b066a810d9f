"""What an engine is built from, and what it is compared on.

Imports no Megatron, so the driver can make these and send them.
"""

from dataclasses import dataclass
from pathlib import Path

from roll_sft.config.schema import RunConfig
from roll_sft.data.steps.plan import StepPlan
from roll_sft.data.tokens.cache import TokenSet
from roll_sft.models.family import Family, ModelShape
from roll_sft.models.safetensors_in import TensorSource


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What is trained: its family and shape, and where its weights come from."""

    family: Family
    shape: ModelShape
    tensors: TensorSource


@dataclass(frozen=True, slots=True)
class TokenData:
    """The token caches of a run: one set to train on, validation sets by name."""

    train: TokenSet
    validation: dict[str, TokenSet]

    @property
    def folders(self) -> list[Path]:
        """The folders of all token caches, each once."""
        sets = [self.train, *self.validation.values()]
        return list(dict.fromkeys(cache.folder for tokens in sets for cache in tokens.caches))


@dataclass(frozen=True, slots=True)
class ParityTask:
    """One global batch to compute through transformers and through an engine, from `source`.

    `plan` says which samples of `tokens`, and which rank runs them. What transformers makes of them
    is kept in `folder`, which every rank sees.
    """

    config: RunConfig
    source: ModelSource
    tokens: TokenSet
    plan: StepPlan
    folder: Path
