"""Megatron's AdamW: built, clipped and stepped, and its state for checkpoints.

`update` does what `MegatronOptimizer.step` does, from the same public parts. Without Transformer
Engine and Apex, Megatron takes the norm of each gradient and reads it on the host, one after
another: as many waits for the device a step as there are parameters. Here the norm is added up on
the device and the step waits for one value.
"""

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from roll_sft.config.schema import RunConfig
from roll_sft.engine.build import DTYPES, overlaps

Loss: TypeAlias = torch.Tensor | None
Limits: TypeAlias = tuple[float, float] | None  # of loss and norm
MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(
    config: RunConfig, wrapped: list[DistributedDataParallel], overrides: Any = None
) -> MegatronOptimizer:
    """AdamW, weight decay on parameters of two or more dimensions, clipping by the global norm.

    `overrides` are Megatron's settings of groups of parameters, where a recipe has such.
    """
    train, device = config.train, torch.device(torch.cuda.current_device())
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
            overlap_param_gather=overlaps(config.parallel)[1],
            clip_grad=train.max_grad_norm or math.inf,
        ),
        wrapped,
        config_overrides=overrides,
        use_gloo_process_groups=device.type == "cpu",
    )
    for group in optimizer.param_groups:
        group["weight_decay"] = train.weight_decay * group["wd_mult"]
        # One kernel for the whole update where Megatron took torch's AdamW, whose own choice is
        # three times the memory traffic and a temporary of every parameter.
        if device.type == "cuda" and "foreach" in group:
            group["fused"], group["foreach"] = True, False
    return optimizer


def update(
    optimizer: MegatronOptimizer, *, learning_rate: float, loss: Loss = None, limits: Limits = None
) -> tuple[float, bool]:
    """Clip the gradients in `main_grad` and take a step; their norm before clipping. Collective.

    All ranks take no step, and the second value is False, where the norm or `loss` is not finite
    or above its one of `limits`. `loss` is float64 [], the sum over the global batch on the last
    pipeline stage and 0 on others. On a GPU the update is queued when this returns.
    """
    norm = gradient_norm(optimizer, loss)
    if not math.isfinite(norm):
        return norm, False
    if limits is not None:
        from roll_sft.engine.recipes.spikes import exceeds

        if exceeds(optimizer, loss, norm, limits=limits):
            return norm, False
    scale = optimizer.config.clip_grad / (norm + 1e-6)  # a NaN leaves the gradients as they are
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_mult"]
        gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        if scale < 1.0 and gradients:
            torch._foreach_mul_(gradients, scale)
    optimizer.step_with_ready_grads()
    return norm, True


def gradient_norm(optimizer: MegatronOptimizer, loss: Loss = None) -> float:
    """Norm of the gradients of all parameters once; NaN if `loss` is not finite. Collective."""
    is_overflow = optimizer.prepare_grads()
    assert not is_overflow, "only a loss scale finds an overflow, and there is none"
    inner, *experts = inner_optimizers(optimizer)  # experts have one of their own
    first, *others = [_square(inner, loss), *map(_square, experts)]
    return float(sum(others, first).item() ** 0.5)  # one wait for the device


def _square(optimizer: Any, loss: Loss = None) -> torch.Tensor:
    """Square of the norm of an inner optimizer's gradients, float32 []; collective."""
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
        and param_is_not_shared(parameter)
        and param_is_not_tensor_parallel_duplicate(parameter)
    ]
    if gradients:
        square = torch.nn.utils.get_total_norm(gradients) ** 2.0
    else:
        square = torch.zeros((), device=torch.cuda.current_device())
    if loss is not None:
        square.add_(loss, alpha=0)  # nothing, or NaN, without an exchange or a wait of its own
    dist.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    return square


def make_optimizer_state(optimizer: MegatronOptimizer, *, step: int) -> None:
    """Zero moments and Adam's count of `step` updates, where the optimizer has none yet."""
    for inner in inner_optimizers(optimizer):
        adam = inner.optimizer
        counts_each = isinstance(adam, torch.optim.Adam)  # fused ones count per group
        for _parameter, main, _start in main_parameters(inner):
            values = adam.state[main]
            for name in MOMENTS:
                if name not in values:
                    values[name] = torch.zeros_like(main, dtype=torch.float32)
            if counts_each:
                # One tensor each: a shared one would advance once for every parameter. The fused
                # kernel reads it on the device, every other on the host.
                device = main.device if adam.param_groups[0].get("fused") else None
                values["step"] = torch.tensor(float(step), device=device)
        if not counts_each:
            for group in adam.param_groups:
                group["step"] = step


def optimizer_step(optimizer: MegatronOptimizer) -> int:
    """How many updates Adam has made."""
    for inner in inner_optimizers(optimizer):
        adam = inner.optimizer
        if not isinstance(adam, torch.optim.Adam):
            return int(adam.param_groups[0].get("step", 0))
        for _parameter, main, _start in main_parameters(inner):
            return int(adam.state[main].get("step", 0))
    return 0


def inner_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that Megatron chained; `optimizer` itself if it is none of them."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def main_parameters(inner: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """(parameter, tensor that the optimizer updates for it, its first number in the parameter)."""
    if isinstance(inner, DistributedOptimizer):
        for parameter, (group, order) in inner.model_param_group_index_map.items():
            main = inner.optimizer.param_groups[group]["params"][order]
            yield parameter, main, inner._get_model_param_range_map(parameter)["param"].start
        return
    halves, masters = (
        getattr(inner, name, []) for name in ("float16_groups", "fp32_from_float16_groups")
    )
    master_of = {
        id(main): parameter
        for parameters, mains in zip(halves, masters, strict=True)
        for parameter, main in zip(parameters, mains, strict=True)
    }
    for group in inner.optimizer.param_groups:
        for main in group["params"]:
            yield master_of.get(id(main), main), main, 0
