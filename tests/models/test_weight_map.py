"""Weight mappings against hand-made tensors."""

import pytest
import torch

from roll_sft.models.weight_map import (
    QKV,
    GatedMLP,
    SingleTensor,
    TiedHead,
    VocabSplit,
    WeightMapping,
)
from tests.models.helpers import MemorySource


def source_of(mapping: WeightMapping) -> MemorySource:
    """Tensors for `mapping` in which no two numbers are equal."""
    tensors, first = {}, 1
    for name, shape in mapping.hf_shapes.items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + count, dtype=torch.float64).reshape(shape)
        first += count
    return MemorySource(tensors)


def locals_of(mapping: WeightMapping, source: MemorySource, tensor_size: int) -> list[torch.Tensor]:
    return [
        mapping.local(source, tensor_rank=rank, tensor_size=tensor_size)
        for rank in range(tensor_size)
    ]


def merge(mapping: WeightMapping, parts: list[torch.Tensor]) -> torch.Tensor:
    """The global tensor as Megatron's distributed checkpoint stores it."""
    match mapping:
        case SingleTensor(split_dim=None):
            return parts[0]
        case SingleTensor(split_dim=dim):
            return torch.cat(parts, dim=dim)
        case GatedMLP():
            halves = [part.chunk(2) for part in parts]
            return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        case _:
            return torch.cat(parts)


MAPPINGS = [
    SingleTensor("norm", (6,)),
    VocabSplit("embed", 13, 3),
    SingleTensor("o", (3, 8), split_dim=1),
    QKV("q", "k", "v", num_heads=8, num_groups=4, head_dim=2, columns=(3,)),
    QKV("q", "k", "v", num_heads=8, num_groups=4, head_dim=2, columns=()),
    GatedMLP("gate", "up", ffn_hidden_size=8, hidden_size=3),
    QKV("q", "k", "v", num_heads=8, num_groups=8, head_dim=6, columns=(3,)),
    QKV("q", "k", "v", num_heads=8, num_groups=2, head_dim=2, columns=(3,)),
    QKV("q", "k", "v", num_heads=8, num_groups=1, head_dim=4, columns=()),
    SingleTensor("norm", (16,), split_dim=0, unit=2),
]


@pytest.mark.parametrize("tensor_size", [1, 2, 4, 8])
@pytest.mark.parametrize("mapping", MAPPINGS, ids=lambda mapping: type(mapping).__name__)
def test_merged_local_tensors_give_back_the_source_bit_for_bit(
    mapping: WeightMapping, tensor_size: int
):
    source = source_of(mapping)
    back = mapping.to_hf(merge(mapping, locals_of(mapping, source, tensor_size)))
    assert list(back) == list(mapping.hf_shapes)
    for name, tensor in source.tensors.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("mapping", MAPPINGS[1:], ids=lambda mapping: type(mapping).__name__)
@pytest.mark.parametrize("tensor_size", [4, 8])
def test_all_ranks_together_read_each_byte_once(mapping: WeightMapping, tensor_size: int):
    source = source_of(mapping)
    locals_of(mapping, source, tensor_size)
    assert source.num_bytes_read == sum(tensor.nbytes for tensor in source.tensors.values())


def test_qkv_rows_are_query_heads_key_value_for_each_group():
    # With head dimension 1 every number is one head: [q0 q1 k0 v0] [q2 q3 k1 v1].
    mapping = QKV("q", "k", "v", num_heads=4, num_groups=2, head_dim=1, columns=())
    source = MemorySource(
        {
            "q": torch.tensor([0.0, 1.0, 2.0, 3.0]),
            "k": torch.tensor([10.0, 11.0]),
            "v": torch.tensor([20.0, 21.0]),
        }
    )
    both = mapping.local(source, tensor_rank=0, tensor_size=1)
    assert both.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert mapping.local(source, tensor_rank=1, tensor_size=2).tolist() == [2, 3, 11, 21]


@pytest.mark.parametrize("columns", [(), (3,)])
def test_more_ranks_than_groups_cut_the_same_rows_evenly(columns: tuple[int, ...]):
    mapping = QKV("q", "k", "v", num_heads=8, num_groups=2, head_dim=2, columns=columns)
    source = source_of(mapping)
    whole = mapping.local(source, tensor_rank=0, tensor_size=1)
    for tensor_size in (4, 8):  # each rank then holds 6 rows, half a group, or 3: a head and a half
        for ours, cut in zip(
            locals_of(mapping, source, tensor_size), whole.chunk(tensor_size), strict=True
        ):
            assert torch.equal(ours, cut)


@pytest.mark.parametrize(
    ("mapping", "tensor_size", "message"),
    [
        (QKV("q", "k", "v", 12, 4, 2, ()), 6, "6 is no multiple of 4, key-value groups of k"),
        (QKV("q", "k", "v", 28, 4, 128, ()), 8, "8 does not divide 28, heads of q"),
        (QKV("q", "k", "v", 6, 2, 1, ()), 6, "6 does not divide 10, rows of q, k and v"),
        (SingleTensor("norm", (16,), split_dim=0, unit=8), 4, "4 does not divide 2, units of norm"),
    ],
)
def test_a_tensor_size_that_cannot_share_the_heads_is_our_own_mistake(
    mapping: WeightMapping, tensor_size: int, message: str
):
    with pytest.raises(AssertionError, match=message):
        mapping.local(source_of(mapping), tensor_rank=0, tensor_size=tensor_size)


def test_each_rank_of_a_gated_mlp_holds_its_gate_then_its_up():
    mapping = GatedMLP("gate", "up", ffn_hidden_size=2, hidden_size=1)
    source = MemorySource(
        {"gate": torch.tensor([[1.0], [2.0]]), "up": torch.tensor([[3.0], [4.0]])}
    )
    parts = locals_of(mapping, source, 2)
    assert [part.flatten().tolist() for part in parts] == [[1, 3], [2, 4]]


def test_padded_vocabulary_rows_are_zero_on_load_and_trimmed_on_export():
    mapping = VocabSplit("embed", 5, 2)
    source = source_of(mapping)
    parts = locals_of(mapping, source, 4)  # 5 rows padded to 8: the last rank holds padding alone
    assert [tuple(part.shape) for part in parts] == [(2, 2)] * 4
    full = torch.cat(parts)
    assert full.dtype == torch.float64
    assert full[5:].eq(0).all()
    full[5:] = 7.0
    assert torch.equal(mapping.to_hf(full)["embed"], source.tensors["embed"])


@pytest.mark.parametrize(
    "mapping", [MAPPINGS[2], MAPPINGS[3], MAPPINGS[5]], ids=lambda w: type(w).__name__
)
def test_a_tensor_size_that_does_not_divide_is_our_own_mistake(mapping: WeightMapping):
    with pytest.raises(AssertionError, match=r"\b3\b"):
        mapping.local(source_of(mapping), tensor_rank=0, tensor_size=3)


def test_a_tied_head_loads_the_embedding_and_exports_nothing():
    embedding = VocabSplit("embed", 5, 2)
    head, source = TiedHead("head", embedding), source_of(embedding)
    for rank in range(2):
        ours = head.local(source, tensor_rank=rank, tensor_size=2)
        assert torch.equal(ours, embedding.local(source, tensor_rank=rank, tensor_size=2))
    assert head.to_hf(torch.ones(6, 2)) == {}
    assert head.hf_shapes == {}
