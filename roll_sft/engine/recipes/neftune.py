"""NEFTune: uniform noise on embeddings in training, the same on every layout.

As transformers adds it: up to alpha / sqrt(L * D) either way, with L the tokens of the sample and D
the hidden size. Each number follows, by a hash, from the run's seed, the step, the sample, the
token's position in it and the column. So a resumed run adds the same noise.

Legend: T tokens of this context rank, N those of them on this rank (T / TP under sequence
parallelism), D hidden size.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from roll_sft.base.layout import Coordinate, ParallelLayout
from roll_sft.data.steps.batch import zigzag_indices
from roll_sft.data.tokens.cache import TokenSet
from roll_sft.engine.adapters.lora_dropout import mixed, with_keys
from roll_sft.engine.fused import run_compiled
from roll_sft.engine.micro_batch import Indices, MicroBatch


class Neftune:
    """The noise of a rank."""

    def __init__(self, alpha: float, *, seed: int, hidden_size: int, is_compiled: bool) -> None:
        self._alpha, self._seed, self._width = alpha, seed, hidden_size
        self._step, self._is_compiled = 0, is_compiled
        self._batch: MicroBatch | None = None

    def follow(self, chunks: Sequence[GPTModel]) -> None:
        """Add noise to the embeddings of the chunk that has them."""
        if chunks[0].pre_process:
            # Before a family multiplies what its embedding module gives, as in transformers.
            chunks[0].embedding.register_forward_hook(self._add, prepend=True)

    def begin_step(self, step: int) -> None:
        """Add the noise of step `step` from now on."""
        self._step = step

    def begin_pack(self, batch: MicroBatch) -> None:
        """The next forward is that of `batch`."""
        self._batch = batch

    def attached(
        self,
        batches: Sequence[MicroBatch],
        indices: Indices,
        tokens: TokenSet,
        *,
        layout: ParallelLayout,
        rank: Coordinate,
    ) -> list[MicroBatch]:
        """`batches` of the samples `indices`, with each token's key and largest noise."""
        keyed = with_keys(batches, indices, layout=layout, context_rank=rank.context_rank)
        attached = []
        for batch, ids in zip(keyed, indices, strict=True):
            bounds = batch.pack.cu_seqlens
            padded = bounds.diff().long()
            lengths = torch.full((len(padded),), torch.inf)  # no noise on padding behind samples
            lengths[: len(ids)] = torch.tensor([tokens.sample(each)[0].size for each in ids])
            mine = zigzag_indices(
                bounds, context_size=layout.context_size, context_rank=rank.context_rank
            )
            largest = self._alpha / (lengths * self._width).sqrt()
            attached.append(replace(batch, noise_T=largest.repeat_interleave(padded)[mine]))
        return attached

    def _add(self, module: Any, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        """[N, 1, D] -> the same with noise, in training."""
        if not module.training:
            return embedded
        batch = self._batch
        assert batch is not None, "a pack begins before its forward"
        assert batch.token_keys is not None, "a pack has keys"
        assert batch.noise_T is not None, "a pack has its noise"
        rows = embedded.flatten(0, 1)
        first = len(rows) * parallel_state.get_tensor_model_parallel_rank()
        mine = slice(first, first + len(rows)) if len(rows) < len(batch.noise_T) else slice(None)
        digest = hashlib.sha256(f"{self._seed}:{self._step}:neftune".encode()).digest()
        keys = batch.token_keys[mine] ^ int.from_bytes(digest[:4], "little", signed=True)
        columns = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device)
        largest = batch.noise_T[mine]
        if self._is_compiled:
            noisy: torch.Tensor = run_compiled(with_noise, [rows, keys, largest], columns)
        else:
            noisy = with_noise(rows, keys, largest, columns)
        return noisy.view(embedded.shape)


def with_noise(
    rows: torch.Tensor, keys: torch.Tensor, largest: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """`rows` [N, D] with noise of up to `largest` float32 [N]; same dtype.

    Each number is a hash of `keys` int32 [N] and `columns` int32 [D], of 2^31 values.
    """
    numbers = mixed(mixed(keys)[:, None] ^ mixed(columns)) & 0x7FFFFFFF
    uniform = numbers.float() * 2.0**-30 - 1.0
    return (rows.float() + uniform * largest[:, None]).to(rows.dtype)
