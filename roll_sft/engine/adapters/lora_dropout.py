"""Dropout of an adapter's inputs that is the same on every layout.

Whether a number is dropped follows from the run's seed, the step, the projection, the sample, the
token's position in it and the column, by a hash. So no rank draws random numbers, a resumed run and
a recomputed layer drop the same ones, and two layouts compute the same loss.

Legend: N tokens of this context rank, I inputs of a projection on this tensor rank.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from roll_sft.base.layout import ParallelLayout
from roll_sft.data.steps.batch import zigzag_indices
from roll_sft.engine.fused import run_compiled
from roll_sft.engine.micro_batch import Indices, MicroBatch

_NO_SAMPLE = -1  # of the padding behind the last sample
_HIGH = 1 << 31


class TokenDropout:
    """The dropout of all adapters of a rank. `keys` are of the pack that is being computed."""

    def __init__(self, share: float, *, seed: int, is_compiled: bool) -> None:
        self.share = share
        self.keys: torch.Tensor | None = None  # int32 [N]
        self._seed, self._step, self._is_compiled = seed, 0, is_compiled

    def begin_step(self, step: int) -> None:
        """Drop as step `step` does from now on."""
        self._step = step

    def follow(self, layer: torch.nn.Module) -> None:
        """Take the keys of each pack from the arguments of `layer`, when it is computed again too.

        Under a pipeline another pack may have been computed between a forward and its backward.
        """
        layer.register_forward_pre_hook(self._take_keys, with_kwargs=True)

    def _take_keys(self, _layer: Any, _inputs: Any, named: dict[str, Any]) -> None:
        self.keys = named["packed_seq_params"].token_keys

    def __call__(self, inputs: torch.Tensor, *, module: str, first_column: int) -> torch.Tensor:
        """`inputs` [N, I] of the projection `module` with some set to 0, the others scaled up.

        `first_column` is the place of the first input among those of all tensor ranks.
        """
        assert self.keys is not None, "the keys of a pack come with its layer's arguments"
        digest = hashlib.sha256(f"{self._seed}:{self._step}:{module}".encode()).digest()
        salt = int.from_bytes(digest[:4], "little", signed=True)
        tokens, last = self.keys ^ salt, first_column + inputs.shape[1]
        columns = torch.arange(first_column, last, dtype=torch.int32, device=tokens.device)
        limit, scale = int(self.share * _HIGH), 1 / (1 - self.share)
        if self._is_compiled:
            dropped: torch.Tensor = run_compiled(
                dropped_inputs, [inputs, tokens], columns, limit, scale
            )
            return dropped
        return dropped_inputs(inputs, tokens, columns, limit, scale)


def dropped_inputs(
    inputs: torch.Tensor, tokens: torch.Tensor, columns: torch.Tensor, limit: int, scale: float
) -> torch.Tensor:
    """`inputs` [N, I], 0 where the hash of `tokens` int32 [N] and `columns` int32 [I] is small."""
    # All of the hash is here, so that compiled code is one kernel of it.
    numbers = mixed(mixed(tokens)[:, None] ^ mixed(columns)) & (_HIGH - 1)
    return torch.where(numbers >= limit, inputs * scale, 0.0)


def token_keys(samples: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The key of each token, int32 [N], of its sample and its position in it, int32 [N] each."""
    return mixed(mixed(samples) ^ positions)


def mixed(numbers: torch.Tensor) -> torch.Tensor:
    """int32 -> int32, one to one, every bit depending on all: the finalizer of MurmurHash3."""
    numbers = (numbers ^ ((numbers >> 16) & 0xFFFF)) * -2048144789
    numbers = (numbers ^ ((numbers >> 13) & 0x7FFFF)) * -1028477387
    return numbers ^ ((numbers >> 16) & 0xFFFF)


def with_keys(
    batches: Sequence[MicroBatch], indices: Indices, *, layout: ParallelLayout, context_rank: int
) -> list[MicroBatch]:
    """`batches` of the samples `indices`, each with a key of every token of this context rank."""
    keyed = []
    for batch, ids in zip(batches, indices, strict=True):
        bounds = batch.pack.cu_seqlens
        lengths = bounds.diff().long()
        samples = torch.tensor([*ids, *[_NO_SAMPLE] * (len(lengths) - len(ids))])
        mine = zigzag_indices(bounds, context_size=layout.context_size, context_rank=context_rank)
        sample = samples.repeat_interleave(lengths)[mine].int()
        keys = token_keys(sample, batch.pack.positions_T[0].int())
        keyed.append(replace(batch, token_keys=keys))
    return keyed
