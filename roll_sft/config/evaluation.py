"""The section `evaluation`, of prompts that are answered while the model is trained."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from roll_sft.base.text import is_hostile, shown
from roll_sft.config.keys import key

if TYPE_CHECKING:
    from roll_sft.config.schema import RunConfig

_ALLOWED_IN_PROMPTS = "\t\n\r"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource:
    """The keys of each source in evaluation.prompts."""

    path: str | None = key(None, "As of a source in data.train; required.")
    name: str | None = key(None, "Name in errors; null takes the last part of the path.")
    split: str | None = key(None, "Split to read of a dataset that has several.")
    samples: int | None = key(
        None, "Rows to take, from the first; null takes all.", unit="rows", at_least=1
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Prompts that the model answers during training, and metrics."""

    prompts: list[PromptSource | str] = key(
        [],
        "Answered every train.eval_steps and at the end: user messages, and sources whose answers"
        " become references.",
    )
    metric_fn: str | None = key(
        None,
        "Metric of yours, as module.name, called with samples, prompts, outputs and references.",
    )
    metric_modules: list[str] = key(
        ["roll_sft_metrics"],
        "Modules, and packages of modules, that metric_fn may be imported from.",
    )
    max_new_tokens: int = key(
        128, "Longest answer; it ends earlier with the end of the turn.", unit="tokens", at_least=1
    )
    temperature: float = key(
        0.0,
        "0 takes the likeliest token; above 0 tokens are drawn, by seed.",
        at_least=0,
        at_most=100,
    )
    top_p: float = key(
        1.0,
        "Draw of the likeliest tokens that together have this probability.",
        above=0,
        at_most=1,
    )
    top_k: int = key(0, "Draw of so many likeliest tokens; 0 of all.", unit="tokens", at_least=0)
    deadline_s: float = key(
        600.0,
        "Longest time of one evaluation's answers; what is not finished by then is cut.",
        unit="seconds",
        above=0,
        at_most=1e7,
    )


def evaluation_problems(config: "RunConfig") -> Iterator[str]:
    """What is wrong with `config.evaluation`."""
    evaluation, default = config.evaluation, EvaluationConfig()
    for index, entry in enumerate(evaluation.prompts):
        if problem := _prompt_problem(entry):
            yield f"evaluation.prompts[{index}]{problem}"
    if not evaluation.prompts:
        for item in fields(evaluation):
            if getattr(evaluation, item.name) != getattr(default, item.name):
                yield (
                    f"evaluation.{item.name}: {shown(getattr(evaluation, item.name))} has no effect"
                    " without evaluation.prompts; give some, or leave it out"
                )
        return
    for name in ("top_p", "top_k"):
        value = getattr(evaluation, name)
        if evaluation.temperature == 0 and value != getattr(default, name):
            yield (
                f"evaluation.{name}: {value} has no effect with evaluation.temperature=0, which"
                " takes the likeliest token; raise the temperature, or leave it out"
            )
    yield from _metric_problems(evaluation)


def _prompt_problem(entry: PromptSource | str) -> str | None:
    if isinstance(entry, PromptSource):
        return None if entry.path else ".path: missing; give a file, a folder or a hub dataset"
    if not entry.strip():
        return ": empty; write a user message, or leave it out"
    if any(is_hostile(letter) for letter in entry if letter not in _ALLOWED_IN_PROMPTS):
        return f": {shown(entry)} has control characters; remove them"
    return None


def _metric_problems(evaluation: EvaluationConfig) -> Iterator[str]:
    name, allowed = evaluation.metric_fn, evaluation.metric_modules
    if name is None:
        return
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", name):
        yield f"evaluation.metric_fn: {shown(name)} is not module.name, such as my_metrics.score"
    elif not any(name.startswith(f"{module}.") for module in allowed):
        module = name.rpartition(".")[0]
        yield (
            f"evaluation.metric_fn: {shown(name)} is in none of evaluation.metric_modules"
            f" ({', '.join(allowed) or 'none is given'}); add {module} there if you trust its code"
        )
