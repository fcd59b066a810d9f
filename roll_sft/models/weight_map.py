"""Weight mappings: each parameter of Megatron's `GPTModel` and its Hugging Face tensors.

A mapping is the only place that knows how the two sides differ. It cuts the tensor of one
tensor-parallel rank out of a `TensorSource`, and takes the merged Megatron tensor apart again.

Invariants: for every mapping and tensor-parallel size, merging the local tensors of all ranks and
calling `to_hf` gives back the source's tensors to the last bit; the ranks together read every
number that they do not replicate once.

Shape letters: V vocab, P padded vocab, D hidden, F feed-forward, H heads, G key-value groups,
K head dimension. *Full* is the tensor-parallel-merged form, as Megatron's distributed checkpoint
stores it.
"""

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from roll_sft.base.layout import round_up
from roll_sft.models.files.safetensors_in import Shape, TensorSource


class WeightMapping(Protocol):
    """One Megatron parameter and the Hugging Face tensors that it consists of."""

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Name and shape of each Hugging Face tensor of this mapping, in the order of `to_hf`."""
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


WeightTable: TypeAlias = dict[str, WeightMapping]
"""Megatron parameter name, with the global layer index, to its mapping."""


@dataclass(frozen=True, slots=True)
class SingleTensor:
    """One tensor that both sides store alike: whole on every rank, or cut along `split_dim`.

    Norms over D or K are whole. The inputs (dim 1) of attention's output projection and of fc2 are
    cut. A norm over all heads of a projection is cut along dim 0, and `unit` = K keeps each head
    whole. With `is_fp32` it stays in fp32 in a model of another dtype.
    """

    name: str
    shape: Shape
    split_dim: int | None = None
    unit: int = 1
    is_fp32: bool = False

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """The one tensor."""
        return {self.name: self.shape}

    def local(self, source: TensorSource, *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """The tensor itself, or its `shape[split_dim] / tensor_size` entries of this rank."""
        if self.split_dim is None:
            return source.read(self.name)
        num_units = self.shape[self.split_dim] // self.unit
        size = _share(num_units, tensor_size, what=f"units of {self.name}") * self.unit
        start = tensor_rank * size
        return source.read_slice(self.name, start=start, stop=start + size, dim=self.split_dim)

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
    what a checkpoint may store all the same; `check_source` compares it with the embedding.
    """

    name: str
    embedding: VocabSplit

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Nothing: the embedding's mapping has the tensor."""
        return {}

    def local(self, source: TensorSource, *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """The embedding's rows of this rank."""
        return self.embedding.local(source, tensor_rank=tensor_rank, tensor_size=tensor_size)

    def to_hf(self, full: torch.Tensor) -> dict[str, torch.Tensor]:
        """Nothing: the embedding's mapping writes the tensor."""
        return {}


@dataclass(frozen=True, slots=True)
class QKV:
    """Query, key and value fused: for each of G groups its H/G query heads, its key, its value.

    `columns` is (D,) for the weights and () for the biases, which follow the same order of rows.
    Where ranks outnumber groups, each holds an equal run of a group's rows, whatever heads they
    belong to: Megatron gathers the activations of a group before it takes them apart.
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
        """[(H + 2G) * K / tensor_size, D]: whole groups, or a part of one."""
        if tensor_size > self.num_groups:
            return self._part_of_group(source, tensor_rank=tensor_rank, tensor_size=tensor_size)
        num_groups = _share(self.num_groups, tensor_size, what=f"key-value groups of {self.key}")
        parts = []
        for name, rows_per_group in self._rows_per_group.items():
            num_rows = num_groups * rows_per_group
            start = tensor_rank * num_rows
            part = source.read_slice(name, start=start, stop=start + num_rows, dim=0)
            parts.append(part.reshape(num_groups, rows_per_group, *part.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def to_hf(self, full: torch.Tensor) -> dict[str, torch.Tensor]:
        """[(H + 2G) * K, D] -> query, key, value."""
        rows_per_group = self._rows_per_group
        groups = full.reshape(self.num_groups, sum(rows_per_group.values()), *self.columns)
        parts = torch.split(groups, list(rows_per_group.values()), dim=1)
        return {name: part.flatten(0, 1) for name, part in zip(rows_per_group, parts, strict=True)}

    def _part_of_group(
        self, source: TensorSource, *, tensor_rank: int, tensor_size: int
    ) -> torch.Tensor:
        """[(H + 2G) * K / tensor_size, D], cut out of one group's query, key and value rows."""
        assert tensor_size % self.num_groups == 0, (
            f"tensor parallel size {tensor_size} is no multiple of {self.num_groups}, "
            f"key-value groups of {self.key}"
        )
        _share(self.num_heads, tensor_size, what=f"heads of {self.query}")
        ranks_per_group = tensor_size // self.num_groups
        rows_per_group = self._rows_per_group
        num_rows = _share(
            sum(rows_per_group.values()) * self.num_groups,
            tensor_size,
            what=f"rows of {self.query}, {self.key} and {self.value}",
        )
        group, part = divmod(tensor_rank, ranks_per_group)
        slices, first = [], part * num_rows  # our first row, counted from the group's first
        for name, rows in rows_per_group.items():
            start, stop = max(first, 0), min(first + num_rows, rows)
            if start < stop:
                offset = group * rows
                slices.append(
                    source.read_slice(name, start=offset + start, stop=offset + stop, dim=0)
                )
            first -= rows  # now counted from the group's first row of the next tensor
        return torch.cat(slices)

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


def hf_shapes(table: WeightTable) -> dict[str, Shape]:
    """Every Hugging Face tensor of `table`, in the order an export writes them."""
    return {name: shape for each in table.values() for name, shape in each.hf_shapes.items()}


def hf_names(mapping: WeightMapping) -> list[str]:
    """The Hugging Face tensors that `mapping` reads, in the order in which its rows begin."""
    return [mapping.embedding.name] if isinstance(mapping, TiedHead) else list(mapping.hf_shapes)


def _share(whole: int, tensor_size: int, *, what: str) -> int:
    """`whole / tensor_size`. Layouts that do not divide it are refused long before."""
    assert whole % tensor_size == 0, (
        f"tensor parallel size {tensor_size} does not divide {whole}, {what}"
    )
    return whole // tensor_size
