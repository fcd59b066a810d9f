"""What a rank needs in memory, from its configuration and shape alone; estimates say so.

Legend: h hidden size, q and k width of the queries and of the keys, f width of the MLP, of one
token in one layer; all in numbers, which are turned into bytes at the end.
"""

import logging
from dataclasses import dataclass

from roll_sft.base.errors import LESS_MEMORY
from roll_sft.base.layout import ParallelLayout
from roll_sft.base.metrics import chunk_rows
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.job.job import micro_batch_tokens
from roll_sft.models.shape import ModelShape

LOG = logging.getLogger(__name__)
GIB = 2**30
# Of a parameter on a CPU: torch's AdamW makes the root of all second moments at once. On a GPU the
# update is one kernel, in place.
UPDATE_BYTES = 4


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Peak memory of one rank; the parts are of device memory but the last."""

    state_gib: float  # weights, fp32 gradients, master weights and Adam moments
    activations_gib: float  # kept for the backward
    backward_gib: float  # beside these where a layer's backward needs the most
    head_gib: float  # beside these in the head
    update_gib: float  # of the optimizer, when activations are gone
    save_host_gib: float

    @property
    def moment_gib(self) -> float:
        """Beside activations at the widest moment: they are whole when the head runs, and after."""
        return max(self.backward_gib, self.head_gib)

    @property
    def total_gib(self) -> float:
        """Device memory in all."""
        return self.state_gib + max(self.activations_gib + self.moment_gib, self.update_gib)


@dataclass(frozen=True, slots=True)
class _Run:
    """What an estimate is made of; a pack holds `pack_tokens` at most."""

    config: RunConfig
    layout: ParallelLayout
    shape: ModelShape
    pack_tokens: int


def estimate(config: RunConfig, shape: ModelShape) -> MemoryEstimate:
    """Of the fullest rank: the first stage has the most micro-batches in flight, the last the head.

    Assumes packs as long as they may be, with a label at every token, and a kernel for attention
    that keeps no scores.
    """
    last = layout_of(config.parallel).pipeline_size - 1
    estimates = (stage_estimate(config, shape, stage=stage) for stage in {0, last})
    return max(estimates, key=lambda found: found.total_gib)


def stage_estimate(config: RunConfig, shape: ModelShape, *, stage: int) -> MemoryEstimate:
    """Of a rank of pipeline stage `stage`, under the assumptions of `estimate`."""
    layout = layout_of(config.parallel)
    run = _Run(config, layout, shape, micro_batch_tokens(config, layout))
    weight_bytes, master_bytes = _weight_bytes(run)
    parameters = trained = _parameters(run, stage)
    saved_bytes = widest = 0.0
    if run.config.trains_part:
        from roll_sft.job.lora_memory import saved_by_quantization
        from roll_sft.job.trained import stage_parameters

        trained, adapters = stage_parameters(config, shape, stage=stage)
        parameters += adapters
        saved_bytes, widest = saved_by_quantization(config, shape, weight_bytes=weight_bytes)
    # The distributed optimizer cuts masters and moments over data x context ranks.
    is_cut = config.parallel.use_distributed_optimizer
    replicas: float = layout.data_size * layout.context_size if is_cut else 1
    if is_cut and shape.experts is not None:
        replicas = _mean_replicas(run, parameters)
    state = parameters * weight_bytes + trained * (4 + (master_bytes + 8) / replicas) - saved_bytes

    tokens = run.pack_tokens // layout.context_size
    kept, recomputed = _kept_per_layer(run)
    numbers = tokens * _layers_in_flight(run, stage) * kept
    backward = tokens * recomputed + _gradients_of_layer(run, tokens) + widest
    is_last = stage == layout.pipeline_size - 1
    update_bytes = UPDATE_BYTES if config.parallel.device == "cpu" else 0
    return MemoryEstimate(
        state_gib=state / GIB,
        activations_gib=numbers * weight_bytes / GIB,
        backward_gib=backward * weight_bytes / GIB,
        head_gib=_head_bytes(run, tokens) / GIB if is_last else 0.0,
        update_gib=trained * update_bytes / replicas / GIB,
        save_host_gib=_save_host_bytes(run, trained) / GIB,
    )


def warn_of_memory(config: RunConfig, shape: ModelShape, free_gib: float) -> None:
    """Warn if the run is estimated to need more than `free_gib` of a GPU, before it fails there."""
    needed = estimate(config, shape).total_gib
    if needed > free_gib:
        LOG.warning(
            "%.1f GiB per GPU (estimate), and %.1f GiB are free: the run is likely to end without"
            " memory; %s",
            needed,
            free_gib,
            LESS_MEMORY,
        )


def _weight_bytes(run: _Run) -> tuple[int, int]:
    """Bytes of a weight, or of an activation, and of the master weight beside it."""
    return (2, 4) if run.config.model.dtype == "bf16" else (4, 0)


def _is_compiled(run: _Run) -> bool:
    """Whether what is elementwise is one kernel, as it is on a GPU by default."""
    wanted, device = run.config.model.compile, run.config.parallel.device
    return device != "cpu" if wanted is None else wanted


def _parameters(run: _Run, stage: int) -> float:
    """Of a rank of `stage`; what tensor ranks hold alike is too little to count."""
    shape, layout = run.shape, run.layout
    tied = shape.tie_word_embeddings
    in_layers: float = (
        shape.num_parameters - (1 if tied else 2) * shape.vocab_size * shape.hidden_size
    )
    share = -(-shape.num_layers // layout.pipeline_size) / shape.num_layers
    experts = _experts(run)
    is_first, is_last = stage == 0, stage == layout.pipeline_size - 1
    # A tied head is the embedding; on another stage it is a copy of it.
    ends = is_first + (is_last and not (tied and is_first))
    embedding = shape.padded_vocab_size(layout.tensor_size) * shape.hidden_size
    if shape.experts is not None:
        in_layers -= experts / share * layout.expert_size
    return (in_layers * share + ends * embedding) / layout.tensor_size + experts


def _experts(run: _Run) -> float:
    """Parameters of the experts of a rank."""
    if run.shape.experts is None:
        return 0.0
    from roll_sft.job.expert_memory import expert_parameters

    layers, stages = run.shape.num_layers, run.layout.pipeline_size
    return expert_parameters(run.shape, run.layout, share=-(-layers // stages) / layers)


def _mean_replicas(run: _Run, parameters: float) -> float:
    """Ranks that share the optimizer's state of a parameter: of experts others than of the rest."""
    from roll_sft.job.expert_memory import expert_replicas

    experts, layout = _experts(run), run.layout
    others = (parameters - experts) / (layout.data_size * layout.context_size)
    return parameters / (others + experts / expert_replicas(layout))


def _layers_in_flight(run: _Run, stage: int) -> int:
    """Layers whose activations a rank of `stage` holds at once, each micro-batch's counted."""
    layout = run.layout
    chunk = -(-run.shape.num_layers // (layout.pipeline_size * layout.virtual_size))
    behind = layout.pipeline_size - 1 - stage
    if layout.virtual_size == 1:
        return (behind + 1) * chunk
    # Megatron-Core's warm-up of interleaved stages, and the one that runs.
    return (2 * behind + (layout.virtual_size - 1) * layout.pipeline_size + 1) * chunk


def _kept_per_layer(run: _Run) -> tuple[float, float]:
    """Numbers that a layer keeps for each token, and those that its backward computes again."""
    shape, layout, recompute = run.shape, run.layout, run.config.train.recompute
    q, k = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
    hidden = _hidden(run)
    # What enters each norm; queries, keys and values as projected, whose memory the values are part
    # of unless context ranks gather them; what enters the norms of queries and keys; the
    # attention's output.
    is_gathered, is_normed = layout.context_size > 1, shape.qk_norm != "none"
    projected = 0 if is_gathered and not is_normed else q + 2 * k
    num_norms = 4 if shape.norm_placement == "both" else 2
    rest = num_norms * hidden + (projected + is_normed * (q + k) + q) / layout.tensor_size
    # What leaves each norm; queries and keys rotated, or in place of the keys those that the rank's
    # two chunks of a sample see, and their values; of the MLP what is projected and the product,
    # and op by op also the gates activated and what they gate once more.
    core = q + (k * (2 * layout.context_size + 1) if is_gathered else k)
    # Where that is recomputed, what enters it stays: the queries in a copy of their own.
    entering = q + is_normed * k + (0 if projected else q + 2 * k)
    mlp: float = (3 if _is_compiled(run) else 5) * shape.ffn_hidden_size
    if shape.experts is not None:
        from roll_sft.job.expert_memory import kept_of_experts

        mlp = kept_of_experts(shape, is_compiled=_is_compiled(run))
    parts = {
        "layernorm": 0 if shape.norm_placement == "post" else 2 * hidden,
        "core_attn": (core - entering) / layout.tensor_size,
        "mlp": mlp / layout.tensor_size,
    }
    if (v := shape.variation) and (v.attention_softcap is not None or v.has_sinks):
        parts["core_attn"] += _scores(run)
    kept = rest + sum(parts.values()) + entering / layout.tensor_size
    if run.config.lora.rank:
        from roll_sft.job.lora_memory import kept_by_adapters

        kept += kept_by_adapters(run.config, shape, is_compiled=_is_compiled(run))
    if recompute == "full":
        return hidden, kept
    modules = recompute if isinstance(recompute, list) else ["core_attn"] * (recompute != "none")
    # At the widest moment of the backward the MLP is there again, and the norm before it.
    recomputed = {"mlp": parts["mlp"], "layernorm": parts["layernorm"] / 2}
    return (
        kept - sum(parts[name] for name in set(modules)),
        sum(recomputed.get(name, 0) for name in set(modules)),
    )


def _scores(run: _Run) -> float:
    """Numbers of a token's scores that a soft-cap or sinks keep where SDPA computes them: on a CPU.

    What left tanh and what left the softmax, each in fp32, of every head and key of a full sample.
    """
    if run.config.parallel.device != "cpu":
        return 0.0
    shape, longest = run.shape, run.config.data.sequence_length
    windows = sum(number * min(2 * each, longest) for each, number in shape.windows.items())
    plain = shape.num_layers - sum(shape.windows.values())
    keys = (windows + plain * longest) / shape.num_layers
    width, _ = _weight_bytes(run)
    return 2 * shape.num_attention_heads * keys * 4 / width / run.layout.tensor_size


def _hidden(run: _Run) -> float:
    """Numbers of a token between two layers."""
    layout = run.layout
    return run.shape.hidden_size / (layout.tensor_size if layout.sequence_parallel else 1)


def _gradients_of_layer(run: _Run, tokens: int) -> float:
    """Numbers of the widest moment of a layer's backward: the MLP's, and on a CPU of its weight.

    On a GPU the weight's gradient is added to the buffer that the state counts.
    """
    shape, tensor_size = run.shape, run.layout.tensor_size
    wide: float = 3 * tokens * shape.ffn_hidden_size
    if shape.experts is not None:
        from roll_sft.job.expert_memory import width_of_backward

        wide = tokens * width_of_backward(shape)
    elif run.config.parallel.device == "cpu" and not run.config.lora.rank:
        wide += 2 * shape.ffn_hidden_size * shape.hidden_size
    return 2 * tokens * shape.hidden_size + wide / tensor_size


def _head_bytes(run: _Run, tokens: int) -> float:
    """A chunk's logits, and what the head keeps: its rows, their gradient, and its weight's, fp32.

    The last norm keeps what enters it, and what leaves it is there until the head is done.
    Logits exist before the softmax and as gradients; op by op in fp32 between. When they are gone,
    the weight's gradient is there in its own dtype, too. On a GPU that gradient is added to the
    buffer that the state counts, and takes nothing here; a frozen weight has none.
    """
    shape, layout = run.shape, run.layout
    width, _ = _weight_bytes(run)
    words = shape.padded_vocab_size(layout.tensor_size) // layout.tensor_size
    weight = words * shape.hidden_size
    logits = 2 * width if _is_compiled(run) else max(2 * width, width + 4)
    if (v := shape.variation) and (v.logits_softcap is not None or v.logits_divisor != 1.0):
        logits += 8  # changed in fp32, and their gradient
    on_gpu = run.config.parallel.device != "cpu"
    chunk = chunk_rows(tokens, words, on_gpu=on_gpu) * words * logits
    norm = 2 * tokens * _hidden(run) * width
    rows = 2 * tokens * shape.hidden_size * width + norm
    is_frozen = run.config.lora.rank > 0 and "lm_head" not in run.config.lora.modules_to_save
    if on_gpu or is_frozen:
        return chunk + rows
    copy = weight * width if width < 4 else 0
    return max(chunk, copy) + rows + weight * 4


def _save_host_bytes(run: _Run, parameters: float) -> float:
    """Host memory that a save takes from a rank with `parameters`.

    In the background: a copy of what the rank writes, its share of the weights and its own ranges
    of the optimizer. Else the largest tensor, which leaves the device alone. `parameters` are those
    that are trained.
    """
    config, shape, layout = run.config, run.shape, run.layout
    weight, master = _weight_bytes(run)
    if not config.checkpoint.async_save:
        if config.lora.rank and not config.lora.modules_to_save:
            return weight * config.lora.rank * max(shape.ffn_hidden_size, shape.hidden_size)
        return weight * shape.padded_vocab_size(layout.tensor_size) * shape.hidden_size
    owners = layout.data_size * layout.context_size
    optimizer = 8 + master if config.checkpoint.save_optimizer else 0
    return parameters * (weight + optimizer) / owners
