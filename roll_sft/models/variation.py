"""What some families have that a plain decoder has not. Imports no torch, as `models/shape.py`."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Activation: TypeAlias = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """How one layer attends.

    It rotates the first 2 * (stop - start) columns of each query and key head, by the frequencies
    [start, stop) of the shape's `rotary_inv_freq`; none if these are equal. `rotary_scaling`
    multiplies the cosines and sines. `window` is how many tokens a query sees, itself included;
    None if it sees all before it.
    """

    start: int
    stop: int
    rotary_scaling: float = 1.0
    window: int | None = None


@dataclass(frozen=True, slots=True)
class LatentHeads:
    """The widths of attention whose queries, keys and values are projections of smaller vectors.

    A token has one vector of `key_value_rank` numbers, of which the keys and values of all heads
    are made, and one key of `rotated` columns that all heads share. A head's query and key have
    these columns and `plain` others, its value has `value` columns. Queries are made of a vector of
    `query_rank` numbers, or with None of the hidden state.
    """

    key_value_rank: int
    rotated: int
    plain: int
    value: int
    query_rank: int | None = None

    @property
    def num_norms(self) -> int:
        """Weights of the norms of both vectors of a layer."""
        return self.key_value_rank + (self.query_rank or 0)

    def num_weights(self, hidden_size: int, num_heads: int) -> int:
        """Weights of the matrices of a layer's attention."""
        head, rank = self.rotated + self.plain, self.query_rank
        of_query = num_heads * head * hidden_size
        if rank is not None:
            of_query = rank * (hidden_size + num_heads * head)
        down = (self.key_value_rank + self.rotated) * hidden_size
        up = num_heads * (self.plain + self.value) * self.key_value_rank
        return of_query + down + up + num_heads * self.value * hidden_size


@dataclass(frozen=True, slots=True)
class Variation:
    """Settings of a family beside those of a plain decoder; the defaults are a plain decoder's.

    `layers` holds one entry for each layer of the model. `is_interleaved` says that columns 2i and
    2i + 1 of a head are rotated together, and not i and i + half. `softmax_scale` multiplies the
    attention scores, by default 1 / sqrt(head_dim); `attention_softcap` c then makes them
    c * tanh(score / c). A norm with `norm_adds_one` multiplies by 1 + weight.
    With `has_sinks` each query head has a learnable score beside those of the keys, which takes a
    share of the softmax and has no value. `has_output_bias` is a bias on what leaves attention.
    `latent` says that attention has heads of that kind, and `rotated` columns before the others.
    `embedding_multiplier` multiplies what enters the first layer; if `rounds_embedding_multiplier`,
    rounded to the dtype of the weights, inside the embedding. `residual_multiplier` multiplies the
    outputs of attention and MLP before they are added. Logits are divided by `logits_divisor`, and
    then `logits_softcap` c makes them c * tanh(logit / c).
    """

    layers: tuple[LayerAttention, ...]
    is_interleaved: bool = False
    softmax_scale: float | None = None
    attention_softcap: float | None = None
    norm_adds_one: bool = False
    has_sinks: bool = False
    has_output_bias: bool = False
    latent: LatentHeads | None = None
    activation: Activation = "silu"
    embedding_multiplier: float = 1.0
    rounds_embedding_multiplier: bool = False
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    logits_softcap: float | None = None
    longest: int | None = None  # tokens of a sample, beyond which it is rotated otherwise

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Variation":
        """What `dataclasses.asdict` made `values` of."""
        layers = tuple(LayerAttention(**each) for each in values["layers"])
        latent = values.get("latent") and LatentHeads(**values["latent"])
        return cls(**{**values, "layers": layers, "latent": latent})

    @property
    def windows(self) -> dict[int, int]:
        """Window -> the number of layers that have it."""
        return dict(Counter(layer.window for layer in self.layers if layer.window is not None))

    def num_biases(self, hidden_size: int, num_heads: int) -> int:
        """Biases behind attention, sinks, and norms of latent vectors of a layer."""
        of_latent = 0 if self.latent is None else self.latent.num_norms
        return self.has_output_bias * hidden_size + self.has_sinks * num_heads + of_latent

    def problems(self, sequence_length: int) -> Iterator[str]:
        """What samples of up to `sequence_length` tokens ask for that is not implemented."""
        if self.longest is not None and sequence_length > self.longest:
            yield (
                f"data.sequence_length: {sequence_length} exceeds the model's"
                f" original_max_position_embeddings {self.longest}, and the long_factor of its"
                " rope_type longrope is not available in this version; lower it"
            )
