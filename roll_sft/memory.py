"""What a rank needs in memory, from the plan alone; estimates say so."""

from dataclasses import dataclass

from roll_sft.engine.chunks import chunk_rows
from roll_sft.engine.preflight import Plan

GIB = 2**30
# Bytes of activations kept per token, layer and hidden unit for the backward, in bf16 units of two
# bytes, attention scores not stored: Korthikanti et al. 2022 (arXiv:2205.05198), table 2, gives
# 34 bytes with sequence parallelism, of which 10 are not cut by tensor parallelism without it.
ACTIVATION_BYTES = 34
REPLICATED_ACTIVATION_BYTES = 10


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Peak memory of the fullest rank; the parts are of device memory but the last."""

    state_gib: float  # weights, fp32 gradients, master weights and Adam moments
    activations_gib: float
    head_gib: float
    save_host_gib: float

    @property
    def total_gib(self) -> float:
        """Device memory in all."""
        return self.state_gib + self.activations_gib + self.head_gib


def estimate(plan: Plan) -> MemoryEstimate:
    """Of the first pipeline stage: it holds the embedding and the most micro-batches in flight."""
    shape, layout, parallel = plan.shape, plan.layout, plan.config.parallel
    is_bf16 = plan.config.model.dtype == "bf16"
    shards = layout.tensor_size * layout.pipeline_size
    embedding = shape.padded_vocab_size(layout.tensor_size) * shape.hidden_size
    heads = 1 if shape.tie_word_embeddings else 2
    layers = shape.num_parameters - heads * shape.vocab_size * shape.hidden_size
    ends = heads if layout.pipeline_size == 1 else 1
    parameters = layers / shards + ends * embedding / layout.tensor_size
    # The distributed optimizer cuts masters and moments over data x context ranks.
    replicas = layout.data_size * layout.context_size if parallel.use_distributed_optimizer else 1
    weight_bytes, master_bytes = (2, 4) if is_bf16 else (4, 0)
    state = parameters * (weight_bytes + 4 + (master_bytes + 8) / replicas)
    tokens = plan.pack_tokens // layout.context_size
    width = 1 if is_bf16 else 2  # in units of bf16
    if layout.sequence_parallel:
        per_unit = ACTIVATION_BYTES / layout.tensor_size
    else:
        split = ACTIVATION_BYTES - REPLICATED_ACTIVATION_BYTES
        per_unit = REPLICATED_ACTIVATION_BYTES + split / layout.tensor_size
    # 1F1B holds as many micro-batches on the first stage as there are stages.
    in_flight = layout.pipeline_size
    stage_layers = -(-shape.num_layers // layout.pipeline_size)
    activations = tokens * shape.hidden_size * per_unit * width * stage_layers * in_flight
    # A chunk's logits, in bf16 also before and after the softmax, and the two gradients that the
    # head keeps for the backward: of its rows, all of which may be, and of its weight in fp32.
    words = embedding / shape.hidden_size / layout.tensor_size
    chunk = chunk_rows(tokens, round(words)) * words * (4 + (4 if is_bf16 else 0))
    head = chunk + tokens * shape.hidden_size * 2 * width + words * shape.hidden_size * 4
    return MemoryEstimate(
        state_gib=state / GIB,
        activations_gib=activations / GIB,
        head_gib=head / GIB,
        save_host_gib=_save_host_bytes(plan, parameters) / GIB,
    )


def _save_host_bytes(plan: Plan, parameters: float) -> float:
    """Host memory that a save takes from a rank with `parameters`.

    In the background: a copy of what the rank writes, its share of the weights and its own ranges
    of the optimizer. Else the largest tensor, which leaves the device alone.
    """
    config, shape, layout = plan.config, plan.shape, plan.layout
    weight, master = (2, 4) if config.model.dtype == "bf16" else (4, 0)
    if not config.checkpoint.async_save:
        return weight * shape.padded_vocab_size(layout.tensor_size) * shape.hidden_size
    owners = layout.data_size * layout.context_size
    optimizer = 8 + master if config.checkpoint.save_optimizer else 0
    return parameters * (weight + optimizer) / owners
