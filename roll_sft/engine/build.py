"""The model of a rank: configuration, modules, weights and gradient buffers, each built once.

Assumes process groups (`engine/process_groups.py`). Load weights before building the optimizer: the
distributed optimizer copies them into its own fp32 shards.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from roll_sft.base.errors import CheckpointError
from roll_sft.base.layout import ParallelLayout
from roll_sft.config.schema import ParallelConfig, RunConfig, layout_of
from roll_sft.engine.attention import PackedAttention
from roll_sft.engine.attention_kernels import Kernel
from roll_sft.engine.layers import LayerConfig, RMSNorm, layer_spec
from roll_sft.engine.loss import HAS_OUTPUT_PROCESSOR, SupervisedGPTModel
from roll_sft.models.family import Family
from roll_sft.models.files.safetensors_in import TensorSource
from roll_sft.models.shape import ModelShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(
    shape: ModelShape, layout: ParallelLayout, *, config: RunConfig, is_compiled: bool = False
) -> LayerConfig:
    """Megatron's configuration of `shape` on `layout`; comments give the cost of a flag."""
    dtype, recompute = DTYPES[config.model.dtype], config.train.recompute
    granularity = "selective" if isinstance(recompute, list) and recompute else recompute
    if "layernorm" in recompute:
        from roll_sft.engine.recompute import use_norm_recomputation

        use_norm_recomputation()
    return LayerConfig(
        is_compiled=is_compiled,
        quantizes_base=config.lora.quantize_base != "none",
        variation=shape.variation,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        layernorm_epsilon=shape.rms_norm_eps,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm != "none",  # see build_model
        add_bias_linear=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_size,
        pipeline_model_parallel_size=layout.pipeline_size,
        virtual_pipeline_model_parallel_size=(
            layout.virtual_size if layout.virtual_size > 1 else None
        ),
        pipeline_model_parallel_layout=uneven_stages(
            shape.num_layers, layout.pipeline_size * layout.virtual_size
        ),
        # With two stages the next and the previous rank are one peer, and batched sends then cross
        # activations with gradients under interleaving: a wrong loss, without an error.
        overlap_p2p_comm=layout.virtual_size > 1,
        batch_p2p_comm=layout.virtual_size == 1,
        # True waits for the device after every exchange, against a race in torch before 1.10.
        batch_p2p_sync=False,
        context_parallel_size=layout.context_size,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Selective recomputes parts of a layer, full every layer from its input.
        recompute_granularity=None if granularity in ("none", []) else granularity,
        recompute_modules=[*recompute] if isinstance(recompute, list) else ["core_attn"],
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        deterministic_mode=config.deterministic,
        # Every parameter is loaded, so drawing random ones first would be lost time. Not
        # perform_initialization=False: it also skips the marks by which the gradient norm knows a
        # tensor-parallel parameter from a replicated one (a third of the norm lost at TP 2).
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        # Where packs differ in length, see Engine; the default token dispatcher refuses that even
        # without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # One definition of the loss: sum over supervised tokens / their number in the global batch.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        # The fused cross-entropy returns a bf16 gradient (4e-4 on the norm); the others need CUDA,
        # or Transformer Engine. `fused` is our way.
        cross_entropy_loss_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        **_of_experts(shape, layout),
    )


def _of_experts(shape: ModelShape, layout: ParallelLayout) -> dict[str, Any]:
    """The fields of a model with experts."""
    if shape.experts is None:
        return {}
    from roll_sft.engine.moe.experts import expert_settings

    return expert_settings(shape, layout)


def _leave_uninitialised(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def uneven_stages(num_layers: int, num_stages: int) -> list[list[str]] | None:
    """Stage contents where `num_stages` does not divide `num_layers`; None where it does.

    Surplus layers go to the middle stages first, then to the first: the ends hold the embedding and
    the head, and the head is the heavier.
    """
    base, surplus = divmod(num_layers, num_stages)
    if surplus == 0:
        return None
    last = num_stages - 1
    order = [*range(1, last), 0, last]
    counts = [base] * num_stages
    for stage in order[:surplus]:
        counts[stage] += 1
    stages = [["decoder"] * count for count in counts]
    stages[0].insert(0, "embedding")
    stages[last].append("loss")
    return stages


def build_model(shape: ModelShape, config: LayerConfig, *, kernel: Kernel) -> list[GPTModel]:
    """This rank's parts of the model, one for each virtual stage, parameters uninitialised."""
    attention: Any = PackedAttention
    if shape.variation is not None:
        from roll_sft.engine.variations.variation import VariedAttention, use_settings

        attention = VariedAttention
        use_settings(config)
    layer = layer_spec(shape, core_attention=functools.partial(attention, kernel=kernel))
    if config.quantizes_base:
        from roll_sft.engine.adapters.quantized import use_quantized_linears

        use_quantized_linears(layer)
    virtual_size = config.virtual_pipeline_model_parallel_size
    stages = [None] if virtual_size is None else range(virtual_size)
    chunks = [_build_chunk(shape, config, layer, stage) for stage in stages]
    # From here on the flag makes finalize_model_grads sum these norms over the tensor group, by
    # their names. A norm over the whole projection is cut over that group and must not be summed.
    config.qk_layernorm = shape.qk_norm == "head"
    return chunks


def _build_chunk(
    shape: ModelShape, config: LayerConfig, layer: ModuleSpec, stage: int | None
) -> GPTModel:
    layers = [layer] * get_num_layers_to_build(config, vp_stage=stage)
    if shape.experts is not None and shape.experts.num_dense_layers:
        from roll_sft.engine.moe.experts import with_dense_layers

        layers = with_dense_layers(layers, shape, config, stage=stage)
    block = TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
    model_class = GPTModel if HAS_OUTPUT_PROCESSOR else SupervisedGPTModel
    model = model_class(
        config,
        block,
        vocab_size=shape.padded_vocab_size(config.tensor_model_parallel_size),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(
            ignore_virtual=stage is None, vp_stage=stage
        ),
        post_process=parallel_state.is_pipeline_last_stage(
            ignore_virtual=stage is None, vp_stage=stage
        ),
        vp_stage=stage,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="none",  # our core attention rotates
    )
    if shape.variation is not None:
        from roll_sft.engine.variations.variation import use_multipliers

        use_multipliers(model, shape.variation)
    if config.tensor_model_parallel_size == 1:
        _leave_out_collectives(model)
    return model.to(torch.cuda.current_device())


def _leave_out_collectives(model: GPTModel) -> None:
    """Make linear layers call no collective of a tensor group of one, not even as an identity.

    Each such identity is an autograd function in Python, forward and backward, four times a layer.
    The field says that somebody else communicates.
    """
    for module in model.decoder.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.explicit_expert_comm = True


def rotary_frequencies(shape: ModelShape) -> torch.Tensor:
    """Radians a position, float32 [head_dim / 2] on the device, as transformers computes them.

    Megatron derives them from a base, and knows some of the families' scalings only.
    """
    device = torch.cuda.current_device()
    return torch.tensor(shape.rotary_inv_freq, dtype=torch.float32, device=device)


def load_weights(
    chunks: list[GPTModel], family: Family, shape: ModelShape, *, source: TensorSource
) -> None:
    """Fill every parameter of this rank from HuggingFace tensors, reading only its slices.

    Raises `CheckpointError` that names a tensor of `source` which is not finite.
    """
    mappings = family.weights(shape)
    with torch.no_grad():
        for name, parameter in named_parameters(chunks):
            rank, size = rank_and_size(name)
            value = mappings[name].local(source, tensor_rank=rank, tensor_size=size)
            assert value.shape == parameter.shape, (
                f"{name}: HuggingFace gives {tuple(value.shape)}, Megatron has"
                f" {tuple(parameter.shape)}"
            )
            parameter.copy_(value)
    if found := not_finite(list(named_parameters(chunks))):
        name, _ = found
        # One parameter may hold several tensors of theirs; name the first that is at fault.
        theirs = ([(hf_name, source.read(hf_name))] for hf_name in mappings[name].hf_shapes)
        raise unusable(source, *next(filter(None, map(not_finite, theirs)), found))


def rank_and_size(name: str) -> tuple[int, int]:
    """This rank and the number of ranks over which parameter `name` is cut."""
    if ".mlp.experts." in name:
        rank = parallel_state.get_expert_model_parallel_rank()
        return rank, parallel_state.get_expert_model_parallel_world_size()
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


def unusable(source: TensorSource, name: str, problem: str) -> CheckpointError:
    """The error for a tensor of `source` with a `problem`."""
    return CheckpointError(
        f"model.path: {source}: {name} {problem}, so no step can be computed; take another copy of"
        " the model, or an earlier checkpoint of the run that made it"
    )


def not_finite(tensors: list[tuple[str, torch.Tensor]]) -> tuple[str, str] | None:
    """(name, problem) of the first of the named `tensors` that is not finite; None if all are.

    Tensors of any shape and floating dtype, on one device, which is waited for once. The Euclidean
    norm of all is finite where every number is finite and below about 1e19; no model of ours
    computes beyond that. Only where the norm is not finite is each tensor looked at.
    """
    with torch.no_grad():
        total = torch.nn.utils.get_total_norm([tensor for _, tensor in tensors])
        if total.isfinite():
            return None
        for name, tensor in tensors:
            if count := tensor.numel() - int(tensor.isfinite().sum()):
                return name, f"holds {count} numbers that are not finite"
        name, largest = max(
            ((name, float(tensor.abs().max())) for name, tensor in tensors if tensor.numel()),
            key=lambda each: each[1],
        )
    return name, f"reaches {largest:.3g}, which overflows"


def clear_weights(chunks: list[GPTModel]) -> None:
    """Zeros, for a checkpoint to fill; it does not hold the padding of the vocabulary."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.zero_()


def named_parameters(chunks: list[GPTModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Every parameter of this rank, named by its layer's index in the model, not in its stage."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            prefix, dot, rest = name.partition("decoder.layers.")
            if dot:
                index, _, tail = rest.partition(".")
                layer: Any = chunk.decoder.layers[int(index)]
                name = f"{prefix}{dot}{int(layer.layer_number) - 1}.{tail}"  # counts from 1
                if ".local_experts." in name:
                    from roll_sft.engine.moe.experts import global_name

                    name = global_name(name, num_experts=chunk.config.num_moe_experts or 0)
            yield name, parameter


def overlaps(parallel: ParallelConfig) -> tuple[bool, bool]:
    """Whether gradients are reduced in the backward, and weights gathered in the forward pass.

    On GPUs both are by default, where there is a replica to exchange with.
    """
    layout = layout_of(parallel)
    has_replicas = layout.data_size * layout.context_size > 1
    reduces, gathers = parallel.overlap_grad_reduce, parallel.overlap_param_gather
    if reduces is None:
        reduces = bool(gathers) or (parallel.device == "cuda" and has_replicas)
    gathers = reduces if gathers is None else gathers
    return reduces, gathers and parallel.use_distributed_optimizer


def wrap_model(
    chunks: list[GPTModel], config: LayerConfig, *, parallel: ParallelConfig
) -> list[DistributedDataParallel]:
    """The model's chunks with gradient buffers (fp32) and data-parallel reduction."""
    overlaps_reduce, overlaps_gather = overlaps(parallel)
    buffers = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlaps_reduce,
        overlap_param_gather=overlaps_gather,
    )
    wrapped = [
        DistributedDataParallel(
            config,
            buffers,
            Float16Module(config, chunk) if config.bf16 else chunk,
            # The exchange of a later virtual stage runs beside the computation of another.
            disable_bucketing=overlaps_reduce and index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    # Ranks may run different numbers of micro-batches, so only the last may reduce.
    no_sync = [chunk.no_sync for chunk in wrapped]
    config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    if overlaps_reduce:  # all stages of a pipeline at once, so that none waits for another twice
        starts = [chunk.start_grad_sync for chunk in wrapped]
        config.grad_sync_func = starts if len(starts) > 1 else starts[0]
    return wrapped
