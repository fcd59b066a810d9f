"""Whether a step is a spike, which `train.on_spike=skip` makes no update of."""

from typing import Any

import torch
import torch.distributed as dist

from roll_sft.engine.optimizer import inner_optimizers


def exceeds(
    optimizer: Any, loss: torch.Tensor | None, norm: float, *, limits: tuple[float, float]
) -> bool:
    """Whether the loss or the norm is above its limit; all ranks agree. Collective.

    `loss` is float64 [], the sum over the global batch on the last pipeline stage and 0 on others.
    Waits for the device once more than a step without limits.
    """
    assert loss is not None, "limits are of a loss, too"
    largest = loss.clone()
    group = inner_optimizers(optimizer)[0].get_grad_stats_parallel_group()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return norm > limits[1] or float(largest) > limits[0]
