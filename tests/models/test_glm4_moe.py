"""GLM-4.5: what its routers and layers are, what is left out of its files, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from roll_sft.base.errors import ConfigError
from roll_sft.convert.from_hf import import_model
from roll_sft.convert.to_hf import export
from roll_sft.models.families.glm4_moe import GLM4_MOE
from roll_sft.models.files.safetensors_in import SafetensorsSource
from tests import parity
from tests.models.helpers import SIZES, config_from_disk

ON_DISK = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    **SIZES,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "rope_theta": 1e6,
    "partial_rotary_factor": 0.5,
}


def test_the_first_layers_are_dense_and_half_of_each_head_is_rotated(tmp_path: Path) -> None:
    shape = GLM4_MOE.shape(config_from_disk(tmp_path, ON_DISK))
    assert shape.experts is not None
    assert (shape.num_expert_layers, shape.experts.shared_ffn_hidden_size) == (3, 80)
    assert len(shape.rotary_inv_freq) == shape.head_dim // 4
    names = GLM4_MOE.hf_shapes(shape).keys()
    assert "model.layers.0.mlp.gate_proj.weight" in names
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in names


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"n_group": 3}, r"n_group 3 \(must divide the 8 experts\)"),
        ({"n_group": 8}, r"n_group 8 \(must leave 2 of 8 experts"),
        ({"n_group": 4, "topk_group": 5}, "topk_group 5 .*from 1 to n_group 4"),
        ({"n_group": 4, "topk_group": 1}, "num_experts_per_tok 3 .*at most 2,"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace 4 .*from 0 to 3"),
        ({"routed_scaling_factor": 0.0}, r"routed_scaling_factor 0\.0"),
        ({"attention_dropout": 0.1}, r"attention_dropout 0\.1"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, written: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        GLM4_MOE.shape(config_from_disk(tmp_path, {**ON_DISK, **written}))


def test_biases_of_scores_stay_in_fp32_and_layers_for_prediction_are_kept(tmp_path: Path) -> None:
    model = parity.write_model(tmp_path / "model", kind="glm4moe-mtp", num_layers=2)
    kept = {
        name: each if "e_score" in name else each.bfloat16()
        for name, each in load_file(model / "model.safetensors").items()
    }
    save_file(kept, model / "model.safetensors")
    import_model(model, tmp_path / "checkpoint", dtype=None, replace=False)
    export(tmp_path / "checkpoint", tmp_path / "hf", dtype="bf16", replace=False)
    after = SafetensorsSource(tmp_path / "hf")
    assert {"model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight"} < after.names()
    assert after.names() == kept.keys()
    assert all(torch.equal(after.read(name), each) for name, each in kept.items())
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        assert after.dtype(name) == torch.float32
