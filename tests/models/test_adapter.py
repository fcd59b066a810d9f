"""Which rows of a fused weight an adapter belongs to, and what of PEFT's folders is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from roll_sft.base.errors import CheckpointError, ConfigError
from roll_sft.config.lora import LoraConfig
from roll_sft.models.adapters.adapter import (
    AdaptedWeight,
    adapted_weights,
    adapter_problems,
    adapter_shapes,
    num_trained_by,
)
from roll_sft.models.adapters.peft_folder import CONFIG, WEIGHTS, AdapterSource, read_lora
from roll_sft.models.source import family_of
from roll_sft.models.weight_map import QKV, GatedMLP, SingleTensor, WeightMapping
from tests import parity

A, B, C = (f"model.layers.0.{name}" for name in ("a", "b", "c"))
MAPPINGS: dict[str, WeightMapping] = {
    "qkv": QKV(f"{A}.weight", f"{B}.weight", f"{C}.weight", 8, 2, 6, (5,)),
    "gated": GatedMLP(f"{A}.weight", f"{B}.weight", 16, 5),
    "rows": SingleTensor(f"{A}.weight", (12, 16), split_dim=1),
}


class Numbers:
    """Tensors whose numbers are all different."""

    def __init__(self, mapping: WeightMapping) -> None:
        self.tensors, first = {}, 0
        for name, shape in mapping.hf_shapes.items():
            count = torch.Size(shape).numel()
            self.tensors[name] = torch.arange(first, first + count).view(shape)
            first += count

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def read_slice(self, name: str, *, start: int, stop: int, dim: int) -> torch.Tensor:
        return self.tensors[name].narrow(dim, start, stop - start)


@pytest.mark.parametrize("tensor_size", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", MAPPINGS)
def test_rows_of_a_rank_are_those_that_it_loads(kind: str, tensor_size: int) -> None:
    mapping = MAPPINGS[kind]
    source = Numbers(mapping)
    whole = torch.cat(list(source.tensors.values()))
    weight = AdaptedWeight(mapping, (A,))
    width = whole.shape[1] // (tensor_size if weight.is_row_parallel else 1)
    for rank in range(tensor_size):
        loaded = mapping.local(source, tensor_rank=rank, tensor_size=tensor_size)
        rows = weight.rows_of_rank(tensor_rank=rank, tensor_size=tensor_size)
        start = rank * width if weight.is_row_parallel else 0
        assert torch.equal(whole[rows][:, start : start + width], loaded)


def model(kind: str = "qwen2") -> Any:
    config = parity.model_config(kind, num_layers=2)
    config.architectures = [{"qwen2": "Qwen2ForCausalLM"}[kind.partition("-")[0]]]
    family = family_of(config)
    return family, family.shape(config)


def test_all_linear_is_every_projection_of_every_layer() -> None:
    family, shape = model()
    weights = adapted_weights(family, shape, LoraConfig(rank=4))
    modules = [module for weight in weights.values() for module in weight.modules]
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [each.rpartition(".")[2] for each in modules] == names * 2


@pytest.mark.parametrize(
    ("kind", "beside_attention"),
    [
        ("qwen3moe", []),
        ("glm4moe", []),  # PEFT would put those of shared experts on routed ones
        ("qwen2moe", [f"mlp.shared_expert.{each}_proj" for each in ("gate", "up", "down")]),
    ],
)
def test_routed_experts_and_routers_have_no_adapters(
    kind: str, beside_attention: list[str]
) -> None:
    config = parity.model_config(kind, num_layers=2)  # the first one of GLM-4.5 is dense
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    family = family_of(config)
    shape = family.shape(config)
    weights = adapted_weights(family, shape, LoraConfig(rank=4))
    modules = [module for weight in weights.values() for module in weight.modules]
    attention = [f"self_attn.{each}_proj" for each in "qkvo"]
    for layer in ("layers.0.", "layers.1."):
        found = [each.partition(layer)[2] for each in modules if layer in each]
        assert found == attention + beside_attention
    if not beside_attention:
        lora = LoraConfig(rank=4, target_modules=["gate_proj"])
        (problem,) = adapter_problems(family, shape, lora)
        assert "routed experts have none" in problem


def test_what_is_trained_is_counted_as_its_formula_says() -> None:
    _, shape = model()
    lora = LoraConfig(rank=4, modules_to_save=["lm_head"])
    hidden, ffn, width, kv = 64, 160, 64, 32
    per_layer = (hidden + width) + 2 * (hidden + kv) + (width + hidden) + 3 * (hidden + ffn)
    assert num_trained_by(lora, shape) == 2 * 4 * per_layer + 403 * hidden


def test_a_projection_that_the_model_lacks_is_named_with_those_that_it_has() -> None:
    family, shape = model()
    (problem,) = adapter_problems(family, shape, LoraConfig(rank=4, target_modules=["c_attn"]))
    assert "'c_attn'" in problem
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in problem


def test_a_tied_embedding_cannot_be_saved_beside_adapters() -> None:
    lora = LoraConfig(rank=4, modules_to_save=["embed_tokens"])
    (problem,) = adapter_problems(*model("qwen2-tied"), lora)
    assert "tie_word_embeddings" in problem
    assert list(adapter_problems(*model(), lora)) == []
    assert "base_model.model.model.embed_tokens.weight" in adapter_shapes(*model(), lora)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": "LORA", "use_dora": True}, "use_dora true"),
        ({"peft_type": "LORA", "bias": "all"}, "bias 'all'"),
        ({"peft_type": "LORA", "rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"peft_type": "LORA", "r": 0}, "r 0"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"peft_type": "LORA", "modules_to_save": ["score"]}, "modules_to_save 'score'"),
        ({"peft_type": "LORA", "modules_to_save": 5}, "modules_to_save 5"),
        ({"peft_type": "LORA", "lora_dropout": "x"}, "lora_dropout 'x'"),
        ({"peft_type": "LORA", "lora_dropout": 1.0}, "lora_dropout 1.0"),
        ({"peft_type": "LORA", "use_rslora": "yes"}, "use_rslora 'yes'"),
        ({"peft_type": "LORA", "use_new_thing": True}, "use_new_thing true"),
    ],
)
def test_what_is_not_lora_as_we_build_it_is_refused_by_name(
    values: dict[str, Any], named: str, tmp_path: Path
) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"r": 4, **values}))
    with pytest.raises(ConfigError) as refused:
        read_lora(tmp_path, key="lora.adapter_path")
    assert f"lora.adapter_path: '{tmp_path}': {named} " in str(refused.value)


def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path}.*{CONFIG}"):
        read_lora(tmp_path, key="lora.adapter_path")
    with pytest.raises(ConfigError, match=rf"{tmp_path}.*{WEIGHTS}"):
        AdapterSource(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match=WEIGHTS):
        AdapterSource(tmp_path)
