"""What holds for every family with experts, against transformers' own models."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, PreTrainedConfig
from transformers import Qwen2MoeConfig as Qwen2Moe
from transformers import Qwen3MoeConfig as Qwen3Moe

from roll_sft.base.errors import ConfigError
from roll_sft.convert.from_hf import import_model
from roll_sft.convert.to_hf import export
from roll_sft.models.files.config_file import load_hf_config
from roll_sft.models.files.model_folder import check_source
from roll_sft.models.files.safetensors_in import SafetensorsSource
from roll_sft.models.moe.experts import num_active_parameters
from roll_sft.models.source import family_of
from tests import parity
from tests.models.helpers import DEFAULT_ROPE, SIZES

KINDS = tuple(parity.EXPERTS)
ROPE = {"rope_parameters": DEFAULT_ROPE}


def folder_of(kind: str, folder: Path) -> Path:
    return parity.write_model(folder / kind, kind=kind, num_layers=2)


@pytest.mark.parametrize(
    "kind", [*KINDS, "deepseekv3-mtp", "mixtral-fused", "glm4moe-fused", "deepseekv3-fused"]
)
def test_a_model_survives_the_way_to_a_checkpoint_and_back(kind: str, tmp_path: Path) -> None:
    model = folder_of(kind, tmp_path)
    import_model(model, tmp_path / "checkpoint", dtype=None, replace=False)
    export(tmp_path / "checkpoint", tmp_path / "hf", dtype=None, replace=False)
    before, after = (SafetensorsSource(each) for each in (model, tmp_path / "hf"))
    assert before.names() == after.names()
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gptoss"])
def test_files_with_all_experts_of_a_layer_in_one_tensor_are_read(
    kind: str, tmp_path: Path
) -> None:
    path = folder_of(kind, tmp_path)
    before = SafetensorsSource(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    fused = SafetensorsSource(tmp_path / "fused")
    assert "model.layers.1.mlp.experts.gate_up_proj" in fused.names()
    config = load_hf_config(str(path), trust_remote_code=False)
    family = family_of(config)
    source = family.opened(fused)
    check_source(family, family.shape(config), source=source)
    assert all(torch.equal(before.read(name), source.read(name)) for name in before.names())
    name = next(name for name in sorted(before.names()) if "experts.1." in name)
    wanted = before.read_slice(name, start=2, stop=7, dim=1)
    assert torch.equal(source.read_slice(name, start=2, stop=7, dim=1), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_and_the_counts_are_those_of_transformers_model(
    kind: str, tmp_path: Path
) -> None:
    path = folder_of(kind, tmp_path)
    config = load_hf_config(str(path), trust_remote_code=False)
    family = family_of(config)
    shape = family.shape(config)
    check_source(family, shape, source=SafetensorsSource(path))
    model = AutoModelForCausalLM.from_pretrained(path)
    assert shape.num_parameters == model.num_parameters()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert shape.experts is not None
    share = shape.experts.experts_per_token / shape.experts.num_experts
    assert num_active_parameters(shape) == shape.num_parameters - experts * (1 - share)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (Qwen3Moe(**SIZES, **ROPE, mlp_only_layers=[0]), r"mlp_only_layers \[0\]"),
        (Qwen3Moe(**SIZES, **ROPE, decoder_sparse_step=2), "decoder_sparse_step 2"),
        (Qwen3Moe(**SIZES, **ROPE, attention_bias=True), "attention_bias true"),
        (Qwen3Moe(**SIZES, **ROPE, num_experts=2), "num_experts_per_tok 8"),
        (Qwen2Moe(**SIZES, **ROPE, use_sliding_window=True), "use_sliding_window true"),
        (Qwen2Moe(**SIZES, **ROPE, router_aux_loss_coef=-1.0), r"router_aux_loss_coef -1\.0"),
        (MixtralConfig(**SIZES, **ROPE, router_jitter_noise=0.1), r"router_jitter_noise 0\.1"),
        (OlmoeConfig(**SIZES, **ROPE, clip_qkv=8.0), r"clip_qkv 8\.0"),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    config: PreTrainedConfig, problem: str, tmp_path: Path
) -> None:
    written = config.to_dict() | {"architectures": [architecture_of(config)]}
    (tmp_path / "config.json").write_text(json.dumps(written))
    opened = load_hf_config(str(tmp_path), trust_remote_code=False)
    with pytest.raises(ConfigError, match=problem):
        family_of(opened).shape(opened)


def architecture_of(config: PreTrainedConfig) -> str:
    return f"{type(config).__name__.removesuffix('Config')}ForCausalLM"
