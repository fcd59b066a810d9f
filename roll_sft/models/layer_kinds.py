"""Layers of two kinds, with a sliding window and without, as configurations list them."""

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from roll_sft.base.text import shown
from roll_sft.models.rotary import rotary_problems, rotary_table
from roll_sft.models.shape import ModelShape
from roll_sft.models.variation import LayerAttention, Variation

if TYPE_CHECKING:
    from transformers import Gemma2Config, Gemma3TextConfig, GptOssConfig, Olmo3Config

    KindConfig: TypeAlias = Gemma2Config | Gemma3TextConfig | GptOssConfig | Olmo3Config

_FULL, _SLIDING = "full_attention", "sliding_attention"


def kind_problems(config: "KindConfig", *, types: Collection[str], nested: bool) -> list[str]:
    """Value and rule of each setting of the kinds of layers that cannot be built.

    `types` are the values of rope_type that the family builds; `nested` says whether each kind of
    layer has an entry of its own in `rope_parameters`.
    """
    kinds, problems = config.layer_types or [], []
    if len(kinds) != config.num_hidden_layers or not set(kinds) <= {_FULL, _SLIDING}:
        problems.append(
            f"layer_types {shown(kinds)} (must be {_FULL} or {_SLIDING} for each of the"
            f" {config.num_hidden_layers} layers)"
        )
    if _SLIDING in kinds and config.sliding_window is None:
        problems.append(f"sliding_window null (must be a number, as layer_types has {_SLIDING})")
    rope = dict(config.rope_parameters or {})
    if not nested:
        return problems + rotary_problems(rope, types=types)
    for kind in sorted({*kinds} & {_FULL, _SLIDING}):
        found = rotary_problems(rope.get(kind) or {}, types=types)
        problems += [f"rope_parameters.{kind}: {problem}" for problem in found]
    return problems


def with_kinds(shape: ModelShape, config: "KindConfig", *, nested: bool) -> ModelShape:
    """`shape` with the rotary frequencies and windows of a `config` without `kind_problems`.

    The frequencies of each kind stand one after the other. A window that no sample outgrows is
    left out.
    """
    kinds = config.layer_types or []
    frequencies: tuple[float, ...] = ()
    by_kind: dict[str, LayerAttention] = {}
    window = config.sliding_window
    if window is not None and window >= shape.max_position_embeddings:
        window = None
    for kind in sorted(set(kinds)):
        if nested or not frequencies:
            table, scaling = rotary_table(config, layer_type=kind if nested else None)
            start, frequencies = len(frequencies), frequencies + table
        by_kind[kind] = LayerAttention(
            start,
            start + len(table),
            rotary_scaling=scaling,
            window=window if kind == _SLIDING else None,
        )
    variation = shape.variation or Variation(())
    variation = replace(variation, layers=tuple(by_kind[kind] for kind in kinds))
    return replace(shape, rotary_inv_freq=frequencies, variation=variation)
