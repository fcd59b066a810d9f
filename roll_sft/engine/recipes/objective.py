"""Loss terms of a recipe in the head: factors of samples, label smoothing, z-loss.

Legend: R supervised rows, r rows of a chunk, D hidden size, W columns of the vocabulary on this
tensor rank, V the vocabulary without padding, T tokens of this context rank.

Of a row with logits x, label y, factor f and Z = log sum exp x, over all of V, the head computes

    f * ((1 - e) (Z - x_y) + e (Z - mean x) + c Z^2)

with e `train.label_smoothing`, as in transformers' LabelSmoother and torch's cross_entropy, and c
`train.z_loss_coef`, as in PaLM. Beside the sum of exponentials and the label's logit, tensor ranks
add up the logits themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from roll_sft.base.layout import Coordinate, ParallelLayout
from roll_sft.config.schema import TrainConfig
from roll_sft.data.steps.batch import zigzag_indices
from roll_sft.data.steps.objective import row_factors
from roll_sft.data.tokens.cache import TokenSet
from roll_sft.engine.fused import run_compiled
from roll_sft.engine.loss import HeadLoss, columns_of, over_tensor_ranks
from roll_sft.engine.micro_batch import Indices, MicroBatch, SupervisedRows


@dataclass(slots=True)
class Terms:
    """The terms of a run, the scale of the step that is computed, and what its rows came to."""

    train: TrainConfig
    is_compiled: bool
    scale: float = 1.0
    told: list[torch.Tensor] = field(default_factory=list)  # float32 [4] of each chunk of rows

    def attached(
        self,
        batches: Sequence[MicroBatch],
        indices: Indices,
        tokens: TokenSet,
        *,
        layout: ParallelLayout,
        rank: Coordinate,
    ) -> list[MicroBatch]:
        """`batches` of the samples `indices`, each row with the factor of its sample."""
        attached = []
        for batch, ids in zip(batches, indices, strict=True):
            bounds, chosen = batch.pack.cu_seqlens, np.array(ids, np.int64)
            masks = [int(tokens.sample(each)[1].sum()) for each in ids]
            weights = None if tokens.weights is None else tokens.weights[chosen]
            lengths = bounds.diff().long()
            known = torch.zeros(len(lengths))  # 0 of the padding behind the last sample
            of_samples = row_factors(self.train, np.array(masks, np.int64), weights)
            known[: len(ids)] = torch.from_numpy(of_samples).float()
            mine = zigzag_indices(
                bounds, context_size=layout.context_size, context_rank=rank.context_rank
            )
            factors = known.repeat_interleave(lengths)[mine][batch.pack.rows]
            attached.append(replace(batch, rows=replace(batch.rows, factors=factors)))
        return attached

    def report(self, report: torch.Tensor) -> torch.Tensor:
        """`report`, float64 [sum of rows, tokens], as [loss of tokens, tokens, sums of TOLD]."""
        if not self.told:  # of a validation set, whose rows are losses
            return report
        loss, *sums = torch.stack(self.told).double().sum(0).unbind()
        self.told.clear()
        return torch.stack([loss, report[1], *sums])


def objective_of_rows(
    hidden: torch.Tensor, weight: torch.Tensor, context: SupervisedRows, *, config: Any
) -> torch.Tensor:
    """The objective of each row, float32 [R], as `loss.cross_entropy_of_rows` computes its loss.

    `hidden` [R, D] and `weight` [W, D]; `config` is Megatron's, with the terms.
    """
    terms: Terms = config.loss_terms
    assert context.factors is not None, "rows with terms have factors"
    factors = context.factors * terms.scale
    softmax: Any = _Softmax(terms, factors, context.vocab_size, weight.shape[0])
    if config.variation is not None:
        from roll_sft.engine.variations.logits import changed_softmax

        softmax = changed_softmax(softmax, config)
    losses: torch.Tensor = HeadLoss.apply(
        hidden, weight, context.labels, softmax, config.gradient_accumulation_fusion
    )
    return losses


class _Softmax:
    """The softmax of chunk after chunk of a micro-batch, in the place of `loss._softmax`."""

    def __init__(self, terms: Terms, factors: torch.Tensor, vocab_size: int, width: int) -> None:
        self._terms, self._factors, self._first = terms, factors[:, None], 0
        first = parallel_state.get_tensor_model_parallel_rank() * width
        self._vocab_size, self._num_real = vocab_size, max(0, min(width, vocab_size - first))

    def __call__(
        self,
        logits: torch.Tensor,
        local: torch.Tensor,
        is_here: torch.Tensor,
        *,
        needs_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [r, W], `local` int64 and `is_here` [r, 1] -> objective [r], its gradient."""
        factors = self._factors[self._first : self._first + len(logits)]
        self._first += len(logits)
        train, num_real = self._terms.train, self._num_real
        of_rank, total, added = self._call(logit_sums, [logits], num_real)
        largest = over_tensor_ranks(of_rank.clone(), dist.ReduceOp.MAX)
        picked = (logits.gather(1, local).float() - largest) * is_here
        sums = torch.cat([total * (of_rank - largest).exp(), picked, added], dim=1)
        total, picked, added = over_tensor_ranks(sums, dist.ReduceOp.SUM).split(1, dim=1)
        log_sum = largest + total.log()
        loss = total.log() - picked
        smoothing = train.label_smoothing * (picked - (added / self._vocab_size - largest))
        z_loss = train.z_loss_coef * log_sum.square()
        rows = factors * (loss + smoothing + z_loss)
        self._terms.told.append(
            torch.stack([part.sum() for part in (loss, rows, smoothing, z_loss)])
        )
        if not needs_gradient:
            return rows[:, 0], None
        share = train.label_smoothing
        of_parts = torch.cat(
            [
                factors * (1 + 2 * train.z_loss_coef * log_sum),
                factors * (1 - share),
                factors * (share / self._vocab_size),
            ],
            dim=1,
        )
        per_row = [log_sum, of_parts, torch.where(is_here, local, -1)]
        return rows[:, 0], self._call(objective_gradient, [logits, *per_row], num_real)

    def _call(self, function: Any, rows: list[torch.Tensor], num_real: int) -> Any:
        if self._terms.is_compiled:
            return run_compiled(function, rows, num_real)
        return function(*rows, num_real)


def logit_sums(
    logits: torch.Tensor, num_real: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(largest, sum of exponentials relative to it, sum) of the first `num_real` columns of [r, W].

    Each float32 [r, 1].
    """
    values = logits.float()
    is_real = columns_of(logits) < num_real
    added = values.masked_fill(~is_real, 0.0).sum(dim=1, keepdim=True)
    values = values.masked_fill(~is_real, torch.finfo(torch.float32).min)
    largest = values.amax(dim=1, keepdim=True)
    return largest, (values - largest).exp().sum(dim=1, keepdim=True), added


def objective_gradient(
    logits: torch.Tensor,
    log_sum: torch.Tensor,
    of_parts: torch.Tensor,
    local: torch.Tensor,
    num_real: int,
) -> torch.Tensor:
    """The gradient of the objective by the logits [r, W], in their dtype.

    `of_parts` float32 [r, 3] are the factors of the probabilities, of the label at column `local`
    int64 [r, 1] (-1: in no column), and of every column. `log_sum` is float32 [r, 1].
    """
    columns, (of_softmax, of_label, of_all) = columns_of(logits), of_parts.split(1, dim=1)
    gradient = (logits.float() - log_sum).exp() * of_softmax - of_all
    gradient = gradient - (columns == local).float() * of_label
    return gradient.masked_fill(columns >= num_real, 0.0).to(logits.dtype)
