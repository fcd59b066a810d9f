"""What a run may ask of experts, by value, before anything starts."""

import re
from typing import Any

import pytest
from transformers import DeepseekV3Config, Glm4MoeConfig, Qwen2Config, Qwen2MoeConfig

from roll_sft.config.build import build_config
from roll_sft.job.experts import expert_problems
from roll_sft.models.source import family_of
from tests.models.helpers import DEFAULT_ROPE, SIZES

EXPERTS = Qwen2MoeConfig(
    **SIZES,
    rope_parameters=DEFAULT_ROPE,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=40,
    shared_expert_intermediate_size=51,
    architectures=["Qwen2MoeForCausalLM"],
)
SIGMOID = Glm4MoeConfig(
    **SIZES,
    rope_parameters=DEFAULT_ROPE | {"partial_rotary_factor": 0.5},
    n_routed_experts=8,
    moe_intermediate_size=40,
    architectures=["Glm4MoeForCausalLM"],
)
LATENT = DeepseekV3Config(
    **SIZES | {"num_key_value_heads": 4},
    rope_parameters=DEFAULT_ROPE,
    n_routed_experts=8,
    n_group=4,
    topk_group=4,
    first_k_dense_replace=1,
    architectures=["DeepseekV3ForCausalLM"],
)
DENSE = Qwen2Config(**SIZES, rope_parameters=DEFAULT_ROPE, architectures=["Qwen2ForCausalLM"])
EP = "expert_model_parallel_size"


@pytest.mark.parametrize(
    ("model", "asked", "problem"),
    [
        (EXPERTS, {"parallel": {EP: 4, "num_workers": 4}}, f"{EP}: 4 .* divisor of 6"),
        (EXPERTS, {"parallel": {EP: 3, "num_workers": 4}}, f"{EP}: 3 .* divisor of 4"),
        (
            EXPERTS,
            {"parallel": {"num_workers": 4, EP: 2, "tensor_model_parallel_size": 2}},
            r"sequence_parallel: false, .* set it to true",
        ),
        (
            EXPERTS,
            {
                "parallel": {
                    "num_workers": 2,
                    "tensor_model_parallel_size": 2,
                    "sequence_parallel": True,
                }
            },
            "tensor_model_parallel_size: 2 .* shared_expert_intermediate_size 51",
        ),
        (EXPERTS, {"moe": {"router_bias_update_rate": 0.1}}, r"update_rate: 0\.1, .* leave it out"),
        (DENSE, {"moe": {"router_bias_update_rate": 0.1}}, r"update_rate: 0\.1, .* leave it out"),
        (
            SIGMOID,
            {"moe": {"aux_loss_coef": 0.1}},
            r"aux_loss_coef: 0\.1, .*router_bias_update_rate",
        ),
        (LATENT, {"lora": {"rank": 8}}, r"lora\.rank: 8\b.* latent .*lora\.rank=0"),
        (EXPERTS, {"lora": {"rank": 8, "quantize_base": "nf4"}}, "quantize_base: nf4, .*=none"),
        (
            SIGMOID,
            {"lora": {"rank": 8}, "moe": {"router_bias_update_rate": 0.1}},
            r"update_rate: 0\.1, .*set it to 0",
        ),
        (EXPERTS, {"train": {"z_loss_coef": 0.1}}, r"train\.z_loss_coef\b.* leave it out"),
        (DENSE, {"parallel": {EP: 2, "num_workers": 2}}, f"{EP}: 2, .* set it to 1"),
        (DENSE, {"moe": {"z_loss_coef": 0.1}}, r"moe\.z_loss_coef: 0\.1, .* leave it out"),
        (DENSE, {"moe": {"aux_loss_coef": 0.1}}, r"moe\.aux_loss_coef: 0\.1, .* leave it out"),
    ],
)
def test_what_experts_do_not_allow_is_named(
    model: Any, asked: dict[str, Any], problem: str
) -> None:
    found = list(expert_problems(build_config(asked), family_of(model).shape(model)))
    assert any(re.search(problem, each) for each in found), found
