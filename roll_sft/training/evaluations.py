"""The lines of `eval.jsonl` that evaluations of a validation set become."""

import math
from pathlib import Path

from roll_sft.base.files import json_lines
from roll_sft.base.metrics import EvalMetrics, EvalRecord

MOST_NATS = 700.0  # past 709 a float overflows


def line_of(
    folder: Path, step: int, name: str, result: EvalMetrics, *, seconds: float
) -> EvalRecord:
    """The record of set `name` after `step`, with the best of those in `folder` and itself.

    It has the parts of the set where there is more than one: several turns, or tool calls.
    """
    values = _means(result)
    known = losses_of(folder, name) | {step: values["loss"]}
    best_step = min(known, key=lambda each: (known[each], each))
    return EvalRecord(
        step=step,
        name=name,
        loss=values["loss"],
        perplexity=values["perplexity"],
        supervised_tokens=result.supervised_tokens,
        time_s=seconds,
        token_accuracy=values["token_accuracy"],
        best_loss=known[best_step],
        best_step=best_step,
        parts={part: _means(each) for part, each in result.parts.items()}
        if len(result.parts) > 1
        else {},
    )


def _means(result: EvalMetrics) -> dict[str, float]:
    """Loss, perplexity and accuracy per supervised token."""
    loss = result.loss_sum / result.supervised_tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, MOST_NATS)),
        "token_accuracy": result.correct_tokens / result.supervised_tokens,
        "supervised_tokens": result.supervised_tokens,
    }


def losses_of(folder: Path, name: str | None) -> dict[int, float]:
    """The loss of validation set `name` by step, from `eval.jsonl`."""
    records = json_lines(folder / "eval.jsonl")
    known = (each for each in records if each["name"] == name and "loss" in each)
    return {each["step"]: each["loss"] for each in known}
