"""Faults to plant in an engine, and what parity must say of each: the tensor where it begins.

Planted in a process of the engine's alone; the oracle and the weight mappings stay right.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from roll_sft.models.files.safetensors_in import Shape, TensorSource


@dataclass(frozen=True)
class Fault:
    """`kind` is the model to plant it in, `named` the beginning of parity's answer at 2 ranks."""

    kind: str
    named: str


BEHIND_THE_OUTPUTS = "though every module's output agrees, so look at labels, loss mask and head"
FAULTS = {
    "another RoPE base": Fault(
        "qwen2",
        "the output of model.layers.0.self_attn.o_proj.weight"
        " (decoder.layers.0.self_attention.linear_proj.weight) differs by",
    ),
    "gate and up swapped": Fault(
        "qwen2",
        "the output of model.layers.0.mlp.gate_proj.weight"
        " (decoder.layers.0.mlp.linear_fc1.weight) differs by",
    ),
    "no norm of queries and keys": Fault(
        "qwen3",
        "model.layers.0.self_attn.q_norm.weight"
        " (decoder.layers.0.self_attention.q_layernorm.weight) is on no rank",
    ),
    "labels not shifted": Fault(
        "qwen2",
        f"{BEHIND_THE_OUTPUTS}; first tensor: the gradient of lm_head.weight (output_layer.weight)",
    ),
    "padded vocabulary in the softmax": Fault(
        "qwen2",
        f"{BEHIND_THE_OUTPUTS}; first tensor: the gradient of lm_head.weight (output_layer.weight)",
    ),
    "hidden gradient not reduced over the tensor group": Fault(
        "qwen2",
        "outputs and losses agree, so look at the backward pass; first tensor: the gradient of"
        " model.norm.weight (decoder.final_layernorm.weight)",
    ),
}


@contextlib.contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """The engine of this process has `fault` while the block builds and runs it."""
    with contextlib.ExitStack() as stack:
        if fault is not None:
            stack.enter_context(_patch(fault))
        yield


def _patch(fault: str) -> Any:
    from roll_sft.engine import build, loss, micro_batch

    build_model, load_weights, build_batch = (
        build.build_model,
        build.load_weights,
        micro_batch.build_batch,
    )
    if fault == "another RoPE base":
        rotary_frequencies = build.rotary_frequencies

        def slower(shape: Any) -> torch.Tensor:
            size = len(shape.rotary_inv_freq)
            frequencies = tuple(10_000.0 ** (-index / size) for index in range(size))
            return rotary_frequencies(replace(shape, rotary_inv_freq=frequencies))

        return patch.object(build, "rotary_frequencies", slower)
    if fault == "no norm of queries and keys":

        def without(shape: Any, *args: Any, **options: Any) -> Any:
            return build_model(replace(shape, qk_norm="none"), *args, **options)

        return patch.object(build, "build_model", without)
    if fault == "gate and up swapped":

        def swapped(*args: Any, source: TensorSource) -> None:
            load_weights(*args, source=_Swapped(source))

        return patch.object(build, "load_weights", swapped)
    if fault == "labels not shifted":

        def unshifted(*args: Any, **options: Any) -> Any:
            batch = build_batch(*args, **options)
            return replace(batch, row_labels=batch.tokens_T[0][batch.rows])

        return patch.object(micro_batch, "build_batch", unshifted)
    if fault == "padded vocabulary in the softmax":
        return patch.object(loss, "cross_entropy_of_rows", partial(_unmasked, _cross_entropy()))
    assert fault == "hidden gradient not reduced over the tensor group", fault
    return patch.object(loss, "copy_to_tensor_model_parallel_region", lambda rows: rows)


def _cross_entropy() -> Any:
    from roll_sft.engine.loss import cross_entropy_of_rows

    return cross_entropy_of_rows


def _unmasked(original: Any, *tensors: torch.Tensor, vocab_size: int, **options: bool) -> Any:
    return original(*tensors, vocab_size=1 << 30, **options)


class _Swapped:
    """A `TensorSource` that gives each gate for its up projection, and the other way round."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    def names(self) -> frozenset[str]:
        return self._source.names()

    def shape(self, name: str) -> Shape:
        return self._source.shape(_other(name))

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(_other(name))

    def read_slice(self, name: str, *, start: int, stop: int, dim: int) -> torch.Tensor:
        return self._source.read_slice(_other(name), start=start, stop=stop, dim=dim)


def _other(name: str) -> str:
    for one, other in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
        if one in name:
            return name.replace(one, other)
    return name
