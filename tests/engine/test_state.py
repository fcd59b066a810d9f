"""The order of a rank's state, which data ranks agree on without speaking of it."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from roll_sft.engine import state


def test_shared_pieces_have_the_models_order_wherever_they_lie() -> None:
    """The buffers of virtual stages lie anywhere, on each data rank elsewhere.

    By addresses a rank would write what another does, and leave out what is its own.
    """
    memory = torch.zeros(40)
    for places in ([0, 10, 20], [20, 0, 10], [30, 10, 0]):
        weights = {
            f"weight_{index}": ShardedTensor.from_rank_offsets(
                f"weight_{index}", memory[place : place + 10], replica_id=(0, 0, 0)
            )
            for index, place in enumerate(places)
        }
        chunk: Any = SimpleNamespace(sharded_state_dict=lambda weights=weights, **_: dict(weights))
        with (
            patch.multiple(state.parallel_state, get_data_parallel_group=lambda **_: None),
            patch.multiple(state.dist, get_rank=lambda _: 0, get_world_size=lambda _: 2),
        ):
            held = state.rank_state([chunk], None).pieces
        assert [(each.piece.key, each.owner) for each in held] == [
            ("weight_0", 0),
            ("weight_1", 1),
            ("weight_2", 0),
        ]
        assert [each.piece.tensor.data_ptr() for each in held] == [
            memory[place:].data_ptr() for place in places
        ]
