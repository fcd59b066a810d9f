"""Fills a rank's weights and optimizer state from a checkpoint that any layout has written."""

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from roll_sft.base.errors import CheckpointError
from roll_sft.checkpoint.index import Index
from roll_sft.engine.build import named_parameters, not_finite
from roll_sft.engine.state import RankState, is_mine, replicas


def load_state(index: Index, state: RankState) -> None:
    """Fill `state` from a checkpoint; collective. An owner reads a shared piece for all.

    Raises `CheckpointError` for a piece that is missing, not whole or damaged.
    """
    with torch.no_grad():
        # All reads come first, so that a rank that fails does so outside of any collective.
        for each in state.pieces:
            if is_mine(each):
                index.fill(each.piece)
        for each in state.pieces:
            group = replicas(each.piece)
            if each.is_shared and dist.get_world_size(group) > 1:
                source = dist.get_global_rank(group, each.owner)
                dist.broadcast(each.piece.tensor, src=source, group=group)


def check_loaded(chunks: list[GPTModel], folder: object) -> None:
    """Raise `CheckpointError` where weights that came from `folder` are not finite."""
    if found := not_finite(list(named_parameters(chunks))):
        raise CheckpointError(
            f"{folder}: {found[0]} {found[1]}: the run had diverged by then; go back to an earlier"
            " step folder with resume="
        )
