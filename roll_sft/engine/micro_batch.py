"""Micro-batches: what the model's forward takes of one pack, built on the host ahead of time.

Legend: T tokens of this context rank, N segments, K keys that the segments list, R supervised rows.

A *segment* is a run of queries of one sample with the keys before and among them: the whole sample
without context parallelism, and each of a rank's two zig-zag chunks of it with context parallelism.
The last query of a segment sees all its keys (a causal triangle aligned to the bottom right).

Promises: what the forward copies to the device lies in pinned memory where there is a GPU, so no
copy waits for the device; the host never asks the device for a length.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F

from roll_sft.base.layout import Coordinate, ParallelLayout
from roll_sft.data.steps.batch import PackedBatch, build_batch, common_tokens, zigzag_inverse
from roll_sft.data.tokens.cache import TokenSet

Indices: TypeAlias = tuple[tuple[int, ...], ...]
"""Sample ids of each micro-batch."""
Move: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of one pack on one context rank."""

    query_lengths: tuple[int, ...]  # N
    key_lengths: tuple[int, ...]  # N
    query_bounds: torch.Tensor  # int32 [N + 1]
    key_bounds: torch.Tensor  # int32 [N + 1]
    key_index: torch.Tensor | None = None  # int64 [K] into the gathered keys; None: keys in order

    def moved(self, move: Move) -> "Segments":
        """The same with `move` applied to every tensor."""
        return replace(
            self,
            query_bounds=move(self.query_bounds),
            key_bounds=move(self.key_bounds),
            key_index=None if self.key_index is None else move(self.key_index),
        )

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Bounds of queries and keys, and the longest of each: the order of every kernel's API."""
        return self.query_bounds, self.key_bounds, max(self.query_lengths), max(self.key_lengths)


@dataclass(frozen=True, slots=True)
class SupervisedRows:
    """The supervised rows of one micro-batch; tensor ranks agree on all but `index`."""

    index: torch.Tensor  # int64: positions in this rank's (shard of) hidden states, with filling
    kept: torch.Tensor | None  # int64 [R]: the gathered rows that are no filling; None: all
    labels: torch.Tensor  # int64 [R], in the order of the tokens
    vocab_size: int  # without padding
    is_sharded: bool  # whether each tensor rank has a part of the sequence
    factors: torch.Tensor | None = None  # float32 [R], of an objective that is no mean of tokens
    hits: list[torch.Tensor] | None = None  # filled with what is the likeliest, in an evaluation

    def moved(self, move: Move) -> "SupervisedRows":
        """The same with `move` applied to every tensor."""
        return replace(
            self,
            index=move(self.index),
            kept=None if self.kept is None else move(self.kept),
            labels=move(self.labels),
            factors=None if self.factors is None else move(self.factors),
        )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One pack of one context rank, its segments for the attention and its rows for the head."""

    pack: PackedBatch  # only tokens_T and positions_T leave the host
    segments: Segments
    rows: SupervisedRows
    token_keys: torch.Tensor | None = None  # int32 [T], where dropout or noise needs them
    noise_T: torch.Tensor | None = None  # float32 [T], the largest noise on each embedding
    padding: torch.Tensor | None = None  # bool [1, T], True for padding, where experts need it

    def pinned(self) -> "MicroBatch":
        """The same in page-locked memory."""
        return self._moved(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on `device`; copies from pinned memory are queued, not waited for."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def _moved(self, move: Move) -> "MicroBatch":
        pack = replace(
            self.pack, tokens_T=move(self.pack.tokens_T), positions_T=move(self.pack.positions_T)
        )
        extra = (self.token_keys, self.noise_T, self.padding)
        moved = [None if each is None else move(each) for each in extra]
        return MicroBatch(pack, self.segments.moved(move), self.rows.moved(move), *moved)


def build_micro_batches(
    tokens: TokenSet,
    indices: Indices,
    *,
    layout: ParallelLayout,
    rank: Coordinate,
    vocab_size: int,
) -> list[MicroBatch]:
    """The micro-batches of the samples `indices` of `tokens`, as `rank` sees them; on the host."""
    samples = [[tokens.sample(index) for index in ids] for ids in indices]
    num_tokens = common_tokens(samples, layout=layout)
    context_rank = rank.context_rank
    shards = layout.tensor_size if layout.sequence_parallel else 1
    batches = []
    for members in samples:
        pack = build_batch(members, layout=layout, context_rank=context_rank, num_tokens=num_tokens)
        segments = segments_of(
            pack.cu_seqlens, context_size=layout.context_size, context_rank=context_rank
        )
        rows = supervised_rows(
            pack.rows,
            pack.row_labels,
            num_tokens=pack.tokens_T.shape[1],
            vocab_size=vocab_size,
            num_shards=shards,
            shard=rank.tensor_rank if shards > 1 else 0,
        )
        batches.append(MicroBatch(pack, segments, rows))
    return batches


def segments_of(cu_seqlens: torch.Tensor, *, context_size: int, context_rank: int) -> Segments:
    """`cu_seqlens` int32 [S + 1] of the whole pack -> this rank's segments; all on the CPU.

    `key_index` undoes the zig-zag order of the gather and lists every segment's keys.
    """
    query_lengths, key_lengths, starts = [], [], []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        for first, last in _query_chunks(end - start, context_size, context_rank):
            query_lengths.append(last - first)
            key_lengths.append(last)
            starts.append(start)
    index = None
    if context_size > 1:
        keys = [torch.arange(s, s + n) for s, n in zip(starts, key_lengths, strict=True)]
        index = zigzag_inverse(cu_seqlens, context_size=context_size)[torch.cat(keys)]
    return Segments(
        query_lengths=tuple(query_lengths),
        key_lengths=tuple(key_lengths),
        query_bounds=_bounds(query_lengths),
        key_bounds=_bounds(key_lengths),
        key_index=index,
    )


def _query_chunks(length: int, context_size: int, context_rank: int) -> list[tuple[int, int]]:
    """[first, last) of the chunks of queries that the rank holds of a sample of `length` tokens."""
    if context_size == 1:
        return [(0, length)]
    chunk = length // (2 * context_size)
    mine = context_rank, 2 * context_size - 1 - context_rank
    return [(i * chunk, (i + 1) * chunk) for i in mine]


def _bounds(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def supervised_rows(
    rows: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_tokens: int,
    vocab_size: int,
    num_shards: int,
    shard: int,
) -> SupervisedRows:
    """Rows int64 [R] (ascending) and their labels int64 [R] -> the rows of one shard.

    `num_shards` is the number of sequence-parallel shards, 1 without sequence parallelism. The
    gather needs shards of one size, so each enters as many rows as the fullest, and at least one:
    collectives of empty tensors are not reliable. A short shard repeats its token 0; `kept` drops
    these behind the gather.
    """
    shard_tokens = num_tokens // num_shards
    shard_of_row = rows // shard_tokens
    counts = torch.bincount(shard_of_row, minlength=num_shards)
    entered = max(1, int(counts.max()))
    mine = rows[shard_of_row == shard] - shard * shard_tokens
    kept = None
    if entered * num_shards > len(rows):
        is_kept = torch.arange(entered) < counts[:, None]  # [num_shards, entered]
        kept = is_kept.flatten().nonzero()[:, 0]
    return SupervisedRows(
        index=F.pad(mine, (0, entered - len(mine))),
        kept=kept,
        labels=labels,
        vocab_size=vocab_size,
        is_sharded=num_shards > 1,
    )


class BuildAhead:
    """Builds the micro-batches of one step in a thread while another step runs."""

    def __init__(self, build: Callable[[Indices], list[MicroBatch]]) -> None:
        self._build = build
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[Indices, Future[list[MicroBatch]]] | None = None

    def begin(self, indices: Indices) -> None:
        """Build `indices` in the background, in place of what was begun before and not taken."""
        self._ahead = indices, self._thread.submit(self._build, indices)

    def take(self, indices: Indices) -> list[MicroBatch]:
        """The micro-batches of `indices`, waited for or built now. Raises what building raised."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != indices:
            return self._build(indices)
        return ahead[1].result()
