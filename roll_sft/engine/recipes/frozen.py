"""Parameters that a rank does not train: no gradient, no optimizer state, not in a checkpoint.

A checkpoint holds what is trained, each layer's part under a name of its own; the rest is that of
the base model. Megatron joins equal layers in one stored tensor, which would not be whole.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from roll_sft.config.schema import RunConfig
from roll_sft.engine.build import named_parameters
from roll_sft.engine.layers import LayerConfig
from roll_sft.engine.state import Place, Places
from roll_sft.models.frozen import frozen_parameters
from roll_sft.models.source import ModelSource


def freeze(
    chunks: Sequence[GPTModel], source: ModelSource, config: RunConfig, *, layers: LayerConfig
) -> None:
    """Take what `config.train` freezes out of training, before gradients have buffers."""
    frozen = frozen_parameters(source.family, source.shape, config.train)
    for name, parameter in named_parameters(list(chunks)):
        parameter.requires_grad_(name not in frozen)
    if any(each.requires_grad for each in chunks[0].decoder.parameters()):
        keep_gradients_of_recomputed(chunks, layers)


def keep_gradients_of_recomputed(chunks: Sequence[GPTModel], layers: LayerConfig) -> None:
    """Let the embedding's output have a gradient, also of a frozen embedding.

    What is recomputed has a backward only if its input has a gradient.
    """
    if layers.recompute_granularity is not None and chunks[0].pre_process:
        chunks[0].embedding.register_forward_hook(_require_gradient)


def _require_gradient(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


def trained_places(chunks: list[GPTModel]) -> list[Place]:
    """Where each number that is trained lies in the tensors that a checkpoint holds."""
    places = Places(chunks)
    return [
        _of_one_layer(place)
        for _, parameter in named_parameters(chunks)
        if parameter.requires_grad
        for place in places.within(parameter)
    ]


def _of_one_layer(place: Place) -> Place:
    """The same place in a tensor of its layer alone; of other parameters as it is."""
    piece, layers = place.piece, "decoder.layers."
    if not piece.key.startswith(layers):
        return place
    layer = replace(
        piece,
        key=f"{layers}{piece.offset[0]}.{piece.key.removeprefix(layers)}",
        shape=piece.shape[1:],
        offset=piece.offset[1:],
        tensor=piece.tensor[0],
    )
    return replace(place, piece=layer)
