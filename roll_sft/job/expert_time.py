"""What experts change in the estimate of a step's time: exchanged tokens, gradients of fewer ranks.

The rates are those of `job/step_time.py`.
"""

from collections.abc import Callable

from roll_sft.base.layout import ParallelLayout
from roll_sft.job.expert_memory import expert_parameters, expert_replicas
from roll_sft.models.shape import ModelShape

Exchange = Callable[..., float]
"""Seconds to gather or scatter `size` bytes over `ranks`, which lie within `span` ranks."""


def exchanged_tokens_s(
    shape: ModelShape, layout: ParallelLayout, *, hidden_bytes: float, exchange: Exchange
) -> float:
    """Of one pass of a micro-batch through a layer, forward and backward.

    `hidden_bytes` are those of the hidden states of a context rank. Tokens go to their experts and
    come back, and so do the gradients.
    """
    experts = shape.experts
    if experts is None:
        return 0.0
    sent = hidden_bytes / layout.tensor_size * experts.experts_per_token
    return 4 * exchange(sent, layout.expert_size, span=layout.expert_size)


def gradients_s(
    shape: ModelShape, layout: ParallelLayout, *, bytes_of_each: int, exchange: Exchange
) -> float:
    """To reduce the gradients of a step, or to gather its weights."""
    experts = expert_parameters(shape, layout, share=1 / layout.pipeline_size)
    every = experts * layout.expert_size * layout.pipeline_size
    others = (shape.num_parameters - every) / (layout.tensor_size * layout.pipeline_size)
    replicas = layout.data_size * layout.context_size
    same, span = expert_replicas(layout), layout.world_size // layout.pipeline_size
    return exchange(others * bytes_of_each, replicas, span=replicas * layout.tensor_size) + (
        exchange(experts * bytes_of_each, same, span=span) if experts else 0.0
    )


def active_mlp(shape: ModelShape) -> int:
    """Weights of the MLP, or of the experts, that a token goes through in all layers."""
    width = (shape.num_layers - shape.num_expert_layers) * shape.ffn_hidden_size
    if (experts := shape.experts) is not None:
        chosen = experts.experts_per_token * experts.ffn_hidden_size
        width += shape.num_expert_layers * (chosen + experts.shared_ffn_hidden_size)
    return 3 * width * shape.hidden_size
