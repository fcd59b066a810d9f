"""`ParityTask`: one global batch to compute through transformers and through an engine."""

from dataclasses import dataclass
from pathlib import Path

from roll_sft.config.schema import RunConfig
from roll_sft.data.steps.plan import StepPlan
from roll_sft.data.tokens.cache import TokenSet
from roll_sft.models.source import ModelSource


@dataclass(frozen=True, slots=True)
class ParityTask:
    """One global batch of `tokens`, with the weights of `source`.

    `plan` says which samples of `tokens`, and which rank runs them. What transformers computes is
    kept in `folder`, which every rank sees.
    """

    config: RunConfig
    source: ModelSource
    tokens: TokenSet
    plan: StepPlan
    folder: Path
