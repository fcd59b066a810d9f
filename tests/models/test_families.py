"""What holds for every family, against transformers' own models."""

from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from roll_sft.models.family import Family
from roll_sft.models.files.model_folder import check_source
from roll_sft.models.files.safetensors_in import SafetensorsSource
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import ARCHITECTURES, family_named, family_of
from roll_sft.models.weight_map import SingleTensor
from tests.models.helpers import DEFAULT_ROPE, LLAMA3_ROPE, SIZES, MemorySource, tiny_model

ROPE = {"rope_parameters": DEFAULT_ROPE}
WRITTEN_INTO = {"rope_parameters": {**DEFAULT_ROPE}}  # by families that rotate a part of a head
SCALED = {"rope_parameters": LLAMA3_ROPE}
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
NO_PAD = {"pad_token_id": None}  # by default outside of so small a vocabulary
BY_KIND = {"rope_parameters": {"full_attention": LLAMA3_ROPE, "sliding_attention": DEFAULT_ROPE}}
PARTIAL = {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gemma2": Gemma2Config(**SIZES, **SCALED, **UNTIED, head_dim=24),
    "gemma2-tied": Gemma2Config(**SIZES, **ROPE, **TIED, head_dim=16),
    "gemma3": Gemma3TextConfig(**SIZES, **BY_KIND, **UNTIED, head_dim=24, sliding_window_pattern=2),
    "gemma3-tied": Gemma3TextConfig(**SIZES, **TIED, head_dim=16, sliding_window_pattern=2),
    "glm4": Glm4Config(**SIZES, **PARTIAL, **NO_PAD, head_dim=24),
    "glm4-tied": Glm4Config(
        **SIZES, **WRITTEN_INTO, **TIED, **NO_PAD, head_dim=16, attention_bias=False
    ),
    "granite": GraniteConfig(**SIZES, **SCALED, residual_multiplier=0.5),
    "granite-tied": GraniteConfig(**SIZES, **ROPE, **TIED, logits_scaling=8.0),
    "llama": LlamaConfig(**SIZES, **SCALED),
    "llama-tied": LlamaConfig(**SIZES, **ROPE, **TIED, head_dim=24),
    "mistral": MistralConfig(**SIZES, **ROPE, head_dim=24),
    "mistral-tied": MistralConfig(**SIZES, **SCALED, **TIED),
    "olmo2": Olmo2Config(**{**SIZES, "num_key_value_heads": 4}, **ROPE),
    "olmo2-tied": Olmo2Config(**SIZES, **SCALED, **TIED),
    "olmo3": Olmo3Config(**{**SIZES, "num_key_value_heads": 4}, **BY_KIND),
    "olmo3-tied": Olmo3Config(**SIZES, **TIED),
    "phi3": Phi3Config(**{**SIZES, "num_key_value_heads": 4}, **NO_PAD),
    "phi3-tied": Phi3Config(**SIZES, **PARTIAL, **TIED, **NO_PAD),
    "qwen2": Qwen2Config(**SIZES, **ROPE),
    "qwen2-tied": Qwen2Config(**SIZES, **SCALED, **TIED),
    "qwen3": Qwen3Config(**SIZES, **ROPE, head_dim=24),
    "qwen3-tied": Qwen3Config(**SIZES, **SCALED, **TIED, head_dim=16),
    "smollm3": SmolLM3Config(**SIZES, **SCALED, **UNTIED, **NO_PAD),
    "smollm3-tied": SmolLM3Config(**SIZES, **ROPE, **TIED, **NO_PAD),
}
# A norm over a whole projection has no part for a rank without a key head of its own.
TENSOR_SIZES = {name: (1, 2, 4) for name in CONFIGS} | {
    "olmo2-tied": (1, 2),
    "olmo3-tied": (1, 2),
}


@pytest.fixture(scope="module", params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> PreTrainedModel:
    return tiny_model(CONFIGS[name])


@pytest.fixture(scope="module")
def family(model: PreTrainedModel) -> Family:
    return family_named(type(model).__name__)


@pytest.fixture(scope="module")
def shape(family: Family, model: PreTrainedModel) -> ModelShape:
    return family.shape(model.config)


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path, max_shard_size="300KB")
    return path


def merge(name: str, parts: list[torch.Tensor], shape: ModelShape) -> torch.Tensor:
    """The global tensor of a Megatron parameter, as its distributed checkpoint stores it."""
    is_qk_norm = name.endswith((".q_layernorm.weight", ".k_layernorm.weight"))
    if name.endswith("layernorm.weight") and not (is_qk_norm and shape.qk_norm == "projection"):
        assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"
        return parts[0]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return torch.cat(parts, dim=1)
    if name.endswith("linear_fc1.weight"):
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    return torch.cat(parts)


# Tested in test_expert_families.py, test_gpt_oss.py and test_glm4_moe.py.
EXPERTS = ("DeepseekV3", "Glm4Moe", "GptOss", "Mixtral", "Olmoe", "Qwen2Moe", "Qwen3Moe")


def test_every_family_is_tested_here():
    tested = {type(each).__name__.replace("TextConfig", "Config") for each in CONFIGS.values()}
    tested |= {f"{each}Config" for each in EXPERTS}
    assert {name.replace("Config", "ForCausalLM") for name in tested} == set(ARCHITECTURES)


def test_every_weight_survives_the_way_to_megatron_and_back(
    name: str, model: PreTrainedModel, shape: ModelShape, family: Family, folder: Path
):
    source = SafetensorsSource(folder)
    assert family_of(model.config) is family
    check_source(family, shape, source=source)
    weights = {key: tensor for key, tensor in model.state_dict().items() if key in source.names()}
    for tensor_size in TENSOR_SIZES[name]:
        back: dict[str, torch.Tensor] = {}
        for key, mapping in family.weights(shape).items():
            parts = [
                mapping.local(source, tensor_rank=rank, tensor_size=tensor_size)
                for rank in range(tensor_size)
            ]
            tensors = mapping.to_hf(merge(key, parts, shape))
            assert back.keys().isdisjoint(tensors), key
            back |= tensors
        assert back.keys() == weights.keys() == source.names()
        for key, tensor in weights.items():
            assert torch.equal(back[key], tensor), f"{key} at tensor parallel size {tensor_size}"


def test_a_rank_reads_only_its_share(
    name: str, model: PreTrainedModel, shape: ModelShape, family: Family
):
    mappings = [mapping for mapping in family.weights(shape).values() if mapping.hf_shapes]
    norms = [
        mapping.shape[0]
        for mapping in mappings
        if isinstance(mapping, SingleTensor) and mapping.split_dim is None
    ]
    for tensor_size in TENSOR_SIZES[name]:
        num_bytes = []
        for rank in range(tensor_size):
            source = MemorySource(dict(model.named_parameters()))
            for mapping in mappings:
                mapping.local(source, tensor_rank=rank, tensor_size=tensor_size)
            num_bytes.append(source.num_bytes_read)
        assert sum(num_bytes) == 4 * (shape.num_parameters + (tensor_size - 1) * sum(norms))
        rows_apart = tensor_size * (1 if shape.tie_word_embeddings else 2)  # vocabulary 2053
        assert max(num_bytes) - min(num_bytes) <= 4 * shape.hidden_size * rows_apart


def test_the_table_names_every_tensor_of_transformers_model(
    model: PreTrainedModel, shape: ModelShape, family: Family
):
    parameters = {key: tuple(tensor.shape) for key, tensor in model.named_parameters()}
    assert family.hf_shapes(shape) == parameters


def test_parameters_are_counted_as_transformers_counts_them(
    model: PreTrainedModel, shape: ModelShape
):
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert shape.num_parameters == model.num_parameters()
    assert shape.num_matmul_parameters == sum(linear.weight.numel() for linear in linears)


def test_rotary_frequencies_are_those_of_transformers_model(
    name: str, model: PreTrainedModel, shape: ModelShape
):
    tables = [
        table
        for key, table in sorted(model.model.rotary_emb.named_buffers())
        if key.endswith("inv_freq") and "original" not in key
    ]
    ours = torch.tensor(shape.rotary_inv_freq).split([len(table) for table in tables])
    assert all(map(torch.equal, ours, tables))
    rope = CONFIGS[name].rope_parameters
    ropes = [rope] if "rope_type" in rope else [rope[kind] for kind in sorted(rope)]
    for frequencies, settings in zip(ours, ropes, strict=True):
        width = int(shape.head_dim * settings.get("partial_rotary_factor", 1.0))
        assert len(frequencies) == width // 2
        is_scaled = settings["rope_type"] == "llama3"
        assert (frequencies[-1] < 0.2 * settings["rope_theta"] ** (2 / width - 1)) == is_scaled
