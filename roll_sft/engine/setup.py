"""Shape and configuration -> GPTModel, weights, gradient buffers, optimizer; each built once.

Assumes process groups (`engine/parallel.py`). Weights are loaded before the optimizer is built,
because the distributed optimizer copies them into its own fp32 shards.
"""

import math
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
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from roll_sft.config import RunConfig
from roll_sft.engine.attention import PackedAttention, RMSNorm
from roll_sft.engine.loss import HAS_OUTPUT_PROCESSOR, SupervisedGPTModel
from roll_sft.layout import ParallelLayout
from roll_sft.models.hf_io import TensorSource
from roll_sft.models.spec import Family, ModelShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(
    shape: ModelShape, layout: ParallelLayout, *, dtype: torch.dtype
) -> TransformerConfig:
    """Megatron's configuration of `shape` on `layout`; what a flag costs is said beside it."""
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        layernorm_epsilon=shape.rms_norm_eps,
        add_qkv_bias=shape.qkv_bias,
        add_bias_linear=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_size,
        pipeline_model_parallel_size=layout.pipeline_size,
        pipeline_model_parallel_layout=uneven_stages(shape.num_layers, layout.pipeline_size),
        context_parallel_size=layout.context_size,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Every parameter is loaded, so drawing random ones first would be lost time. Not
        # perform_initialization=False: it also skips the marks by which the gradient norm knows a
        # tensor-parallel parameter from a replicated one (a third of the norm lost at TP 2).
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        # Packs differ in length; the default token dispatcher refuses that even without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # One definition of the loss: sum over supervised tokens / their number in the global batch.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        # The fused cross-entropy returns a bf16 gradient (4e-4 on the norm); the others need CUDA.
        cross_entropy_loss_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )


def _leave_uninitialised(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def uneven_stages(num_layers: int, pipeline_size: int) -> list[list[str]] | None:
    """Stage contents where `pipeline_size` does not divide `num_layers`; None where it does.

    Surplus layers go to the middle stages first, then to the first: the ends hold the embedding and
    the head, and the head is the heavier.
    """
    base, surplus = divmod(num_layers, pipeline_size)
    if surplus == 0:
        return None
    last = pipeline_size - 1
    order = [*range(1, last), 0, last]
    counts = [base] * pipeline_size
    for stage in order[:surplus]:
        counts[stage] += 1
    stages = [["decoder"] * count for count in counts]
    stages[0].insert(0, "embedding")
    stages[last].append("loss")
    return stages


def build_model(shape: ModelShape, config: TransformerConfig) -> GPTModel:
    """This rank's part of the model, parameters uninitialised."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = PackedAttention
    block = TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm
    )
    model_class = GPTModel if HAS_OUTPUT_PROCESSOR else SupervisedGPTModel
    model = model_class(
        config,
        block,
        vocab_size=shape.padded_vocab_size(config.tensor_model_parallel_size),
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="rope",
    )
    # Megatron derives frequencies from a base and fixes some scalings; take transformers' own.
    device = torch.cuda.current_device()
    model.rotary_pos_emb.inv_freq = torch.tensor(
        shape.rotary_inv_freq, dtype=torch.float32, device=device
    )
    return model.to(device)


def load_weights(
    model: GPTModel, family: Family, shape: ModelShape, *, source: TensorSource
) -> None:
    """Fill every parameter of this rank from HuggingFace tensors, reading only its slices."""
    words = family.weights(shape)
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    tensor_size = parallel_state.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            word = words[global_name(name, model)]
            value = word.local(source, tensor_rank=tensor_rank, tensor_size=tensor_size)
            assert value.shape == parameter.shape, (
                f"{name}: HuggingFace gives {tuple(value.shape)}, Megatron has"
                f" {tuple(parameter.shape)}"
            )
            parameter.copy_(value)


def global_name(name: str, model: GPTModel) -> str:
    """`name` with the layer's index in its stage replaced by its index in the model."""
    prefix, dot, rest = name.partition("decoder.layers.")
    if not dot:
        return name
    index, _, tail = rest.partition(".")
    layer_number: Any = model.decoder.layers[int(index)].layer_number  # from 1, over all stages
    return f"{prefix}{dot}{int(layer_number) - 1}.{tail}"


def wrap_model(
    model: GPTModel, config: TransformerConfig, *, use_distributed_optimizer: bool
) -> DistributedDataParallel:
    """The model with its gradient buffers (fp32) and its data-parallel reduction."""
    module = Float16Module(config, model) if config.bf16 else model
    wrapped = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=use_distributed_optimizer, grad_reduce_in_fp32=True
        ),
        module,
    )
    # Ranks may run different numbers of micro-batches, so only the last may reduce.
    config.no_sync_func = wrapped.no_sync
    return wrapped


def build_optimizer(config: RunConfig, wrapped: DistributedDataParallel) -> MegatronOptimizer:
    """AdamW, weight decay on parameters of two or more dimensions, clipping by the global norm."""
    train = config.train
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=train.learning_rate,
            weight_decay=train.weight_decay,
            adam_beta1=train.adam_beta1,
            adam_beta2=train.adam_beta2,
            adam_eps=train.adam_eps,
            bf16=config.model.dtype == "bf16",
            params_dtype=DTYPES[config.model.dtype],
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            # Megatron computes no norm when clipping is off; an infinite bound never clips.
            clip_grad=train.max_grad_norm or math.inf,
        ),
        [wrapped],
    )
    for group in optimizer.param_groups:
        group["weight_decay"] = train.weight_decay * group["wd_mult"]
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Use `learning_rate` for the next step, in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_mult"]
