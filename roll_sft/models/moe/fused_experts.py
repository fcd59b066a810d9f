"""Files that hold all experts of a layer in one tensor, as transformers 5 can save them.

Legend: E experts, F width of an expert, D hidden size.

`experts.gate_up_proj` [E, 2F, D] has gate projections above up projections, `experts.down_proj`
[E, D, F] the down projections. Read here they are the tensors of single experts, by the names that
the published files have. A checkpoint holds `MARK` where its model came from such files, and then
an export is one, too.
"""

from collections import Counter
from dataclasses import dataclass, replace

import torch

from roll_sft.models.files.safetensors_in import Shape, StoredSource, TensorSource
from roll_sft.models.moe.expert_weights import ExpertNames
from roll_sft.models.weight_map import SingleTensor, WeightTable

MARK = "source.experts_are_fused"  # a tensor of one number, 1
_LOCAL, _EXPERTS, _DOWN_LOCAL = ".local_experts.", ".experts.", ".linear_fc2.weight"

_MODULE, _GATE_UP, _DOWN = ".mlp.", "experts.gate_up_proj", "experts.down_proj"


def split_experts(source: StoredSource, *, names: ExpertNames | None = None) -> StoredSource:
    """`source`, with the tensors of single experts where it has those of a layer."""
    names = names or ExpertNames()
    parts: dict[str, _Part] = {}
    for name in source.names():
        before, mlp, tail = name.partition(_MODULE)
        if mlp and tail in (_GATE_UP, _DOWN):
            layer = f"{before}.{names.module}.experts"
            number, rows, _ = source.shape(name)
            for index in range(number):
                if tail == _DOWN:
                    parts[f"{layer}.{index}.{names.down}.weight"] = _Part(name, index, 0, rows)
                    continue
                for half, own in enumerate((names.gate, names.up)):
                    part = _Part(name, index, half * (rows // 2), rows // 2)
                    parts[f"{layer}.{index}.{own}.weight"] = part
    if not parts:
        return source
    others = source.names() - {part.name for part in parts.values()}
    # transformers calls every family's module by one name.
    renamed = {name.replace(_MODULE, f".{names.module}."): name for name in others}
    return FusedExperts(source, parts, renamed)


def fused_table(table: WeightTable) -> WeightTable:
    """`table` for an export of such files: of a layer the gate and up projections, then the others.

    transformers calls every family's module by one name, the router's too.
    """
    # A tensor of an expert is model.layers.N.MODULE.experts.I.PROJECTION.weight.
    firsts = {name: next(iter(each.hf_shapes), "") for name, each in table.items()}
    counts = Counter(
        first.partition(_EXPERTS)[0]
        for name, first in firsts.items()
        if _LOCAL in name and name.endswith(_DOWN_LOCAL)
    )
    found: WeightTable = {}
    downs: WeightTable = {}
    for name, mapping in table.items():
        first = firsts[name]
        module = next((each for each in counts if first.startswith(f"{each}.")), "")
        ours = module.rpartition(".")[0] + _MODULE
        if _LOCAL in name:
            shapes = list(mapping.hf_shapes.values())
            size = (counts[module], sum(rows for rows, _ in shapes), shapes[0][1])
            is_down = name.endswith(_DOWN_LOCAL)
            whole = ExpertOfLayer(ours + (_DOWN if is_down else _GATE_UP), size)
            (downs if is_down else found)[name] = whole
            continue
        found |= downs
        downs = {}
        if isinstance(mapping, SingleTensor) and module:
            mapping = replace(mapping, name=ours + first.removeprefix(f"{module}."))
        found[name] = mapping
    return found | downs


@dataclass(frozen=True, slots=True)
class ExpertOfLayer:
    """A matrix of one expert, as a part of the tensor of its layer; for an export alone."""

    name: str
    shape: Shape

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """The whole tensor [E, rows, columns]; every expert of the layer has the same."""
        return {self.name: self.shape}

    def local(self, source: TensorSource, *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """Not asked for: a source is read by the tensors of single experts."""
        raise AssertionError(f"{self.name} is read in parts")

    def to_hf(self, full: torch.Tensor) -> dict[str, torch.Tensor]:
        """[rows, columns] -> the part [1, rows, columns] of the tensor."""
        return {self.name: full[None]}


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of expert `index` in tensor `name`, `num_rows` from `first` on."""

    name: str
    index: int
    first: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """`source`, whose tensors of layers are the `parts`; the others are `renamed`."""

    source: StoredSource
    parts: dict[str, _Part]
    renamed: dict[str, str]

    def __str__(self) -> str:
        return str(self.source)

    def names(self) -> frozenset[str]:
        """Every tensor there is, those of single experts among them."""
        return frozenset((*self.parts, *self.renamed))

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, without reading it."""
        if (part := self.parts.get(name)) is None:
            return self.source.shape(self._stored(name))
        return part.num_rows, self.source.shape(part.name)[2]

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is stored in."""
        part = self.parts.get(name)
        return self.source.dtype(self._stored(name) if part is None else part.name)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        if (part := self.parts.get(name)) is None:
            return self.source.read(self._stored(name))
        start = part.index
        expert = self.source.read_slice(part.name, start=start, stop=start + 1, dim=0)[0]
        return expert.narrow(0, part.first, part.num_rows)

    def read_slice(self, name: str, *, start: int, stop: int, dim: int) -> torch.Tensor:
        """Entries `start` to `stop` along `dim`, contiguous."""
        if name in self.parts:
            return self.read(name).narrow(dim, start, stop - start).contiguous()
        return self.source.read_slice(self._stored(name), start=start, stop=stop, dim=dim)

    def _stored(self, name: str) -> str:
        return self.renamed.get(name, name)  # the source names what it does not have
