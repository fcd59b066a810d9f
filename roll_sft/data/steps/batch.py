"""One micro-batch as tensors: samples padded, packed, and split over context-parallel ranks.

Shapes: T packed tokens of this rank, S sequences in the pack, R supervised rows of this rank.

Padding is added here and nowhere before. Each sample is padded at its end until the zig-zag split
cuts it evenly, then the last one until the pack divides by the pack alignment. Padding follows the
real tokens of its sample, where causal attention hides it, and has no loss. Where all packs of a
step get one length, a short pack ends in a sequence of padding alone.

Invariants: labels are made before the split, inside each sample, so no token predicts the first
token of the next sample; no sequence is empty; all ranks of one context group together hold the
pack once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from roll_sft.base.layout import ParallelLayout
from roll_sft.data.steps.packing import common_length, padded_lengths

Sample = tuple[NDArray[np.int32], NDArray[np.uint8]]
"""Token ids [n] and label mask [n]: mask[t] says that predicting token t + 1 at t is supervised."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """One micro-batch of one context-parallel rank; tensor-parallel ranks hold equal copies.

    tokens_T, positions_T: int64 [1, T]. Positions restart at 0 in every sample.
    labels_T: int64 [T], the next token of the same sample, 0 where there is none.
    supervised_T: bool [T], where labels_T counts in the loss.
    cu_seqlens: int32 [S + 1], bounds of the padded sequences of the whole pack, before the split:
    Megatron divides by the context size itself. max_seqlen: the longest of those sequences.
    A sequence after those of the samples is padding.
    rows: int64 [R], the supervised positions in T, ascending; row_labels: int64 [R], their labels.
    """

    tokens_T: torch.Tensor
    labels_T: torch.Tensor
    positions_T: torch.Tensor
    supervised_T: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    rows: torch.Tensor
    row_labels: torch.Tensor
    num_supervised: int


def build_batch(
    samples: Sequence[Sample],
    *,
    layout: ParallelLayout,
    context_rank: int,
    pad_token_id: int = 0,
    num_tokens: int | None = None,
) -> PackedBatch:
    """Pack `samples`, pad the pack to `num_tokens`, and take `context_rank`'s slice, on the CPU.

    Without samples the pack is one sequence of padding without supervised rows: an idle rank must
    run forward and backward too, or the others wait for it.
    """
    lengths = _sequence_lengths(samples, layout)
    if num_tokens is not None and num_tokens != sum(lengths):
        filling = num_tokens - sum(lengths)
        assert filling > 0, f"a pack of {sum(lengths)} tokens does not fit {num_tokens}"
        assert filling % layout.pack_alignment == 0, f"{num_tokens} tokens cannot be cut evenly"
        lengths.append(filling)
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    packed_tokens = np.full(bounds[-1], pad_token_id, dtype=np.int64)
    labels = np.zeros(bounds[-1], dtype=np.int64)
    supervised = np.zeros(bounds[-1], dtype=np.bool_)
    for start, (tokens, label_mask) in zip(bounds.tolist(), samples, strict=False):
        end = start + tokens.size
        assert tokens.shape == label_mask.shape, f"{tokens.shape} tokens, {label_mask.shape} mask"
        assert not label_mask[-1], f"mask[{end - start - 1}] is set, and no token follows"
        packed_tokens[start:end] = tokens
        labels[start : end - 1] = tokens[1:]
        supervised[start:end] = label_mask
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)

    cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
    mine = zigzag_indices(
        cu_seqlens, context_size=layout.context_size, context_rank=context_rank
    ).numpy()
    rows = np.flatnonzero(supervised[mine])
    return PackedBatch(
        tokens_T=torch.from_numpy(packed_tokens[mine])[None],
        labels_T=torch.from_numpy(labels[mine]),
        positions_T=torch.from_numpy(positions[mine])[None],
        supervised_T=torch.from_numpy(supervised[mine]),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        rows=torch.from_numpy(rows),
        row_labels=torch.from_numpy(labels[mine][rows]),
        num_supervised=rows.size,
    )


def common_tokens(packs: Sequence[Sequence[Sample]], *, layout: ParallelLayout) -> int | None:
    """`num_tokens` of all `packs` of a rank's step; see `packing.common_length`."""
    return common_length([sum(_sequence_lengths(pack, layout)) for pack in packs], layout=layout)


def _sequence_lengths(samples: Sequence[Sample], layout: ParallelLayout) -> list[int]:
    return padded_lengths([tokens.size for tokens, _ in samples], layout=layout)


def zigzag_indices(
    cu_seqlens: torch.Tensor, *, context_size: int, context_rank: int
) -> torch.Tensor:
    """Places in the pack that `context_rank` holds, in its order: int64 [T], on cu_seqlens'
    device.

    Each sequence is cut in 2 * context_size chunks and rank r takes the chunks r and 2 *
    context_size - 1 - r: under a causal mask an early chunk is cheap and a late one costly, so
    the pairs cost the same. `cu_seqlens` is int [S + 1], every length a multiple of 2 *
    context_size (of 1 without context parallelism).
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    assert 0 <= context_rank < context_size, f"rank {context_rank} of {context_size}"
    if context_size == 1:
        return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    uneven = lengths % (2 * context_size)
    assert not uneven.any(), f"lengths {lengths.tolist()} must divide by {2 * context_size}"
    chunks = lengths // (2 * context_size)
    # Two runs of one chunk for each sequence: [first of s0, second of s0, first of s1, ...].
    late = 2 * context_size - 1 - context_rank
    run_starts = torch.stack((starts + context_rank * chunks, starts + late * chunks), 1).flatten()
    run_lengths = chunks.repeat_interleave(2)
    run_ends = run_lengths.cumsum(0)
    offsets = (run_starts - run_ends + run_lengths).repeat_interleave(run_lengths)
    return offsets + torch.arange(offsets.numel(), device=offsets.device)


def zigzag_inverse(cu_seqlens: torch.Tensor, *, context_size: int) -> torch.Tensor:
    """Undoes the split: `torch.cat(slices of ranks 0, 1, ...)[inverse]` is the pack.

    int64 [tokens of the pack], on cu_seqlens' device.
    """
    order = torch.cat(
        [
            zigzag_indices(cu_seqlens, context_size=context_size, context_rank=rank)
            for rank in range(context_size)
        ]
    )
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse
