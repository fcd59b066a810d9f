"""What a model family is: its shape, and how its weights read in both directions.

A family maps a Hugging Face configuration to a `ModelShape` and declares one `Word` for each
parameter of Megatron's `GPTModel` (local spec). A word is the only place that knows how the two
sides differ: it cuts one tensor-parallel rank's tensor out of a `TensorSource`, and takes the
merged Megatron tensor apart again.

Invariants: for every word and tensor-parallel size, merging the local tensors of all ranks and
calling `to_hf` gives back the source's tensors to the last bit; the words of one table name every
Hugging Face tensor of the family, and each is written by exactly one word.

Shape letters: V vocab, P padded vocab, D hidden, F feed-forward, H heads, G key-value groups,
K head dimension. *Full* is the tensor-parallel-merged form, as Megatron's distributed checkpoint
stores it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from roll_sft.errors import ConfigError
from roll_sft.layout import round_up
from roll_sft.models.hf_io import Shape, TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NAMES_SHOWN = 3
_ROWS_COMPARED_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class ModelShape:
    """All the numbers of a dense decoder that the engine, the planner and the weight words need.

    `rotary_inv_freq` holds K/2 frequencies, exact float32 values of transformers' own function.
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

    @property
    def num_matmul_parameters(self) -> int:
        """Weights that multiply activations: all matrices and the LM head, not the embedding."""
        return self.num_layers * self._num_layer_matmul_parameters + self._num_embedding_parameters

    @property
    def num_parameters(self) -> int:
        """Every trained number once: embedding, head (unless tied), matrices, biases and norms."""
        num_biases = self._qkv_width if self.qkv_bias else 0
        per_layer = self._num_layer_matmul_parameters + num_biases + 2 * self.hidden_size
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
    def _num_layer_matmul_parameters(self) -> int:
        projection_width = self.num_attention_heads * self.head_dim
        width = self._qkv_width + projection_width + 3 * self.ffn_hidden_size
        return self.hidden_size * width

    @property
    def _num_embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size


class Word(Protocol):
    """How one Megatron parameter reads in Hugging Face's tensors."""

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Name and shape of each Hugging Face tensor this word owns, in the order of `to_hf`."""
        ...

    def local(self, source: TensorSource, *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """Megatron's tensor of one tensor-parallel rank, in the source's dtype.

        Reads only the slices that rank holds. May share memory with the source: copy before
        writing into it.
        """
        ...

    def to_hf(self, full: torch.Tensor) -> dict[str, torch.Tensor]:
        """The Hugging Face tensors inside `full`, any dtype and device. May be views of `full`."""
        ...


WeightTable: TypeAlias = dict[str, Word]
"""Megatron parameter name, with the global layer index, to its word."""


@dataclass(frozen=True, slots=True)
class Replicated:
    """The whole tensor on every rank: norms."""

    name: str
    shape: Shape

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """The one tensor."""
        return {self.name: self.shape}

    def local(self, source: TensorSource, *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """The tensor itself."""
        return source.read(self.name)

    def to_hf(self, full: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensor itself."""
        return {self.name: full}


@dataclass(frozen=True, slots=True)
class VocabSplit:
    """[V, D] cut along V after zero rows are added to reach P: embedding and LM head."""

    name: str
    vocab_size: int
    hidden_size: int

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """[V, D], without padding: a model that ships padded keeps the rows it ships."""
        return {self.name: (self.vocab_size, self.hidden_size)}

    def local(self, source: TensorSource, *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """[P / tensor_size, D]; a rank past the vocabulary holds zeros alone."""
        num_rows = round_up(self.vocab_size, tensor_size) // tensor_size
        start = min(tensor_rank * num_rows, self.vocab_size)
        stop = min(start + num_rows, self.vocab_size)
        rows = source.read_slice(self.name, start=start, stop=stop, dim=0)
        num_padding_rows = num_rows - (stop - start)
        if num_padding_rows == 0:
            return rows
        return torch.cat([rows, rows.new_zeros(num_padding_rows, self.hidden_size)])

    def to_hf(self, full: torch.Tensor) -> dict[str, torch.Tensor]:
        """[P, D] -> [V, D], whatever the padded rows hold."""
        return {self.name: full[: self.vocab_size]}


@dataclass(frozen=True, slots=True)
class TiedHead:
    """The last pipeline stage's copy of the embedding.

    Owns no Hugging Face tensor, so it is loaded from the embedding and never exported. `name` is
    what a checkpoint may store all the same; `Family.check_source` compares it with the embedding.
    """

    name: str
    embedding: VocabSplit

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Nothing: the embedding's word owns the tensor."""
        return {}

    def local(self, source: TensorSource, *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """The embedding's rows of this rank."""
        return self.embedding.local(source, tensor_rank=tensor_rank, tensor_size=tensor_size)

    def to_hf(self, full: torch.Tensor) -> dict[str, torch.Tensor]:
        """Nothing: the embedding's word writes the tensor."""
        return {}


@dataclass(frozen=True, slots=True)
class RowSplit:
    """[D, inputs] cut along the inputs: attention's output projection and fc2."""

    name: str
    shape: Shape

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """The one tensor."""
        return {self.name: self.shape}

    def local(self, source: TensorSource, *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """[D, inputs / tensor_size]."""
        width = _share(self.shape[1], tensor_size, what=self.name)
        start = tensor_rank * width
        return source.read_slice(self.name, start=start, stop=start + width, dim=1)

    def to_hf(self, full: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensor itself."""
        return {self.name: full}


@dataclass(frozen=True, slots=True)
class QKV:
    """Query, key and value fused: for each of G groups its H/G query heads, its key, its value.

    `columns` is (D,) for the weights and () for the biases, which follow the same order of rows.
    """

    query: str
    key: str
    value: str
    num_heads: int
    num_groups: int
    head_dim: int
    columns: Shape

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """[H*K, D], [G*K, D], [G*K, D], or the same without D."""
        return {
            name: (self.num_groups * rows, *self.columns)
            for name, rows in self._rows_per_group.items()
        }

    def local(self, source: TensorSource, *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """[(H + 2G) * K / tensor_size, D]: whole groups."""
        num_groups = _share(self.num_groups, tensor_size, what=f"key-value groups of {self.key}")
        parts = []
        for name, rows_per_group in self._rows_per_group.items():
            num_rows = num_groups * rows_per_group
            start = tensor_rank * num_rows
            part = source.read_slice(name, start=start, stop=start + num_rows, dim=0)
            parts.append(part.reshape(num_groups, rows_per_group, *self.columns))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def to_hf(self, full: torch.Tensor) -> dict[str, torch.Tensor]:
        """[(H + 2G) * K, D] -> query, key, value."""
        rows_per_group = self._rows_per_group
        groups = full.reshape(self.num_groups, sum(rows_per_group.values()), *self.columns)
        parts = torch.split(groups, list(rows_per_group.values()), dim=1)
        return {name: part.flatten(0, 1) for name, part in zip(rows_per_group, parts, strict=True)}

    @property
    def _rows_per_group(self) -> dict[str, int]:
        num_query_rows = self.num_heads // self.num_groups * self.head_dim
        return {self.query: num_query_rows, self.key: self.head_dim, self.value: self.head_dim}


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """Gate and up projections, [F, D] each, fused in fc1.

    Each rank holds cat(its gate rows, its up rows), but the full form is cat(all gate, all up):
    Megatron's checkpoint stores it so, and it is not the ranks' tensors one after the other.
    """

    gate: str
    up: str
    ffn_hidden_size: int
    hidden_size: int

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """[F, D] each."""
        return dict.fromkeys((self.gate, self.up), (self.ffn_hidden_size, self.hidden_size))

    def local(self, source: TensorSource, *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """[2F / tensor_size, D]."""
        num_rows = _share(self.ffn_hidden_size, tensor_size, what=f"rows of {self.gate}")
        start = tensor_rank * num_rows
        return torch.cat(
            [
                source.read_slice(name, start=start, stop=start + num_rows, dim=0)
                for name in (self.gate, self.up)
            ]
        )

    def to_hf(self, full: torch.Tensor) -> dict[str, torch.Tensor]:
        """[2F, D] -> gate, up."""
        assert full.shape[0] == 2 * self.ffn_hidden_size, f"{self.gate}: {full.shape[0]} rows"
        return {
            self.gate: full[: self.ffn_hidden_size],
            self.up: full[self.ffn_hidden_size :],
        }


def _share(whole: int, tensor_size: int, *, what: str) -> int:
    """`whole / tensor_size`. Layouts that do not divide it are refused long before."""
    assert whole % tensor_size == 0, (
        f"tensor parallel size {tensor_size} does not divide {whole}, {what}"
    )
    return whole // tensor_size


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
        for word in self.weights(shape).values():
            assert shapes.keys().isdisjoint(word.hf_shapes), f"{word} owns a tensor twice"
            shapes |= word.hf_shapes
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
        heads = [word for word in self.weights(shape).values() if isinstance(word, TiedHead)]
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
