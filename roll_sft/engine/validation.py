"""The loss of a validation set by turns of its conversations, and its token accuracy.

Legend: n tokens of a sample, R supervised rows of a pack on this context rank.

A turn is a run of supervised tokens of a sample: the k-th is the k-th answer that is trained on. A
tool call begins with a token of the tokenizer that does nothing else (`<tool_call>`), and reaches
to the end of its answer; a tokenizer that spells such marks in several tokens has no tool calls
here. Tokens of a tool call are also those of their turn. Nothing here runs in a training step.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray

from roll_sft.base.layout import Coordinate, ParallelLayout
from roll_sft.base.metrics import EvalMetrics
from roll_sft.data.steps.batch import PackedBatch, zigzag_indices
from roll_sft.data.tokens.cache import TokenSet
from roll_sft.engine.loss import over_tensor_ranks
from roll_sft.engine.micro_batch import Indices, MicroBatch, SupervisedRows

NUM_TURNS = 8  # the last one has all later turns, too
PARTS = (*(f"turn_{k}" for k in range(1, NUM_TURNS)), f"turn_{NUM_TURNS}_on", "tool_calls")


class Breakdown:
    """The parts of one chunk of a validation set, on one rank."""

    def __init__(
        self, batches: Sequence[MicroBatch], indices: Indices, tokens: TokenSet, call_ids: list[int]
    ) -> None:
        self._samples = [[tokens.sample(each) for each in ids] for ids in indices]
        self._call_ids = call_ids
        # Each head appends to its own list, in the order of its chunks of rows.
        self.batches = [replace(each, rows=replace(each.rows, hits=[])) for each in batches]

    def metrics(
        self, row_losses: Sequence[torch.Tensor], layout: ParallelLayout, rank: Coordinate
    ) -> EvalMetrics:
        """The sums over all data and context ranks; collective on the last pipeline stage.

        `row_losses` are of each micro-batch float32 [R], none on other stages, which return zeros.
        """
        sums = np.zeros((len(PARTS) + 1, 3))  # loss, tokens and hits; the whole behind the parts
        for batch, samples, losses in zip(self.batches, self._samples, row_losses, strict=False):
            parts = [answer_parts(*each, self._call_ids) for each in samples]
            turns, is_call = rows_of(batch.pack, parts, layout=layout, rank=rank)
            hits = torch.cat([losses[:0].bool(), *(batch.rows.hits or ())])
            loss, hit = torch.stack([losses.double(), hits.double()]).cpu().numpy()
            told = np.stack([loss, np.ones_like(loss), hit], axis=1)
            np.add.at(sums, np.minimum(turns, NUM_TURNS) - 1, told)
            sums[-2] += told[is_call].sum(axis=0)
            sums[-1] += told.sum(axis=0)
        total = torch.from_numpy(sums).to(torch.cuda.current_device())
        if parallel_state.is_pipeline_last_stage():
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            dist.all_reduce(total, group=group)
        *parts_, (_, _, num_hits) = total.tolist()
        return EvalMetrics(
            0.0,
            0,
            round(num_hits),
            {
                name: EvalMetrics(loss_sum, round(count), round(hits))
                for name, (loss_sum, count, hits) in zip(PARTS, parts_, strict=True)
                if count
            },
        )


def answer_parts(
    tokens: NDArray[np.int32], label_mask: NDArray[np.uint8], call_ids: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Of each token of a sample the turn that its label is of, from 1, and whether of a tool call.

    int64 [n], 0 where there is no label, and bool [n].
    """
    is_label = label_mask.astype(np.bool_)
    begins = is_label & ~np.concatenate([[False], is_label[:-1]])
    turns = np.cumsum(begins) * is_label
    opens = is_label & np.isin(np.concatenate([tokens[1:], [-1]]), call_ids)
    opened = np.cumsum(opens)
    before = np.concatenate([[0], (opened - opens)[begins]])  # calls opened before each turn
    return turns, is_label & (opened > before[turns])


def rows_of(
    pack: PackedBatch,
    parts: Sequence[tuple[NDArray[np.int64], NDArray[np.bool_]]],
    *,
    layout: ParallelLayout,
    rank: Coordinate,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """`parts` of the samples of `pack` as its rows have them: int64 [R] and bool [R]."""
    bounds = pack.cu_seqlens
    turns, is_call = np.zeros(int(bounds[-1]), np.int64), np.zeros(int(bounds[-1]), np.bool_)
    for start, (of_turn, of_call) in zip(bounds.tolist(), parts, strict=False):
        turns[start : start + of_turn.size], is_call[start : start + of_call.size] = (
            of_turn,
            of_call,
        )
    mine = zigzag_indices(
        bounds, context_size=layout.context_size, context_rank=rank.context_rank
    ).numpy()
    rows = mine[pack.rows.numpy()]
    return turns[rows], is_call[rows]


class Counted:
    """A softmax of the head that also tells whether each label is the likeliest token."""

    def __init__(self, softmax: Any, context: SupervisedRows, width: int) -> None:
        assert context.hits is not None, "rows of a validation set have a list of hits"
        self._softmax, self._hits = softmax, context.hits
        first = parallel_state.get_tensor_model_parallel_rank() * width
        self._first, self._num_real = first, max(0, min(width, context.vocab_size - first))

    def __call__(
        self, logits: torch.Tensor, local: torch.Tensor, is_here: torch.Tensor, **options: Any
    ) -> Any:
        """See `loss._softmax_of`. Of several tokens with the largest logit the first counts."""
        real = logits[:, : self._num_real]
        none = torch.full((len(logits), 1), -1, device=logits.device)
        if self._num_real:
            best, place = real.max(dim=1, keepdim=True)
            best = best.float()
        else:
            best, place = none.float().fill_(-torch.inf), none
        largest = over_tensor_ranks(best.clone(), dist.ReduceOp.MAX)
        beyond = torch.iinfo(torch.int64).max
        winner = torch.where(best == largest, place + self._first, beyond)
        winner = over_tensor_ranks(winner, dist.ReduceOp.MIN)
        is_hit = is_here & (winner == local + self._first)
        # One tensor rank has the label.
        self._hits.append(over_tensor_ranks(is_hit.int(), dist.ReduceOp.MAX)[:, 0].bool())
        return self._softmax(logits, local, is_here, **options)
