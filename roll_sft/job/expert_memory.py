"""What experts add to the memory of a rank. An expert is whole on its rank.

Legend: as in `job/memory.py`, and E experts, of which a token goes to n.
"""

from roll_sft.base.layout import ParallelLayout
from roll_sft.models.shape import ModelShape


def expert_parameters(shape: ModelShape, layout: ParallelLayout, *, share: float) -> float:
    """Of a rank that holds a `share` of the layers; 0 without experts."""
    experts = shape.experts
    if experts is None:
        return 0.0
    of_layer = 3 * experts.ffn_hidden_size * shape.hidden_size * experts.num_experts
    return shape.num_expert_layers * share * of_layer / layout.expert_size


def expert_replicas(layout: ParallelLayout) -> int:
    """Ranks that hold the same experts."""
    return layout.world_size // (layout.pipeline_size * layout.expert_size)


def kept_of_experts(shape: ModelShape, *, is_compiled: bool) -> float:
    """Numbers that experts keep for each token of a rank, if all get equally many.

    What a token sends to each of its experts, in the order of the experts and as it arrives; what
    these project, the product and its weighting; and the shared expert's.
    """
    experts = shape.experts
    assert experts is not None, f"{shape.architecture} has no experts"
    of_mlp = 3 if is_compiled else 5
    of_one = 2 * shape.hidden_size + (of_mlp + 1) * experts.ffn_hidden_size
    shared = of_mlp * experts.shared_ffn_hidden_size + experts.has_shared_gate * shape.hidden_size
    return experts.experts_per_token * of_one + shared + 4 * experts.num_experts


def width_of_backward(shape: ModelShape) -> float:
    """Numbers of a token in the widest moment of the backward of experts."""
    experts = shape.experts
    assert experts is not None, f"{shape.architecture} has no experts"
    of_one = 2 * shape.hidden_size + 3 * experts.ffn_hidden_size
    return max(experts.experts_per_token * of_one, 3 * experts.shared_ffn_hidden_size)
