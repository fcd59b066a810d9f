"""What an engine does beside a plain full fine-tune: adapters, frozen weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.core.models.gpt import GPTModel

from roll_sft.base.layout import Coordinate, ParallelLayout
from roll_sft.config.schema import RunConfig
from roll_sft.engine.layers import LayerConfig
from roll_sft.engine.micro_batch import Indices, MicroBatch
from roll_sft.engine.state import Place
from roll_sft.models.source import ModelSource

if TYPE_CHECKING:
    from roll_sft.engine.lora import Adapters


@dataclass(frozen=True, slots=True)
class Recipe:
    """The parts of a recipe on one rank; None where it has no such part."""

    chunks: list[GPTModel]
    adapters: "Adapters | None"
    is_frozen: bool  # whether some of the model's own weights are trained, and not all

    def keyed(
        self,
        batches: list[MicroBatch],
        indices: Indices,
        layout: ParallelLayout,
        rank: Coordinate,
    ) -> list[MicroBatch]:
        """`batches` of the samples `indices`, with what the parts need of each token."""
        if self.adapters is None:
            return batches
        return self.adapters.keyed(batches, indices, layout, rank)

    def begin_step(self, step: int) -> None:
        """Called before the forward of step `step`."""
        if self.adapters is not None:
            self.adapters.begin_step(step)

    def places(self) -> list[Place] | None:
        """Where what is trained lies in the tensors of a checkpoint; None if that is all."""
        if self.adapters is not None:
            return self.adapters.places()
        if not self.is_frozen:
            return None
        from roll_sft.engine.frozen import trained_places

        return trained_places(self.chunks)


def prepared(
    chunks: Sequence[GPTModel],
    source: ModelSource,
    config: RunConfig,
    *,
    layers: LayerConfig,
    is_new: bool,
) -> Recipe:
    """Make of the loaded `chunks` what `config` trains; see `lora.adapted` on `is_new`."""
    adapters = None
    if config.lora.rank:
        from roll_sft.engine.lora import adapted

        adapters = adapted(chunks, source, config, layers=layers, is_new=is_new)
    if config.train.freezes:
        from roll_sft.engine.frozen import freeze

        freeze(chunks, source, config, layers=layers)
    return Recipe(list(chunks), adapters, config.train.freezes)
