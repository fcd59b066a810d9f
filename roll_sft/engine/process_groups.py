"""Process groups of one rank: rendezvous, Megatron's groups, teardown.

Assumes one process per rank and no groups yet. Promises that Megatron places every rank where
`ParallelLayout` does, by which the driver routes data.
"""

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from roll_sft.base.layout import Coordinate, ParallelLayout
from roll_sft.engine.environment import LOOPBACK


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """How a rank finds the others. Rank 0 serves the store, which `port` of loopback leads to."""

    port: int
    rank: int
    world_size: int
    setup_timeout_s: float
    collective_timeout_s: float
    local_device: int = 0  # among the GPUs that this process sees; a Ray worker sees its own


def serve_store(*, world_size: int, timeout_s: float) -> dist.TCPStore:
    """The rendezvous store, served by this process on a free port of loopback.

    Left to itself, torch listens on every interface, and its store asks nobody who it is.
    """
    listening = socket.create_server((LOOPBACK, 0))
    return dist.TCPStore(
        LOOPBACK,
        listening.getsockname()[1],
        world_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),  # the store closes it
    )


@contextlib.contextmanager
def process_groups(
    rendezvous: Rendezvous, layout: ParallelLayout, *, device: str, store: dist.Store | None = None
) -> Iterator[None]:
    """Join the group of `layout` and make Megatron's groups; leave both on exit.

    `device` is "cpu" (gloo) or "cuda" (NCCL). Rank 0 passes the `store` that it serves.
    """
    if device == "cpu":
        from roll_sft.engine import cpu_backend  # a run on GPUs needs none of it

        cpu_backend.install()
    else:
        torch.cuda.set_device(rendezvous.local_device)
    if store is None:
        store = dist.TCPStore(
            LOOPBACK,
            rendezvous.port,
            rendezvous.world_size,
            is_master=False,
            timeout=timedelta(seconds=rendezvous.setup_timeout_s),
        )
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=store,
        rank=rendezvous.rank,
        world_size=rendezvous.world_size,
        timeout=timedelta(seconds=rendezvous.collective_timeout_s),
        # NCCL then connects here, not in the first step, and makes its subgroups by splitting.
        device_id=None if device == "cpu" else torch.device("cuda", rendezvous.local_device),
    )
    try:
        parallel_state.initialize_model_parallel(
            layout.tensor_size,
            layout.pipeline_size,
            layout.virtual_size if layout.virtual_size > 1 else None,
            context_parallel_size=layout.context_size,
            expert_model_parallel_size=layout.expert_size,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=max(1, round(rendezvous.collective_timeout_s / 60)),
            # Beside NCCL nothing uses gloo, whose mesh fails where a host's name is 127.0.1.1.
            create_gloo_process_groups=device == "cpu",
        )
        _check_agreement(layout, rendezvous.rank)
        # Megatron forks its dropout state around every layer, so the tracker must exist.
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def seed_step(seed: int, *, step: int) -> None:
    """Seed the random states of this rank for `step`, from `seed` and `step` alone.

    So a checkpoint holds no random state, and a resumed run draws the same numbers on any layout.
    """
    tensor_parallel.model_parallel_cuda_manual_seed((seed * 1_000_003 + step) % 2**31)


def _check_agreement(layout: ParallelLayout, rank: int) -> None:
    megatron = Coordinate(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    ours = layout.coordinate(rank)
    assert megatron == ours, f"rank {rank}: Megatron places it at {megatron}, the layout at {ours}"
