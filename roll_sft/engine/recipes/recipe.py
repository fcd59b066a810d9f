"""What an engine does beside a plain full fine-tune: the parts of a recipe on one rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from roll_sft.base.layout import Coordinate, ParallelLayout
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.data.steps.plan import RankWork
from roll_sft.data.tokens.cache import TokenSet
from roll_sft.engine.layers import LayerConfig
from roll_sft.engine.micro_batch import Indices, MicroBatch
from roll_sft.engine.state import Place
from roll_sft.models.source import ModelSource

if TYPE_CHECKING:
    from megatron.core.optimizer.optimizer_config import ParamKey

    from roll_sft.engine.adapters.lora import Adapters
    from roll_sft.engine.recipes.neftune import Neftune
    from roll_sft.engine.recipes.objective import Terms


@dataclass(frozen=True, slots=True)
class Recipe:
    """The parts of a recipe; None of those that the run does not have."""

    chunks: list[GPTModel]
    trained_on: TokenSet  # noise and loss terms are for these, and not for validation sets
    layout: ParallelLayout
    rank: Coordinate
    freezes: bool  # whether some of the model's own weights are trained, and not all
    adapters: "Adapters | None"
    noise: "Neftune | None"
    terms: "Terms | None"
    overrides: dict["ParamKey", Any] | None = None  # of Megatron's optimizer

    def keyed(
        self, batches: list[MicroBatch], indices: Indices, tokens: TokenSet
    ) -> list[MicroBatch]:
        """`batches` of the samples `indices` of `tokens`, with what the parts need of each."""
        if self.adapters is not None:
            batches = self.adapters.keyed(batches, indices, self.layout, self.rank)
        if tokens is self.trained_on and self.noise is not None:
            batches = self.noise.attached(
                batches, indices, tokens, layout=self.layout, rank=self.rank
            )
        if tokens is self.trained_on and self.terms is not None:
            batches = self.terms.attached(
                batches, indices, tokens, layout=self.layout, rank=self.rank
            )
        return batches

    def begin_step(self, work: RankWork) -> None:
        """Called before the forward of the step of `work`."""
        if self.adapters is not None:
            self.adapters.begin_step(work.step)
        if self.noise is not None:
            self.noise.begin_step(work.step)
        if self.terms is not None:
            self.terms.scale = work.loss_scale

    def begin_pack(self, batch: MicroBatch) -> None:
        """Called before the forward of `batch`."""
        if self.noise is not None:
            self.noise.begin_pack(batch)

    def report(self, report: torch.Tensor) -> torch.Tensor:
        """What a pass tells, float64 [loss sum, tokens], with the sums of loss terms behind."""
        return report if self.terms is None else self.terms.report(report)

    def places(self) -> list[Place] | None:
        """Where what is trained lies in the tensors of a checkpoint; None if that is all."""
        if self.adapters is not None:
            return self.adapters.places()
        if not self.freezes:
            return None
        from roll_sft.engine.recipes.frozen import trained_places

        return trained_places(self.chunks)


def prepared(
    chunks: Sequence[GPTModel],
    source: ModelSource,
    config: RunConfig,
    *,
    layers: LayerConfig,
    data: TokenSet,
    is_new: bool,
) -> Recipe:
    """Make of the loaded `chunks` what `config` trains on `data`.

    See `lora.adapted` on `is_new`.
    """
    train, layout = config.train, layout_of(config.parallel)
    adapters, noise, terms, overrides = None, None, None, None
    if config.lora.rank:
        from roll_sft.engine.adapters.lora import adapted

        adapters = adapted(chunks, source, config, layers=layers, is_new=is_new)
    if train.freezes:
        from roll_sft.engine.recipes.frozen import freeze

        freeze(chunks, source, config, layers=layers)
    if train.neftune_noise_alpha:
        from roll_sft.engine.recipes.neftune import Neftune

        noise = Neftune(
            train.neftune_noise_alpha,
            seed=config.seed,
            hidden_size=source.shape.hidden_size,
            is_compiled=layers.is_compiled,
        )
        noise.follow(chunks)
    if train.changes_loss or data.weights is not None:
        from roll_sft.engine.recipes.objective import Terms

        layers.loss_terms = terms = Terms(train, layers.is_compiled)
    if train.has_groups:
        from roll_sft.engine.recipes.parameter_groups import group_overrides

        overrides = group_overrides(chunks, source, train)
    rank = layout.coordinate(dist.get_rank())
    return Recipe(
        list(chunks), data, layout, rank, train.freezes, adapters, noise, terms, overrides
    )
