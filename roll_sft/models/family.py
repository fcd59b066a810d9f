"""What a model family is: how its configuration becomes a shape, and the table of its weights.

A family maps a Hugging Face configuration to a `ModelShape` and declares one mapping of
`models/weight_map.py` for each parameter of Megatron's `GPTModel` (local spec). Families share the
parts of a layer, here in the order of the forward pass: a family's table is `pre_norm_weights`, or
lists other parts of a layer.

Invariant: each Hugging Face tensor of the family belongs to exactly one mapping of the table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from roll_sft.models.files.safetensors_in import Shape
from roll_sft.models.shape import ModelShape
from roll_sft.models.weight_map import (
    QKV,
    GatedMLP,
    SingleTensor,
    TiedHead,
    VocabSplit,
    WeightTable,
    hf_shapes,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from roll_sft.models.files.safetensors_in import SafetensorsSource, StoredSource


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture. A new one is a file that holds these two functions.

    `shape` raises `ConfigError` for anything in the configuration that is not implemented. Through
    `opened` files that hold other tensors than those of the table give these.
    """

    architecture: str
    shape: Callable[["PreTrainedConfig"], ModelShape]
    weights: Callable[[ModelShape], WeightTable]
    opened: Callable[["SafetensorsSource"], "StoredSource"] = lambda source: source

    def hf_shapes(self, shape: ModelShape) -> dict[str, Shape]:
        """Every Hugging Face tensor of the family, in the order an export writes them."""
        table = self.weights(shape)
        shapes, number = hf_shapes(table), sum(len(each.hf_shapes) for each in table.values())
        assert len(shapes) == number, "two parameters have the same tensor"
        return shapes


class LayerPart(Protocol):
    """Some of the parameters of layer `layer`, which counts from 0 over the whole model."""

    def __call__(self, shape: ModelShape, *, layer: int) -> WeightTable:
        """Megatron names, with that index, to weight mappings."""
        ...


def decoder_weights(shape: ModelShape, *, layer_parts: Sequence[LayerPart]) -> WeightTable:
    """Every parameter of Megatron's GPTModel whose layers consist of `layer_parts`."""
    embedding = VocabSplit("model.embed_tokens.weight", shape.vocab_size, shape.hidden_size)
    table: WeightTable = {"embedding.word_embeddings.weight": embedding}
    for layer in range(shape.num_layers):
        for part in layer_parts:
            table |= part(shape, layer=layer)
    table["decoder.final_layernorm.weight"] = SingleTensor(
        "model.norm.weight", (shape.hidden_size,)
    )
    table["output_layer.weight"] = (
        TiedHead("lm_head.weight", embedding)
        if shape.tie_word_embeddings
        else VocabSplit("lm_head.weight", shape.vocab_size, shape.hidden_size)
    )
    return table


def pre_norm_weights(shape: ModelShape) -> WeightTable:
    """Every parameter of Megatron's GPTModel for the layer that most families have."""
    parts = (pre_attention_norm, attention, pre_mlp_norm, mlp)
    return decoder_weights(shape, layer_parts=parts)


def pre_attention_norm(shape: ModelShape, *, layer: int) -> WeightTable:
    """The norm before attention."""
    name = f"model.layers.{layer}.input_layernorm.weight"
    return {
        f"decoder.layers.{layer}.input_layernorm.weight": SingleTensor(name, (shape.hidden_size,))
    }


def attention(shape: ModelShape, *, layer: int) -> WeightTable:
    """The projections of attention; biases, if any, on query, key and value alone."""
    hf, ours = f"model.layers.{layer}.self_attn", f"decoder.layers.{layer}.self_attention"
    width = shape.num_attention_heads * shape.head_dim
    table: WeightTable = {f"{ours}.linear_qkv.weight": _qkv(shape, hf=hf, kind="weight")}
    if shape.qkv_bias:
        table[f"{ours}.linear_qkv.bias"] = _qkv(shape, hf=hf, kind="bias")
    table[f"{ours}.linear_proj.weight"] = SingleTensor(
        f"{hf}.o_proj.weight", (shape.hidden_size, width), split_dim=1
    )
    return table


def head_norms(shape: ModelShape, *, layer: int) -> WeightTable:
    """One norm that all query heads share, another for all key heads."""
    hf, ours = f"model.layers.{layer}.self_attn", f"decoder.layers.{layer}.self_attention"
    return {
        f"{ours}.q_layernorm.weight": SingleTensor(f"{hf}.q_norm.weight", (shape.head_dim,)),
        f"{ours}.k_layernorm.weight": SingleTensor(f"{hf}.k_norm.weight", (shape.head_dim,)),
    }


def pre_mlp_norm(shape: ModelShape, *, layer: int) -> WeightTable:
    """The norm before the MLP; Hugging Face names it after the attention that it follows."""
    name = f"model.layers.{layer}.post_attention_layernorm.weight"
    return {
        f"decoder.layers.{layer}.pre_mlp_layernorm.weight": SingleTensor(name, (shape.hidden_size,))
    }


def mlp(shape: ModelShape, *, layer: int) -> WeightTable:
    """The gated MLP."""
    hf, ours = f"model.layers.{layer}.mlp", f"decoder.layers.{layer}.mlp"
    return {
        f"{ours}.linear_fc1.weight": GatedMLP(
            gate=f"{hf}.gate_proj.weight",
            up=f"{hf}.up_proj.weight",
            ffn_hidden_size=shape.ffn_hidden_size,
            hidden_size=shape.hidden_size,
        ),
        f"{ours}.linear_fc2.weight": SingleTensor(
            f"{hf}.down_proj.weight", (shape.hidden_size, shape.ffn_hidden_size), split_dim=1
        ),
    }


def _qkv(shape: ModelShape, *, hf: str, kind: str) -> QKV:
    return QKV(
        query=f"{hf}.q_proj.{kind}",
        key=f"{hf}.k_proj.{kind}",
        value=f"{hf}.v_proj.{kind}",
        num_heads=shape.num_attention_heads,
        num_groups=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        columns=(shape.hidden_size,) if kind == "weight" else (),
    )
