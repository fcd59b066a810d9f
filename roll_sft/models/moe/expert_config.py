"""What is common to HuggingFace configurations of models with experts.

Promise: a setting of experts that no family builds is refused by name.
"""

from typing import TYPE_CHECKING, TypeAlias

from roll_sft.base.text import shown

if TYPE_CHECKING:
    from transformers import (
        DeepseekV3Config,
        Glm4MoeConfig,
        GptOssConfig,
        MixtralConfig,
        OlmoeConfig,
        Qwen2MoeConfig,
        Qwen3MoeConfig,
    )

    ExpertConfig: TypeAlias = (
        DeepseekV3Config | Glm4MoeConfig | GptOssConfig | MixtralConfig | OlmoeConfig
        | Qwen2MoeConfig | Qwen3MoeConfig
    )  # fmt: skip

_NUMBERS = ("n_group", "topk_group", "num_experts_per_tok", "first_k_dense_replace")
MOST, WIDEST, LARGEST = 2**16, 2**20, 1e6  # far above the values of every published model


def expert_problems(config: "ExpertConfig", *, num_experts: int) -> list[str]:
    """Value and rule of each setting of experts that cannot be built."""
    problems, chosen = list[str](), config.num_experts_per_tok
    assert chosen is not None, "`sigmoid_problems` refuses none"
    if not 2 <= num_experts <= MOST:
        problems.append(f"number of experts {num_experts} (must be from 2 to {MOST})")
    for key in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if not 1 <= (width := getattr(config, key, 1)) <= WIDEST:
            problems.append(f"{key} {width} (must be from 1 to {WIDEST})")
    if not 1 <= chosen <= num_experts:
        problems.append(f"num_experts_per_tok {chosen} (must be from 1 to {num_experts} experts)")
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)  # a sigmoid router has none
    if not 0 <= coefficient <= LARGEST:
        problems.append(f"router_aux_loss_coef {coefficient} (must be from 0 to {LARGEST:g})")
    if dense := getattr(config, "mlp_only_layers", None):
        problems.append(f"mlp_only_layers {shown(dense)} (only layers with experts)")
    if (every := getattr(config, "decoder_sparse_step", 1)) != 1:
        problems.append(f"decoder_sparse_step {every} (only 1)")
    return problems


def sigmoid_problems(config: "DeepseekV3Config | Glm4MoeConfig") -> list[str]:
    """`expert_problems`, and those of groups of experts and of layers without experts."""
    num_experts = config.n_routed_experts
    given = {key: getattr(config, key) for key in _NUMBERS}
    missing = [f"{key} null (must be a number)" for key in _NUMBERS if given[key] is None]
    if missing:
        return missing
    problems = expert_problems(config, num_experts=num_experts)
    groups, chosen, per_token, num_dense = given.values()
    if not 1 <= groups <= num_experts or num_experts % groups:
        problems.append(f"n_group {groups} (must divide the {num_experts} experts)")
    elif groups > 1 and num_experts // groups < 2:  # a group is judged by its two best
        problems.append(f"n_group {groups} (must leave 2 of {num_experts} experts to each group)")
    elif not 1 <= chosen <= groups:
        problems.append(f"topk_group {chosen} (must be from 1 to n_group {groups})")
    elif per_token > (within := chosen * num_experts // groups):
        problems.append(
            f"num_experts_per_tok {per_token} (must be at most {within}, the experts of topk_group"
            f" {chosen} groups)"
        )
    if not 0 <= num_dense < config.num_hidden_layers:
        problems.append(
            f"first_k_dense_replace {num_dense} (must be from 0 to"
            f" {config.num_hidden_layers - 1}, one below num_hidden_layers)"
        )
    if not 1 <= config.n_shared_experts <= MOST:
        problems.append(f"n_shared_experts {config.n_shared_experts} (must be from 1 to {MOST})")
    if not 0 < config.routed_scaling_factor <= LARGEST:
        problems.append(
            f"routed_scaling_factor {config.routed_scaling_factor} (must be above 0, at most"
            f" {LARGEST:g})"
        )
    return problems
