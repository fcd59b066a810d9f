"""What a model family is: its shape, and the table of its weights.

A family maps a Hugging Face configuration to a `ModelShape` and declares one mapping of
`models/weight_map.py` for each parameter of Megatron's `GPTModel` (local spec).

Invariant: each Hugging Face tensor of the family belongs to exactly one mapping of the table.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from roll_sft.base.errors import ConfigError
from roll_sft.base.layout import round_up
from roll_sft.models.safetensors_in import Shape, TensorSource
from roll_sft.models.weight_map import TiedHead, WeightTable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

QKNorm: TypeAlias = Literal["none", "head", "projection"]
NormPlacement: TypeAlias = Literal["pre", "post"]

_NAMES_SHOWN = 3
_ROWS_COMPARED_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class ModelShape:
    """All the numbers of a dense decoder that the engine, the planner and the weight table need.

    `rotary_inv_freq` holds K/2 frequencies, exact float32 values of transformers' own function, for
    K = `head_dim`. `qk_norm` is an RMSNorm on queries and keys: over each head alone, or over all
    heads of the projection at once. `norm_placement` says whether a layer's two norms come before
    attention and MLP, or after them and before the residual addition. `sliding_window` is how many
    tokens a query sees, itself included; None if never fewer than all.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    rotary_inv_freq: tuple[float, ...]
    initializer_range: float
    qk_norm: QKNorm = "none"
    norm_placement: NormPlacement = "pre"
    sliding_window: int | None = None

    @property
    def attention_width(self) -> int:
        """Columns of all query heads together, which need not be the hidden size."""
        return self.num_attention_heads * self.head_dim

    @property
    def num_matmul_parameters(self) -> int:
        """Weights that multiply activations: all matrices and the LM head, not the embedding."""
        return self.num_layers * self._num_layer_matmul_parameters + self._num_embedding_parameters

    @property
    def num_parameters(self) -> int:
        """Every trained number once: embedding, head (unless tied), matrices, biases and norms."""
        num_biases = self._qkv_width if self.qkv_bias else 0
        num_norms = 2 * self.hidden_size + self._num_qk_norm_parameters
        per_layer = self._num_layer_matmul_parameters + num_biases + num_norms
        num_vocab_matrices = 1 if self.tie_word_embeddings else 2
        return (
            self.num_layers * per_layer
            + self.hidden_size
            + num_vocab_matrices * self._num_embedding_parameters
        )

    def padded_vocab_size(self, tensor_size: int) -> int:
        """Rows of the embedding on Megatron's side: it needs a multiple of `tensor_size` only."""
        return round_up(self.vocab_size, tensor_size)

    @property
    def _qkv_width(self) -> int:
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def _num_qk_norm_parameters(self) -> int:
        num_heads = {
            "none": 0,
            "head": 2,  # all query heads share one, all key heads another
            "projection": self.num_attention_heads + self.num_key_value_heads,
        }
        return num_heads[self.qk_norm] * self.head_dim

    @property
    def _num_layer_matmul_parameters(self) -> int:
        width = self._qkv_width + self.attention_width + 3 * self.ffn_hidden_size
        return self.hidden_size * width

    @property
    def _num_embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture. A new one is a file that holds these two functions.

    `shape` raises `ConfigError` for anything in the configuration that is not implemented.
    """

    architecture: str
    shape: Callable[["PreTrainedConfig"], ModelShape]
    weights: Callable[[ModelShape], WeightTable]

    def hf_shapes(self, shape: ModelShape) -> dict[str, Shape]:
        """Every Hugging Face tensor of the family, in the order an export writes them."""
        shapes: dict[str, Shape] = {}
        for mapping in self.weights(shape).values():
            assert shapes.keys().isdisjoint(mapping.hf_shapes), f"{mapping} has a tensor of another"
            shapes |= mapping.hf_shapes
        return shapes

    def hf_names(self, shape: ModelShape) -> frozenset[str]:
        """Names of every Hugging Face tensor of the family."""
        return frozenset(self.hf_shapes(shape))

    def check_source(self, shape: ModelShape, *, source: TensorSource) -> None:
        """Refuse, with `ConfigError`, a source that is not exactly this model.

        Reads headers only, except where a tied model stores its head as well: then both are
        compared, because transformers unties two that differ, and we would train another model
        than it serves.
        """
        expected = self.hf_shapes(shape)
        heads = [
            mapping for mapping in self.weights(shape).values() if isinstance(mapping, TiedHead)
        ]
        # Old exports store rotary buffers; they are computed, never trained.
        found = {name for name in source.names() if not name.endswith("rotary_emb.inv_freq")}
        missing = [name for name in expected if name not in found]
        unexpected = sorted(found - expected.keys() - {head.name for head in heads})
        if missing or unexpected:
            raise ConfigError(
                f"model.path: {source} does not hold the {len(expected)} tensors that its "
                f"config.json describes for {self.architecture}: "
                f"{_count_and_first('missing', missing)}, "
                f"{_count_and_first('unexpected', unexpected)}; give a complete, unquantized "
                "checkpoint and the config.json that belongs to it"
            )
        for name, wanted in expected.items():
            if source.shape(name) != wanted:
                raise ConfigError(
                    f"model.path: {source}: {name} has shape {list(source.shape(name))} but "
                    f"config.json gives {list(wanted)}; use the config.json of this checkpoint"
                )
        for head in heads:
            if head.name in found and not _equal(source, head.name, head.embedding.name):
                raise ConfigError(
                    f"model.path: {source}: tie_word_embeddings is true but {head.name} and "
                    f"{head.embedding.name} differ; set tie_word_embeddings to false in config.json"
                )


def _count_and_first(label: str, names: Iterable[str]) -> str:
    """`2 missing (a, b)`, with at most the first few names."""
    names = list(names)
    if not names:
        return f"0 {label}"
    dots = ", ..." if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} {label} ({', '.join(names[:_NAMES_SHOWN])}{dots})"


def _equal(source: TensorSource, first: str, second: str) -> bool:
    """Whether two tensors are equal, in blocks of rows: vocabulary matrices reach several GB."""
    if source.shape(first) != source.shape(second):
        return False
    num_rows = source.shape(first)[0]
    for block in range(math.ceil(num_rows / _ROWS_COMPARED_AT_ONCE)):
        start = block * _ROWS_COMPARED_AT_ONCE
        stop = min(start + _ROWS_COMPARED_AT_ONCE, num_rows)
        rows = [source.read_slice(n, start=start, stop=stop, dim=0) for n in (first, second)]
        if not torch.equal(*rows):
            return False
    return True
