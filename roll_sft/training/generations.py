"""Evaluation by generation, at the driver: ask the workers, have the answers read, write it down.

Promise: whatever a metric does, the run goes on; a metric that is lost is named in a warning.
"""

import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from roll_sft.base.generation import Generated, GenerationRequest
from roll_sft.base.text import printable
from roll_sft.evaluation.measure import measured
from roll_sft.job.job import Job
from roll_sft.job.prepared import ASSETS, PROMPTS_FILE
from roll_sft.runtime.group import WorkerGroup
from roll_sft.training.records import Records
from roll_sft.training.run_folder import JOB

LOG = logging.getLogger(__name__)
NAME = "generation"  # of its lines in eval.jsonl
_LEAST_SCORING_S = 60.0  # a short deadline of answers must not cost what there is of them
_SHOWN = 4  # metrics on the console


def evaluate_answers(job: Job, group: WorkerGroup, records: Records, *, step: int) -> None:
    """Answer `evaluation.prompts` with the weights after `step`, and record what comes of it."""
    started = time.perf_counter()
    folder = records.folder / JOB
    prompts: list[dict[str, Any]] = json.loads((folder / PROMPTS_FILE).read_text(encoding="utf-8"))
    answers = _answers(job, group, _request(job, folder, prompts), step=step)
    late = sum(each.is_late for each in answers)
    if late:
        LOG.warning(
            "step %d: %d of %d answers were cut by evaluation.deadline_s %g; raise it, give fewer"
            " prompts, or lower evaluation.max_new_tokens",
            step,
            late,
            len(answers),
            job.config.evaluation.deadline_s,
        )
    outputs, metrics = _measured(job, folder, prompts, answers)
    lines = [
        {
            "step": step,
            "index": index,
            "prompt": each["prompt"],
            "output": output,
            "reference": each["reference"],
            "metrics": {
                name: values[index] for name, values in metrics.items() if isinstance(values, list)
            },
        }
        for index, (each, output) in enumerate(zip(prompts, outputs, strict=True))
    ]
    means = {name: mean for name, value in metrics.items() if (mean := _mean(value)) is not None}
    line = {
        "step": step,
        "name": NAME,
        "prompts": len(prompts),
        "generated_tokens": sum(len(each.ids) for each in answers),
        "time_s": time.perf_counter() - started,
        "metrics": means,
    }
    records.generations(lines, line)
    told = "  ".join(f"{name} {value:.4g}" for name, value in [*means.items()][:_SHOWN])
    LOG.info("step %d/%d  eval/%s %s", step, job.total_steps, NAME, told)


def _request(job: Job, folder: Path, prompts: Sequence[Mapping[str, Any]]) -> GenerationRequest:
    evaluation = job.config.evaluation
    # The tokens that end an answer of the exported model.
    generation = json.loads((folder / ASSETS / "generation_config.json").read_text("utf-8"))
    stops = generation.get("eos_token_id")
    return GenerationRequest(
        tuple(tuple(each["ids"]) for each in prompts),
        tuple(stops) if isinstance(stops, list) else () if stops is None else (stops,),
        evaluation.max_new_tokens,
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        top_k=evaluation.top_k,
        seed=job.config.seed,
        deadline_s=evaluation.deadline_s,
    )


def _answers(
    job: Job, group: WorkerGroup, request: GenerationRequest, *, step: int
) -> list[Generated]:
    """The answers in the order of the prompts."""
    of_ranks = group.call(
        "roll_sft.engine.generation.generate:generate",
        request,
        phase=f"generation after step {step}",
        deadline_s=request.deadline_s + job.config.cluster.step_timeout_s,
    )
    answers = [answer for of_rank in of_ranks for answer in of_rank or ()]
    return sorted(answers, key=lambda answer: answer.index)


def _measured(
    job: Job,
    folder: Path,
    prompts: Sequence[Mapping[str, Any]],
    answers: Sequence[Generated],
) -> tuple[list[str], dict[str, Any]]:
    """The texts of the answers, and the metrics of ours and of the user."""
    evaluation, references = job.config.evaluation, [each["reference"] for each in prompts]
    timeout_s = max(evaluation.deadline_s, _LEAST_SCORING_S)
    tokenizer = folder / ASSETS / "tokenizer.json"
    # The token that ends an answer is no part of it, and need not be a special one.
    ids = [each.ids[:-1] if each.is_stopped else each.ids for each in answers]
    scored = _scored({"ids": ids, "references": references}, tokenizer, timeout_s=timeout_s)
    if scored is None:
        return [""] * len(answers), {}
    outputs, metrics = scored["outputs"], scored["metrics"]
    metrics["output_tokens"] = [float(len(each)) for each in ids]
    metrics["stopped"] = [float(each.is_stopped) for each in answers]
    read = [each["text"] for each in prompts]
    texts: dict[str, Any] = {
        "samples": [f"{text}{output}" for text, output in zip(read, outputs, strict=True)],
        "prompts": [each["prompt"] for each in prompts],
        "outputs": outputs,
        "references": references,
    }
    if evaluation.metric_fn is not None:
        task = {**texts, "metric_fn": evaluation.metric_fn}
        metrics |= (_scored(task, tokenizer, timeout_s=timeout_s) or {"metrics": {}})["metrics"]
    if job.metric_fn is not None:
        found, problem = measured(job.metric_fn, len(outputs), **texts)
        metrics |= found
        if problem is not None:
            _warn("metric_fn", problem)
    return outputs, metrics


def _scored(task: Mapping[str, Any], tokenizer: Path, *, timeout_s: float) -> dict[str, Any] | None:
    """What `evaluation/scoring.py` makes of `task`; None, with a warning, if it fails."""
    what = task.get("metric_fn", "the answers")
    with tempfile.TemporaryDirectory(prefix="roll_sft_") as scratch:
        answer = Path(scratch) / "answer.json"
        command = [sys.executable, "-m", "roll_sft.evaluation.scoring", str(answer), str(tokenizer)]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(task).encode(),
                stderr=subprocess.PIPE,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            _warn(what, f"takes more than {timeout_s:g} s")
            return None
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            _warn(what, lines[-1] if lines else f"the process ended with code {done.returncode}")
            return None
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    for name, problem in found["problems"].items():
        _warn(name, problem)
    return found


def _warn(name: str, problem: str) -> None:
    LOG.warning("evaluation: %s is not measured: %s", name, printable(problem))


def _mean(value: float | list[float | None]) -> float | None:
    """The mean of what is known; None if nothing is."""
    if not isinstance(value, list):
        return value
    known = [each for each in value if each is not None]
    return statistics.fmean(known) if known else None
