"""Fills a rank's weights and optimizer state from a checkpoint that any layout has written."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from roll_sft.base.errors import CheckpointError
from roll_sft.checkpoint.index import Index
from roll_sft.engine.build import named_parameters, not_finite
from roll_sft.engine.state import RankState, data_rank


def load_state(index: Index, state: RankState) -> None:
    """Fill `state` from a checkpoint; collective. An owner reads a shared piece for all.

    Raises `CheckpointError` for a piece that is missing, not whole or damaged.
    """
    group, rank = parallel_state.get_data_parallel_group(with_context_parallel=True), data_rank()
    with torch.no_grad():
        # All reads come first, so that a rank that fails does so outside of any collective.
        for each in state.pieces:
            if each.owner == rank:
                index.fill(each.piece)
        if dist.get_world_size(group) > 1:
            for each in state.pieces:
                if each.is_shared:
                    source = dist.get_global_rank(group, each.owner)
                    dist.broadcast(each.piece.tensor, src=source, group=group)


def check_loaded(chunks: list[GPTModel], folder: object) -> None:
    """Raise `CheckpointError` where weights that came from `folder` are not finite."""
    if found := not_finite(list(named_parameters(chunks))):
        raise CheckpointError(
            f"{folder}: {found[0]} {found[1]}: the run had diverged by then; go back to an earlier"
            " step folder with resume="
        )
