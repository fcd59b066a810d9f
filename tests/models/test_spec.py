"""Weight words against hand-made tensors, the sizes of a shape, and the check of a whole source."""

from dataclasses import replace

import pytest
import torch

from roll_sft.errors import ConfigError
from roll_sft.models.hf_io import Shape
from roll_sft.models.spec import (
    QKV,
    Family,
    GatedMLP,
    ModelShape,
    Replicated,
    RowSplit,
    TiedHead,
    VocabSplit,
    Word,
)

QWEN25_7B = ModelShape(
    architecture="Qwen2ForCausalLM",
    num_layers=28,
    hidden_size=3584,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=128,
    ffn_hidden_size=18944,
    vocab_size=152064,
    max_position_embeddings=131072,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    qkv_bias=True,
    rotary_inv_freq=(),
    initializer_range=0.02,
)


class MemorySource:
    """Tensors from a dictionary; counts the bytes it hands out."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.num_bytes_read = 0

    def __str__(self) -> str:
        return "somewhere"

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> Shape:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        self.num_bytes_read += self.tensors[name].nbytes
        return self.tensors[name]

    def read_slice(self, name: str, *, start: int, stop: int, dim: int) -> torch.Tensor:
        assert 0 <= start <= stop <= self.tensors[name].shape[dim], (name, start, stop)
        part = self.tensors[name].narrow(dim, start, stop - start)
        self.num_bytes_read += part.nbytes
        return part


def source_of(word: Word) -> MemorySource:
    """Tensors for `word` in which no two numbers are equal."""
    tensors, first = {}, 1
    for name, shape in word.hf_shapes.items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + count, dtype=torch.float64).reshape(shape)
        first += count
    return MemorySource(tensors)


def locals_of(word: Word, source: MemorySource, tensor_size: int) -> list[torch.Tensor]:
    return [
        word.local(source, tensor_rank=rank, tensor_size=tensor_size) for rank in range(tensor_size)
    ]


def merge(word: Word, parts: list[torch.Tensor]) -> torch.Tensor:
    """The global tensor as Megatron's distributed checkpoint stores it."""
    match word:
        case Replicated():
            return parts[0]
        case RowSplit():
            return torch.cat(parts, dim=1)
        case GatedMLP():
            halves = [part.chunk(2) for part in parts]
            return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        case _:
            return torch.cat(parts)


WORDS = [
    Replicated("norm", (6,)),
    VocabSplit("embed", 13, 3),
    RowSplit("o", (3, 8)),
    QKV("q", "k", "v", num_heads=8, num_groups=4, head_dim=2, columns=(3,)),
    QKV("q", "k", "v", num_heads=8, num_groups=4, head_dim=2, columns=()),
    QKV("q", "k", "v", num_heads=4, num_groups=4, head_dim=6, columns=(3,)),
    GatedMLP("gate", "up", ffn_hidden_size=8, hidden_size=3),
]


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
@pytest.mark.parametrize("word", WORDS, ids=lambda word: type(word).__name__)
def test_merged_local_tensors_give_back_the_source_bit_for_bit(word: Word, tensor_size: int):
    source = source_of(word)
    back = word.to_hf(merge(word, locals_of(word, source, tensor_size)))
    assert list(back) == list(word.hf_shapes)
    for name, tensor in source.tensors.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("word", WORDS[1:], ids=lambda word: type(word).__name__)
def test_all_ranks_together_read_each_byte_once(word: Word):
    source = source_of(word)
    locals_of(word, source, 4)
    assert source.num_bytes_read == sum(tensor.nbytes for tensor in source.tensors.values())


def test_qkv_rows_are_query_heads_key_value_for_each_group():
    # With head dimension 1 every number is one head: [q0 q1 k0 v0] [q2 q3 k1 v1].
    word = QKV("q", "k", "v", num_heads=4, num_groups=2, head_dim=1, columns=())
    source = MemorySource(
        {
            "q": torch.tensor([0.0, 1.0, 2.0, 3.0]),
            "k": torch.tensor([10.0, 11.0]),
            "v": torch.tensor([20.0, 21.0]),
        }
    )
    both = word.local(source, tensor_rank=0, tensor_size=1)
    assert both.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert word.local(source, tensor_rank=1, tensor_size=2).tolist() == [2, 3, 11, 21]


def test_each_rank_of_a_gated_mlp_holds_its_gate_then_its_up():
    word = GatedMLP("gate", "up", ffn_hidden_size=2, hidden_size=1)
    source = MemorySource(
        {"gate": torch.tensor([[1.0], [2.0]]), "up": torch.tensor([[3.0], [4.0]])}
    )
    parts = locals_of(word, source, 2)
    assert [part.flatten().tolist() for part in parts] == [[1, 3], [2, 4]]


def test_padded_vocabulary_rows_are_zero_on_load_and_trimmed_on_export():
    word = VocabSplit("embed", 5, 2)
    source = source_of(word)
    parts = locals_of(word, source, 4)  # 5 rows padded to 8: the last rank holds padding alone
    assert [tuple(part.shape) for part in parts] == [(2, 2)] * 4
    full = torch.cat(parts)
    assert full.dtype == torch.float64
    assert full[5:].eq(0).all()
    full[5:] = 7.0
    assert torch.equal(word.to_hf(full)["embed"], source.tensors["embed"])


@pytest.mark.parametrize("word", [WORDS[2], WORDS[3], WORDS[6]], ids=lambda w: type(w).__name__)
def test_a_tensor_size_that_does_not_divide_is_our_own_mistake(word: Word):
    with pytest.raises(AssertionError, match="tensor parallel size 3 does not divide"):
        word.local(source_of(word), tensor_rank=0, tensor_size=3)


def test_a_tied_head_loads_the_embedding_and_exports_nothing():
    embedding = VocabSplit("embed", 5, 2)
    head, source = TiedHead("head", embedding), source_of(embedding)
    for rank in range(2):
        ours = head.local(source, tensor_rank=rank, tensor_size=2)
        assert torch.equal(ours, embedding.local(source, tensor_rank=rank, tensor_size=2))
    assert head.to_hf(torch.ones(6, 2)) == {}
    assert head.hf_shapes == {}


def test_qwen25_7b_has_its_published_parameter_counts():
    assert QWEN25_7B.num_parameters == 7_615_616_512
    assert QWEN25_7B.num_matmul_parameters == 7_070_285_824
    tied = replace(QWEN25_7B, tie_word_embeddings=True)
    assert tied.num_parameters == 7_615_616_512 - 152064 * 3584
    assert tied.num_matmul_parameters == QWEN25_7B.num_matmul_parameters


@pytest.mark.parametrize(("tensor_size", "padded"), [(1, 2053), (2, 2054), (4, 2056), (7, 2058)])
def test_the_vocabulary_is_padded_to_the_tensor_size_only(tensor_size: int, padded: int):
    assert replace(QWEN25_7B, vocab_size=2053).padded_vocab_size(tensor_size) == padded


def small_family(*, tied: bool) -> Family:
    embedding = VocabSplit("embed", 5, 2)
    head: Word = TiedHead("head", embedding) if tied else VocabSplit("head", 5, 2)
    table = {"a": embedding, "b": GatedMLP("gate", "up", 4, 2), "c": head}
    return Family("Small", shape=lambda config: QWEN25_7B, weights=lambda shape: dict(table))


def small_tensors(*, tied: bool) -> dict[str, torch.Tensor]:
    shapes = small_family(tied=tied).hf_shapes(QWEN25_7B)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_a_source_with_exactly_the_tensors_is_accepted(tied: bool):
    tensors = small_tensors(tied=tied) | {"layers.0.rotary_emb.inv_freq": torch.ones(2)}
    small_family(tied=tied).check_source(QWEN25_7B, source=MemorySource(tensors))


def test_names_are_those_of_every_word_once():
    assert small_family(tied=True).hf_names(QWEN25_7B) == {"embed", "gate", "up"}
    assert small_family(tied=False).hf_names(QWEN25_7B) == {"embed", "gate", "up", "head"}


def test_missing_and_unexpected_tensors_are_refused_with_counts_and_first_names():
    tensors = small_tensors(tied=False)
    del tensors["head"], tensors["up"]
    tensors |= {f"extra.{index}": torch.ones(1) for index in range(5)}
    with pytest.raises(ConfigError) as caught:
        small_family(tied=False).check_source(QWEN25_7B, source=MemorySource(tensors))
    message = str(caught.value)
    assert "somewhere" in message
    assert "2 missing (up, head)" in message
    assert "5 unexpected (extra.0, extra.1, extra.2, ...)" in message
    assert "\n" not in message


def test_a_tensor_of_another_shape_is_refused():
    tensors = small_tensors(tied=False) | {"up": torch.ones(4, 3)}
    with pytest.raises(ConfigError, match=r"up has shape \[4, 3\] but config.json gives \[4, 2\]"):
        small_family(tied=False).check_source(QWEN25_7B, source=MemorySource(tensors))


def test_a_tied_model_may_store_its_head_if_it_equals_the_embedding():
    tensors = small_tensors(tied=True)
    tensors["head"] = tensors["embed"].clone()
    small_family(tied=True).check_source(QWEN25_7B, source=MemorySource(tensors))
    tensors["head"][4, 1] += 1
    with pytest.raises(ConfigError, match="head and embed differ"):
        small_family(tied=True).check_source(QWEN25_7B, source=MemorySource(tensors))
    tensors["head"] = tensors["embed"][:4]
    with pytest.raises(ConfigError, match="head and embed differ"):
        small_family(tied=True).check_source(QWEN25_7B, source=MemorySource(tensors))
