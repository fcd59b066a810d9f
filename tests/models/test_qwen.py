"""Qwen2 against transformers: tensors, counts, rotary frequencies, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from roll_sft.errors import ConfigError
from roll_sft.models.hf_io import SafetensorsSource, Shape
from roll_sft.models.qwen import QWEN2
from roll_sft.models.registry import family_of, load_hf_config

SIZES = {
    "vocab_size": 2053,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
ON_DISK = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SIZES}


def tiny_model(**changes: Any) -> Qwen2ForCausalLM:
    """A model whose norms and biases are random too, or a wrong map of them would not show."""
    torch.manual_seed(3)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    model = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "rope_parameters": rope, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.3)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest) -> Qwen2ForCausalLM:
    return tiny_model(tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def folder(model: Qwen2ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path, max_shard_size="300KB")
    return path


class CountingSource:
    """Counts the bytes that another source hands out."""

    def __init__(self, source: SafetensorsSource) -> None:
        self.source = source
        self.num_bytes = 0

    def names(self) -> frozenset[str]:
        return self.source.names()

    def shape(self, name: str) -> Shape:
        return self.source.shape(name)

    def read(self, name: str) -> torch.Tensor:
        tensor = self.source.read(name)
        self.num_bytes += tensor.nbytes
        return tensor

    def read_slice(self, name: str, *, start: int, stop: int, dim: int) -> torch.Tensor:
        tensor = self.source.read_slice(name, start=start, stop=stop, dim=dim)
        self.num_bytes += tensor.nbytes
        return tensor


def merge(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The global tensor of a Megatron parameter, as its distributed checkpoint stores it."""
    if name.endswith("layernorm.weight"):
        return parts[0]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return torch.cat(parts, dim=1)
    if name.endswith("linear_fc1.weight"):
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    return torch.cat(parts)


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_every_weight_survives_the_way_to_megatron_and_back(
    model: Qwen2ForCausalLM, folder: Path, tensor_size: int
):
    shape, source = QWEN2.shape(model.config), SafetensorsSource(folder)
    QWEN2.check_source(shape, source=source)
    back: dict[str, torch.Tensor] = {}
    for name, word in QWEN2.weights(shape).items():
        parts = [
            word.local(source, tensor_rank=rank, tensor_size=tensor_size)
            for rank in range(tensor_size)
        ]
        tensors = word.to_hf(merge(name, parts))
        assert back.keys().isdisjoint(tensors), name
        back |= tensors
    expected = {name: tensor for name, tensor in model.state_dict().items() if name in back}
    assert len(expected) == len(back) == len(source.names())
    for name, tensor in expected.items():
        assert torch.equal(back[name], tensor), name


def test_a_rank_reads_only_its_share(model: Qwen2ForCausalLM, folder: Path):
    shape = QWEN2.shape(model.config)
    num_bytes = []
    for rank in range(2):
        source = CountingSource(SafetensorsSource(folder))
        for name, word in QWEN2.weights(shape).items():
            if name != "output_layer.weight" or not shape.tie_word_embeddings:
                word.local(source, tensor_rank=rank, tensor_size=2)
        num_bytes.append(source.num_bytes)
    norm_bytes = 4 * shape.hidden_size * (2 * shape.num_layers + 1)  # the only replicated tensors
    assert sum(num_bytes) == 4 * shape.num_parameters + norm_bytes
    assert max(num_bytes) - min(num_bytes) <= 2 * 4 * shape.hidden_size  # vocabulary 2053 is odd


def test_the_table_names_every_tensor_of_transformers_model(model: Qwen2ForCausalLM):
    shape = QWEN2.shape(model.config)
    parameters = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert QWEN2.hf_shapes(shape) == parameters
    assert QWEN2.hf_names(shape) == parameters.keys()
    assert shape.num_parameters == model.num_parameters()


def test_matmul_parameters_are_the_weights_of_linear_modules(model: Qwen2ForCausalLM):
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    expected = sum(module.weight.numel() for module in linears)
    assert QWEN2.shape(model.config).num_matmul_parameters == expected


def test_megatron_names_carry_the_global_layer_index():
    shape = QWEN2.shape(Qwen2Config(**SIZES))
    names = list(QWEN2.weights(shape))
    assert names[0] == "embedding.word_embeddings.weight"
    assert names[-2:] == ["decoder.final_layernorm.weight", "output_layer.weight"]
    assert [name for name in names if ".3." in name] == [
        "decoder.layers.3.input_layernorm.weight",
        "decoder.layers.3.self_attention.linear_qkv.weight",
        "decoder.layers.3.self_attention.linear_qkv.bias",
        "decoder.layers.3.self_attention.linear_proj.weight",
        "decoder.layers.3.pre_mlp_layernorm.weight",
        "decoder.layers.3.mlp.linear_fc1.weight",
        "decoder.layers.3.mlp.linear_fc2.weight",
    ]


def test_a_head_dimension_of_its_own_is_kept():
    model = tiny_model(head_dim=24)
    shape = QWEN2.shape(model.config)
    assert shape.head_dim == 24
    assert QWEN2.hf_shapes(shape) == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert len(shape.rotary_inv_freq) == 12


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
    ids=["transformers 4", "transformers 4 with null", "transformers 5"],
)
def test_files_of_both_generations_give_transformers_own_frequencies(
    tmp_path: Path, written: dict[str, Any]
):
    (tmp_path / "config.json").write_text(json.dumps({**ON_DISK, **written}))
    config = load_hf_config(str(tmp_path), trust_remote_code=False)
    shape = family_of(config).shape(config)
    frequencies = torch.tensor(shape.rotary_inv_freq)
    assert torch.equal(frequencies, Qwen2RotaryEmbedding(config).inv_freq)
    assert frequencies[1].item() == pytest.approx(5e5 ** (-1 / 8))
    assert (shape.num_layers, shape.head_dim, shape.qkv_bias) == (4, 16, True)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"use_sliding_window": True, "max_window_layers": 2}, "use_sliding_window true"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type linear"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type yarn"),
        ({"rope_parameters": {"rope_type": "new", "rope_theta": 1e6}}, "rope_type new"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one flat"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_theta": None}, "rope_theta None"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_attention_heads": 6}, "must divide hidden_size 64"),
        ({"head_dim": 3}, "head_dim 3"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, written: dict[str, Any], named: str
):
    (tmp_path / "config.json").write_text(json.dumps({**ON_DISK, **written}))
    config = load_hf_config(str(tmp_path), trust_remote_code=False)
    with pytest.raises(ConfigError, match=named):
        family_of(config).shape(config)


def test_all_refusals_come_in_one_message():
    config = Qwen2Config(**{**SIZES, "hidden_act": "gelu", "attention_dropout": 0.5})
    with pytest.raises(ConfigError, match=r"hidden_act gelu.*; attention_dropout 0\.5"):
        QWEN2.shape(config)


@pytest.mark.parametrize("path", ["Qwen/Qwen2.5-7B", "/no/such/folder"])
def test_a_path_that_is_no_folder_is_refused_with_its_value(path: str):
    with pytest.raises(ConfigError, match=f"'{path}' is not a folder.*not available in this"):
        load_hf_config(path, trust_remote_code=False)


def test_a_folder_without_configuration_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_hf_config(str(tmp_path), trust_remote_code=False)


@pytest.mark.parametrize(
    "text",
    [
        "{broken",
        json.dumps({**ON_DISK, "hidden_size": "wide"}),
        json.dumps({**ON_DISK, "model_type": "unheard_of"}),
        json.dumps({**ON_DISK, "torch_dtype": "unheard_of"}),
    ],
    ids=["json", "type", "model", "dtype"],
)
def test_a_file_that_transformers_cannot_read_is_refused_in_one_line(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="transformers cannot read") as caught:
        load_hf_config(str(tmp_path), trust_remote_code=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], None])
def test_an_unknown_architecture_is_refused_with_what_is_supported(architectures: Any):
    with pytest.raises(ConfigError, match="supports one of: Qwen2ForCausalLM"):
        family_of(Qwen2Config(**SIZES, architectures=architectures))
