"""A micro-batch with all that the model's forward takes beside it, built on the host ahead of time.

Promises: what the forward copies to the device lies in pinned memory where there is a GPU, so that
no copy waits for the device; the host never asks the device for a length.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from roll_sft.data.steps.batch import PackedBatch
from roll_sft.engine.attention import Segments
from roll_sft.engine.loss import SupervisedRows

Indices: TypeAlias = tuple[tuple[int, ...], ...]
"""Sample ids of each micro-batch."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One pack of one context rank, its segments for the attention and its rows for the head.

    What only the host reads of the pack stays there wherever the rest is moved.
    """

    pack: PackedBatch
    segments: Segments
    rows: SupervisedRows

    def pinned(self) -> "MicroBatch":
        """The same in memory that the device can read by itself."""
        return self._mapped(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on `device`; copies from pinned memory are queued, not waited for."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def _mapped(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        pack = replace(
            self.pack,
            tokens_T=move(self.pack.tokens_T),
            positions_T=move(self.pack.positions_T),
        )
        return MicroBatch(pack, self.segments.moved(move), self.rows.moved(move))


class BuildAhead:
    """Builds the micro-batches of one step in a thread while another step runs."""

    def __init__(self, build: Callable[[Indices], list[MicroBatch]]) -> None:
        self._build = build
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[Indices, Future[list[MicroBatch]]] | None = None

    def begin(self, indices: Indices) -> None:
        """Build `indices` in the background; what was begun before and not taken is dropped."""
        self._ahead = indices, self._thread.submit(self._build, indices)

    def take(self, indices: Indices) -> list[MicroBatch]:
        """The micro-batches of `indices`, waited for or built now. Raises what building raised."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != indices:
            return self._build(indices)
        return ahead[1].result()
