"""Checks of a run whose model has experts, or that asks for them."""

from collections.abc import Iterator

from roll_sft.config.schema import RunConfig
from roll_sft.models.shape import ModelShape

_EP = "parallel.expert_model_parallel_size"


def expert_problems(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    """What the configuration asks of the experts that a model of `shape` does not have or allow."""
    parallel, experts = config.parallel, shape.experts
    size, tensor_size = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    ranks = parallel.num_workers // max(1, parallel.pipeline_model_parallel_size)
    if size >= 1 and ranks % size:
        yield (
            f"{_EP}: {size} does not divide the {ranks} ranks of a pipeline stage (num_workers /"
            f" pipeline_model_parallel_size); choose a divisor of {ranks}"
        )
    yield from _balance_problems(config, shape)
    if experts is None:
        if size > 1:
            yield f"{_EP}: {size}, and {shape.architecture} has no experts; set it to 1"
        return
    if size >= 1 and experts.num_experts % size:
        yield (
            f"{_EP}: {size} does not divide the model's {experts.num_experts} experts; choose a"
            f" divisor of {experts.num_experts}"
        )
    if tensor_size > 1 and not parallel.sequence_parallel:
        yield (
            f"parallel.sequence_parallel: false, and experts on {tensor_size} tensor ranks need"
            " parts of the sequence on each; set it to true"
        )
    if tensor_size >= 1 and experts.shared_ffn_hidden_size % tensor_size:
        yield (
            f"parallel.tensor_model_parallel_size: {tensor_size} does not divide the model's"
            f" shared_expert_intermediate_size {experts.shared_ffn_hidden_size}; choose a divisor"
        )
    yield from _adapter_problems(config, shape)
    for key in config.train.changed_keys:
        yield (
            f"train.{key}: {shape.architecture} has experts, which this version trains by the plain"
            " loss and all together; leave it out"
        )


def _adapter_problems(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    """What is asked of adapters that a model with experts does not have in this version."""
    lora, rate = config.lora, config.moe.router_bias_update_rate
    if not lora.rank:
        return
    if shape.variation is not None and shape.variation.latent is not None:
        yield (
            f"lora.rank: {lora.rank}, and adapters of {shape.architecture}, whose attention has"
            " latent heads, are not in this version; set lora.rank=0"
        )
    if lora.quantize_base != "none":
        yield (
            f"lora.quantize_base: {lora.quantize_base}, and {shape.architecture} has experts, which"
            " this version does not hold in 4 bits; set lora.quantize_base=none"
        )
    if rate:
        yield (
            f"moe.router_bias_update_rate: {rate}, and with lora.rank={lora.rank} the model itself"
            " is not trained; set it to 0"
        )


def _balance_problems(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    """What is asked of the balance of experts that routers of `shape` do not have."""
    moe, experts = config.moe, shape.experts
    rate = moe.router_bias_update_rate
    asked = {"aux_loss_coef": moe.aux_loss_coef, "z_loss_coef": moe.z_loss_coef or None}
    for key, value in asked.items():
        if experts is None and value is not None:
            yield f"moe.{key}: {value}, and {shape.architecture} has no experts; leave it out"
    if experts is not None and experts.has_sigmoid and moe.aux_loss_coef:
        yield (
            f"moe.aux_loss_coef: {moe.aux_loss_coef}, and the routers of {shape.architecture} have"
            " no softmax, of which that loss is made; balance its experts by"
            " moe.router_bias_update_rate"
        )
    if rate and (experts is None or not experts.has_sigmoid):
        yield (
            f"moe.router_bias_update_rate: {rate}, and {shape.architecture} has no routers with"
            " biases of scores; leave it out"
        )
