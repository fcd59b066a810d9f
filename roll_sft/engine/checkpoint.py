"""Sharded checkpoints in Megatron-Core's `torch_dist` format, written from all ranks.

`save` is collective. It writes into a folder that is not yet a checkpoint; `engine/publish.py`
makes it one, and `engine/reader.py` reads it.
"""

import multiprocessing.dummy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from roll_sft.errors import CheckpointError

# Optimizer state in a form that any layout can read back; it gathers each model-parallel shard on
# the host (12 bytes per parameter / (TP x PP)), which the plan's memory estimate includes.
OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def save(folder: Path, *, chunks: list[GPTModel], optimizer: MegatronOptimizer | None) -> None:
    """Write this rank's shards of the model, and of the optimizer if given, into empty `folder`.

    Raises `CheckpointError` where any rank's write fails (a full disk, say).
    """
    # Shards are named by global layer, so the number of chunks leaves no trace in the files.
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    state: dict[str, Any] = {
        name: chunk.sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), metadata=OPTIMIZER_METADATA)
    # Megatron-Core 0.16 writes from forked processes, and all versions start one for the results.
    # Where a rank is killed they wait for each other for ever. Threads, as 0.19 has for writing,
    # end with the rank.
    filesystem_async.mp = SimpleNamespace(get_context=lambda _method: multiprocessing.dummy)
    try:
        dist_checkpointing.save(state, str(folder))
    # CheckpointException derives from BaseException and slips past every other handler.
    except (CheckpointException, CheckpointingException, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{folder}: cannot be written: {reason}") from error
