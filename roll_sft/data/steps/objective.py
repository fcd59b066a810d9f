"""What a step minimises where that is not the mean loss of supervised tokens.

The objective of a step is a sum over its samples i, of the loss l of their supervised tokens t:

    token_mean:   sum w_i sum_t l / sum w_i n_i      n_i: the supervised tokens of sample i
    sample_mean:  sum w_i (sum_t l / n_i) / sum w_i
    sum:          sum w_i sum_t l / number of samples

with the weight w_i of the sample's row, 1 by default. The last one is open-instruct's
`reduce_loss=sum`, which adds up the tokens of a micro-batch and takes the mean over the
micro-batches of a step, where each holds one sample, as Tulu 3 trained. Nothing here depends on the
layout.

Legend: k samples. Weights are float [k], None where all are 1; supervised tokens int [k].
"""

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roll_sft.base.metrics import StepMetrics, StepRecord
from roll_sft.config.schema import TrainConfig

# What a step tells beside the loss of its tokens, in this order: sums over these, as that is.
TOLD = ("objective", "label_smoothing_loss", "z_loss")


def row_factors(
    train: TrainConfig, supervised: NDArray[np.integer], weights: NDArray[np.floating] | None
) -> NDArray[np.float64]:
    """What the loss of a supervised token counts in each sample, [k], before `step_scale`."""
    counted = np.ones(len(supervised)) if weights is None else weights.astype(np.float64)
    return counted / supervised if train.loss == "sample_mean" else counted


def step_scale(
    train: TrainConfig, supervised: NDArray[np.integer], weights: NDArray[np.floating] | None
) -> float:
    """Supervised tokens of a step with these samples over its denominator.

    The engine divides by the supervised tokens.
    """
    if train.loss_reduction == "sum":
        denominator = float(len(supervised))
    else:
        denominator = float((row_factors(train, supervised, weights) * supervised).sum())
    return float(supervised.sum(dtype=np.int64)) / denominator


def with_more(record: StepRecord, result: StepMetrics, *, skipped: str | None) -> dict[str, Any]:
    """The line of `steps.jsonl` of a step that tells more: of experts, or the values of TOLD.

    These are means over the supervised tokens. `skipped` is why the step made no update.
    """
    line = asdict(record)
    if result.experts is not None:
        line |= {name: each for name, each in asdict(result.experts).items() if each is not None}
    elif result.told:
        means = [value / result.supervised_tokens for value in result.told]
        line |= zip(TOLD, means, strict=True)
    return line if skipped is None else {**line, "skipped": skipped}
