"""Weights that data ranks exchange during the forward pass, where the update leaves each a part.

Megatron-Core cuts the buffer of weights into buckets. A hook before each module's forward waits for
the buckets of the module's own parameters and begins the next one, so one exchange at a time runs
beside the computation. The first begins behind the update, and the virtual stages of a pipeline
form one chain. Experts have buffers of their own, whose first exchange begins in the forward pass.
Whoever reads weights outside of a forward pass calls `gather_weights` before.
"""

import itertools
from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel


def chain_stages(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Let the last bucket of each virtual stage begin the first of the next stage.

    A stage lists its buckets in the order of the backward pass.
    """
    for stage, following in itertools.pairwise(_trained(wrapped)):
        stage.bucket_groups[0].next_param_gather_bucket_group = following.bucket_groups[-1]


def begin_gather(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Queue the exchange of the bucket that the next forward pass needs first. Collective."""
    for stage in _trained(wrapped)[:1]:
        if not stage.bucket_groups[-1].param_gather_dispatched:
            stage.bucket_groups[-1].start_param_sync()


def gather_weights(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Exchange what is not exchanged yet; then every data rank holds all weights. Collective."""
    for stage in wrapped:
        groups = [*stage.expert_parallel_bucket_groups, *stage.bucket_groups]
        for group in reversed(groups):
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                group.start_param_sync(force_sync=True)


def _trained(wrapped: Sequence[DistributedDataParallel]) -> list[DistributedDataParallel]:
    """The virtual stages that train anything."""
    return [stage for stage in wrapped if stage.bucket_groups]
