"""The sizes of a shape, and the check of a whole source."""

from dataclasses import replace

import pytest
import torch

from roll_sft.base.errors import ConfigError
from roll_sft.models.family import Family
from roll_sft.models.files.model_folder import check_source
from roll_sft.models.shape import ModelShape
from roll_sft.models.weight_map import GatedMLP, TiedHead, VocabSplit, WeightMapping
from tests.models.helpers import MemorySource

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


def test_qwen25_7b_has_its_published_parameter_counts():
    assert QWEN25_7B.num_parameters == 7_615_616_512
    assert QWEN25_7B.num_matmul_parameters == 7_070_285_824
    tied = replace(QWEN25_7B, tie_word_embeddings=True)
    assert tied.num_parameters == 7_615_616_512 - 152064 * 3584
    assert tied.num_matmul_parameters == QWEN25_7B.num_matmul_parameters


def test_other_norms_and_no_biases_give_the_published_counts_too():
    llama31_8b = replace(
        QWEN25_7B,
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        ffn_hidden_size=14336,
        vocab_size=128256,
        qkv_bias=False,
    )
    qwen3_8b = replace(
        llama31_8b, num_layers=36, ffn_hidden_size=12288, vocab_size=151936, qk_norm="head"
    )
    olmo2_7b = replace(
        llama31_8b,
        num_key_value_heads=32,
        ffn_hidden_size=11008,
        vocab_size=100352,
        qk_norm="projection",
        norm_placement="post",
    )
    shapes = (llama31_8b, qwen3_8b, olmo2_7b)
    published = [8_030_261_248, 8_190_735_360, 7_298_617_344]
    assert [shape.num_parameters for shape in shapes] == published


@pytest.mark.parametrize(("tensor_size", "padded"), [(1, 2053), (2, 2054), (4, 2056), (7, 2058)])
def test_the_vocabulary_is_padded_to_the_tensor_size_only(tensor_size: int, padded: int):
    assert replace(QWEN25_7B, vocab_size=2053).padded_vocab_size(tensor_size) == padded


def small_family(*, tied: bool) -> Family:
    embedding = VocabSplit("embed", 5, 2)
    head: WeightMapping = TiedHead("head", embedding) if tied else VocabSplit("head", 5, 2)
    table = {"a": embedding, "b": GatedMLP("gate", "up", 4, 2), "c": head}
    return Family("Small", shape=lambda config: QWEN25_7B, weights=lambda shape: dict(table))


def small_tensors(*, tied: bool) -> dict[str, torch.Tensor]:
    shapes = small_family(tied=tied).hf_shapes(QWEN25_7B)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_a_source_with_exactly_the_tensors_is_accepted(tied: bool):
    tensors = small_tensors(tied=tied) | {"layers.0.rotary_emb.inv_freq": torch.ones(2)}
    check_source(small_family(tied=tied), QWEN25_7B, source=MemorySource(tensors))


def test_names_are_those_of_every_word_once():
    assert small_family(tied=True).hf_shapes(QWEN25_7B).keys() == {"embed", "gate", "up"}
    assert small_family(tied=False).hf_shapes(QWEN25_7B).keys() == {"embed", "gate", "up", "head"}


def test_missing_and_unexpected_tensors_are_refused_with_counts_and_first_names():
    tensors = small_tensors(tied=False)
    del tensors["head"], tensors["up"]
    tensors |= {f"extra.{index}": torch.ones(1) for index in range(5)}
    with pytest.raises(ConfigError) as caught:
        check_source(small_family(tied=False), QWEN25_7B, source=MemorySource(tensors))
    message = str(caught.value)
    assert "somewhere" in message
    assert "2 missing (up, head)" in message
    assert "5 unexpected (extra.0, extra.1, extra.2, ...)" in message
    assert "\n" not in message


def test_a_tensor_of_another_shape_is_refused():
    tensors = small_tensors(tied=False) | {"up": torch.ones(4, 3)}
    with pytest.raises(ConfigError, match=r"\bup\b.*\[4, 3\].*\[4, 2\]"):
        check_source(small_family(tied=False), QWEN25_7B, source=MemorySource(tensors))


def test_a_tied_model_may_store_its_head_if_it_equals_the_embedding():
    tensors = small_tensors(tied=True)
    tensors["head"] = tensors["embed"].clone()
    check_source(small_family(tied=True), QWEN25_7B, source=MemorySource(tensors))
    tensors["head"][4, 1] += 1
    with pytest.raises(ConfigError, match=r"tie_word_embeddings.*\bhead\b.*\bembed\b"):
        check_source(small_family(tied=True), QWEN25_7B, source=MemorySource(tensors))
    tensors["head"] = tensors["embed"][:4]
    with pytest.raises(ConfigError, match=r"tie_word_embeddings.*\bhead\b.*\bembed\b"):
        check_source(small_family(tied=True), QWEN25_7B, source=MemorySource(tensors))
