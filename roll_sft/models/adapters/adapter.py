"""Which parameters of a model LoRA adapts, by the names of Hugging Face, PEFT and Megatron.

Megatron fuses query, key and value, and gate and up. Each of these projections has an adapter of
its own all the same, as in PEFT: A of [r, I] and B of [O, r] for a weight of [O, I]. Adapters are
stored by PEFT's names, here as in every checkpoint of them.

Legend: r rank, I inputs and O outputs of a projection, D hidden size, V vocab.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from roll_sft.base.text import shown
from roll_sft.config.lora import ALL_LINEAR, LoraConfig
from roll_sft.models.family import Family
from roll_sft.models.files.safetensors_in import Shape
from roll_sft.models.fused_rows import FusedRows
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import family_named
from roll_sft.models.weight_map import QKV, GatedMLP, SingleTensor, VocabSplit, WeightMapping

_PREFIX = "base_model.model."
# Of these models PEFT 0.21 takes the names of MLP projections for the routed experts', shared
# experts and dense layers too: no adapter_config.json has it load adapters of the latter.
_ATTENTION_ALONE = frozenset({"Glm4MoeForCausalLM"})


@dataclass(frozen=True, slots=True)
class AdaptedWeight:
    """A fused weight of Megatron's, and the Hugging Face modules in it that get adapters."""

    mapping: WeightMapping
    modules: tuple[str, ...]  # such as model.layers.0.self_attn.q_proj, in the order of the rows

    @property
    def is_row_parallel(self) -> bool:
        """Whether tensor ranks have a part of the inputs each, and not of the outputs."""
        return isinstance(self.mapping, SingleTensor)

    @property
    def num_inputs(self) -> int:
        """I, on all tensor ranks together."""
        return next(iter(self.mapping.hf_shapes.values()))[1]

    def num_outputs(self, module: str) -> int:
        """O of one of `modules`."""
        return self.mapping.hf_shapes[f"{module}.weight"][0]

    def rows_of_rank(self, *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """Of each row of a rank's fused weight: its number, int64.

        Rows are numbered over all Hugging Face tensors of the weight, one after the other.
        """
        if isinstance(self.mapping, SingleTensor):  # cut along the inputs
            return torch.arange(self.mapping.shape[0])
        source = _RowNumbers(self)
        return self.mapping.local(source, tensor_rank=tensor_rank, tensor_size=tensor_size)

    def first_rows(self) -> dict[str, int]:
        """The number of the first row of each Hugging Face tensor."""
        first, firsts = 0, {}
        for name, shape in self.mapping.hf_shapes.items():
            firsts[name] = first
            first += shape[0]
        return firsts


class _RowNumbers:
    """A source whose tensors hold the numbers of their rows, int64 [rows]."""

    def __init__(self, weight: AdaptedWeight) -> None:
        self._shapes = weight.mapping.hf_shapes
        self._first = weight.first_rows()

    def __str__(self) -> str:
        return "row numbers"

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> Shape:
        return self._shapes[name][:1]

    def read(self, name: str) -> torch.Tensor:
        return torch.arange(self._shapes[name][0]) + self._first[name]

    def read_slice(self, name: str, *, start: int, stop: int, dim: int) -> torch.Tensor:
        assert dim == 0, f"{name} has no dim {dim}"
        return self.read(name)[start:stop]


def adapted_weights(
    family: Family, shape: ModelShape, lora: LoraConfig
) -> dict[str, AdaptedWeight]:
    """Megatron parameter name -> what of it is adapted; a weight without adapters is left out."""
    found = {}
    for name, mapping in family.weights(shape).items():
        modules = tuple(
            module for module in _linear_modules(name, mapping, shape) if _is_targeted(module, lora)
        )
        if modules:
            found[name] = AdaptedWeight(mapping, modules)
    return found


def saved_weights(family: Family, shape: ModelShape, lora: LoraConfig) -> dict[str, VocabSplit]:
    """Megatron parameter name -> mapping of each weight of `modules_to_save`."""
    return {
        name: mapping
        for name, mapping in family.weights(shape).items()
        if isinstance(mapping, VocabSplit) and _leaf(_module(mapping.name)) in lora.modules_to_save
    }


def adapter_shapes(family: Family, shape: ModelShape, lora: LoraConfig) -> dict[str, Shape]:
    """PEFT's name and shape of every tensor that is trained, in the order of the layers."""
    shapes: dict[str, Shape] = {}
    for weight in adapted_weights(family, shape, lora).values():
        for module in weight.modules:
            shapes[peft_name(module, "lora_A")] = (lora.rank, weight.num_inputs)
            shapes[peft_name(module, "lora_B")] = (weight.num_outputs(module), lora.rank)
    for mapping in saved_weights(family, shape, lora).values():
        shapes[peft_name(_module(mapping.name))] = (mapping.vocab_size, mapping.hidden_size)
    return shapes


def num_trained_by(lora: LoraConfig, shape: ModelShape) -> int:
    """How many numbers are trained."""
    shapes = adapter_shapes(family_named(shape.architecture), shape, lora)
    return sum(map(math.prod, shapes.values()))


def peft_name(module: str, part: str | None = None) -> str:
    """PEFT's name of a part (`lora_A`, `lora_B`) of a module's adapter, or of its own weight."""
    return f"{_PREFIX}{module}.{part}.weight" if part else f"{_PREFIX}{module}.weight"


def scaling(lora: LoraConfig) -> float:
    """The factor of B A, as PEFT has it."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.use_rslora else lora.rank)


def target_names(family: Family, shape: ModelShape, lora: LoraConfig) -> list[str]:
    """The names of the adapted projections of a layer, `all-linear` spelt out."""
    return [name for name in _linear_names(family, shape) if _is_targeted(name, lora)]


def adapter_problems(family: Family, shape: ModelShape, lora: LoraConfig) -> Iterator[str]:
    """What the model does not have of what `lora` asks for."""
    known = _linear_names(family, shape)
    for name in lora.target_modules:
        if name not in (*known, ALL_LINEAR):
            of_experts = (
                "" if shape.experts is None else " with adapters (routed experts have none)"
            )
            yield (
                f"lora.target_modules: {shown(name)} is no projection of {shape.architecture}"
                f"{of_experts}; choose of {', '.join(known)}, or {ALL_LINEAR}"
            )
    if lora.modules_to_save and shape.tie_word_embeddings:
        yield (
            f"lora.modules_to_save: {', '.join(lora.modules_to_save)} of a model whose embedding"
            " and head are one tensor (tie_word_embeddings); leave it out, or untie them first"
        )


def _linear_names(family: Family, shape: ModelShape) -> list[str]:
    modules = (
        module
        for name, mapping in family.weights(shape).items()
        for module in _linear_modules(name, mapping, shape)
    )
    return list(dict.fromkeys(map(_leaf, modules)))


def _linear_modules(name: str, mapping: WeightMapping, shape: ModelShape) -> Iterator[str]:
    """The Hugging Face linear modules in the parameter `name`.

    Routed experts and routers have none: in transformers 5 they are tensors of a layer, which PEFT
    reaches by target_parameters alone, and servers ignore such adapters.
    """
    if ".mlp.experts." in name or ".mlp.router." in name:
        return
    if ".mlp." in name and shape.architecture in _ATTENTION_ALONE:
        return
    is_matrix = isinstance(mapping, QKV | GatedMLP | FusedRows) or (
        isinstance(mapping, SingleTensor) and len(mapping.shape) == 2
    )
    if is_matrix and name.endswith(".weight"):
        yield from map(_module, mapping.hf_shapes)


def _is_targeted(module: str, lora: LoraConfig) -> bool:
    return ALL_LINEAR in lora.target_modules or _leaf(module) in lora.target_modules


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]
