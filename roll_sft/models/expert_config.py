"""What is common to HuggingFace configurations of models with experts.

Promise: a setting of experts that no family builds is refused by name.
"""

from typing import TYPE_CHECKING, TypeAlias

from roll_sft.base.text import shown

if TYPE_CHECKING:
    from transformers import (
        GptOssConfig,
        MixtralConfig,
        OlmoeConfig,
        Qwen2MoeConfig,
        Qwen3MoeConfig,
    )

    ExpertConfig: TypeAlias = (
        GptOssConfig | MixtralConfig | OlmoeConfig | Qwen2MoeConfig | Qwen3MoeConfig
    )

MOST, WIDEST, LARGEST = 2**16, 2**20, 1e6  # far above the values of every published model


def expert_problems(config: "ExpertConfig", *, num_experts: int) -> list[str]:
    """Value and rule of each setting of experts that cannot be built."""
    problems, chosen = list[str](), config.num_experts_per_tok
    if not 2 <= num_experts <= MOST:
        problems.append(f"number of experts {num_experts} (must be from 2 to {MOST})")
    for key in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if not 1 <= (width := getattr(config, key, 1)) <= WIDEST:
            problems.append(f"{key} {width} (must be from 1 to {WIDEST})")
    if not 1 <= chosen <= num_experts:
        problems.append(f"num_experts_per_tok {chosen} (must be from 1 to {num_experts} experts)")
    if not 0 <= config.router_aux_loss_coef <= LARGEST:
        coefficient = config.router_aux_loss_coef
        problems.append(f"router_aux_loss_coef {coefficient} (must be from 0 to {LARGEST:g})")
    if dense := getattr(config, "mlp_only_layers", None):
        problems.append(f"mlp_only_layers {shown(dense)} (only layers with experts)")
    if (every := getattr(config, "decoder_sparse_step", 1)) != 1:
        problems.append(f"decoder_sparse_step {every} (only 1)")
    return problems
