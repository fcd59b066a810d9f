"""The end of a run that is asked to stop while it trains, and what the next command makes up for.

An evaluation that is due after the last step is left out, so that the grace serves the save. It is
noted in the folder of the run, and the same command evaluates before it goes on.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from roll_sft.base.files import json_lines, write_durably, writing
from roll_sft.checkpoint.resume import step_folders, step_of
from roll_sft.data.steps.plan import StepPlan
from roll_sft.job.job import Job
from roll_sft.training.generations import NAME
from roll_sft.training.records import Records
from roll_sft.training.run_folder import CHECKPOINTS, EVALUATION_DUE
from roll_sft.training.saves import Saves


def save_early(job: Job, saves: Saves, records: Records, *, plan: StepPlan, evaluates: bool) -> str:
    """Save the state after `plan`, if it is not saved; returns what the same command does.

    `evaluates` says that an evaluation is due after this step.
    """
    if not job.config.checkpoint.save:
        return (
            f"checkpoint.save=false, so the steps until {plan.step} are lost: the same command"
            " begins again"
        )
    saves.finish()
    if plan.step not in map(step_of, step_folders(records.folder / CHECKPOINTS)):
        if evaluates and _missing(job, records.folder, step=plan.step):
            path = records.folder / EVALUATION_DUE
            with writing(path):
                write_durably(path, f"{plan.step}\n")
        saves.begin(plan)
        saves.finish()
    return saves.what_is_kept()


def make_up_evaluation(folder: Path, job: Job, evaluate: Callable[..., bool], *, step: int) -> bool:
    """`evaluate` the sets that were to be evaluated after `step`, where the run goes on.

    Returns what `evaluate` does: whether the run ends here.
    """
    path, is_stopped = folder / EVALUATION_DUE, False
    if path.read_text(encoding="utf-8").strip() == str(step):
        if missing := _missing(job, folder, step=step):
            sets = {name: each for name, each in job.validation.items() if name in missing}
            is_stopped = evaluate(replace(job, validation=sets), step=step)
        if _missing(job, folder, step=step):
            return is_stopped
    path.unlink()
    return is_stopped


def _missing(job: Job, folder: Path, *, step: int) -> set[str]:
    """The names of what is to be evaluated after `step` and has no line; answers come last."""
    there = {line["name"] for line in json_lines(folder / "eval.jsonl") if line["step"] == step}
    return {*job.validation, *([NAME] if job.config.evaluation.prompts else [])} - there
