"""gpt-oss: windows, yarn, weights in MXFP4, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from roll_sft.base.errors import ConfigError
from roll_sft.convert.from_hf import import_model
from roll_sft.convert.to_hf import export
from roll_sft.models.families.gpt_oss import GPT_OSS
from roll_sft.models.files.model_folder import check_source
from roll_sft.models.files.safetensors_in import SafetensorsSource
from tests import parity
from tests.models.helpers import SIZES, config_from_disk

ON_DISK = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    **SIZES,
    "num_local_experts": 4,
    "experts_per_token": 2,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def test_every_other_layer_has_a_window_and_yarn_scales_all(tmp_path: Path) -> None:
    shape = GPT_OSS.shape(config_from_disk(tmp_path, ON_DISK))
    assert shape.variation is not None
    assert [layer.window for layer in shape.variation.layers] == [16, None] * 2
    scalings = [layer.rotary_scaling for layer in shape.variation.layers]
    assert scalings == pytest.approx([1.3465736] * 4)
    assert len(shape.rotary_inv_freq) == shape.head_dim // 2
    assert shape.experts is not None
    assert (shape.experts.gate_limit, shape.experts.gate_slope) == (7.0, 1.702)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"attention_bias": False}, "attention_bias false"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types .*chunked_attention"),
        ({"swiglu_limit": -1.0}, r"swiglu_limit -1\.0 must be"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config .*only of .*mxfp4"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, written: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        GPT_OSS.shape(config_from_disk(tmp_path, {**ON_DISK, **written}))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A model with experts in MXFP4, inner sizes of whole blocks."""
    folder = parity.write_model(tmp_path / "model", kind="gptoss", num_layers=2)
    config = json.loads((folder / "config.json").read_text())
    config |= {"intermediate_size": 32, "quantization_config": MXFP4}
    del config["dtype"]  # as published
    (folder / "config.json").write_text(json.dumps(config))
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(1)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        tensors[f"{name}.gate_up_proj_bias"] = torch.zeros(4, 64)
        for matrix, (outputs, inputs) in {"gate_up_proj": (64, 64), "down_proj": (64, 32)}.items():
            del tensors[f"{name}.{matrix}"]
            shape = 4, outputs, inputs // 32
            tensors[f"{name}.{matrix}_blocks"] = torch.randint(
                0, 256, (*shape, 16), dtype=torch.uint8, generator=generator
            )
            tensors[f"{name}.{matrix}_scales"] = torch.randint(
                110, 130, shape, dtype=torch.uint8, generator=generator
            )
    save_file(
        {
            name: each if each.dtype == torch.uint8 else each.bfloat16()
            for name, each in tensors.items()
        },
        folder / "model.safetensors",
    )
    return folder


def test_weights_in_mxfp4_are_read_as_transformers_reads_them(packed: Path, tmp_path: Path) -> None:
    stored = load_file(packed / "model.safetensors")
    source = GPT_OSS.opened(SafetensorsSource(packed))
    for name in ("gate_up_proj", "down_proj"):
        full = f"model.layers.1.mlp.experts.{name}"
        wanted = convert_moe_packed_tensors(stored[f"{full}_blocks"], stored[f"{full}_scales"])
        assert source.shape(full) == tuple(wanted.shape)
        assert torch.equal(source.read(full), wanted)
        assert torch.equal(source.read_slice(full, start=1, stop=3, dim=0), wanted[1:3])


def test_a_model_in_mxfp4_is_exported_in_bf16(packed: Path, tmp_path: Path) -> None:
    import_model(packed, tmp_path / "checkpoint", dtype=None, replace=False)
    export(tmp_path / "checkpoint", tmp_path / "hf", dtype=None, replace=False)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    before, after = GPT_OSS.opened(SafetensorsSource(packed)), SafetensorsSource(tmp_path / "hf")
    shape = GPT_OSS.shape(config_from_disk(tmp_path, config))
    check_source(GPT_OSS, shape, source=after)
    assert all(torch.equal(before.read(name), after.read(name)) for name in after.names())
    assert after.dtype("model.layers.0.mlp.experts.down_proj") == torch.bfloat16
