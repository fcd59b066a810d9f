"""A run that is asked to end in every phase, by a signal to itself and to its group.

After each one nothing of the run is left, and its exit code is 75; the same command then goes on,
and the steps in the end are those of a run that was not stopped.
"""

import itertools
import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.exact import EXACT
from tests.parity import write_model, write_rows
from tests.runtime.ray_cluster import Program

STEPS, SAVE_STEPS, EVAL_STEPS = 24, 6, 4
OTHERS = itertools.cycle((signal.SIGINT, signal.SIGHUP, signal.SIGUSR1))


@dataclass(frozen=True)
class Runs:
    """The runs of one model and its data, in `folder`."""

    folder: Path

    def start(self, name: str, *more: str) -> Program:
        """The command of a run of that name, with `more` arguments."""
        rows = self.folder / "rows.jsonl"
        keys = {
            "output_dir": self.folder / name,
            "model.path": self.folder / "model",
            "data.train": f"[{{path: {rows}}}]",
            "data.validation": f"[{{path: {rows}, name: held_out}}]",
            "data.cache_dir": self.folder / f"cache_{name}",
            "data.sequence_length": 200,
            "train.global_batch_size": 4,
            "train.max_steps": STEPS,
            "train.save_steps": SAVE_STEPS,
            "train.eval_steps": EVAL_STEPS,
            "train.learning_rate": 1e-3,
            "parallel.num_workers": 2,
            "parallel.device": "cpu",
            "tracking.backends": "[jsonl]",
        }
        arguments = [f"{key}={value}" for key, value in keys.items()]
        return Program("-m", "roll_sft.run", *arguments, *more, folder=self.folder)

    def lines(self, name: str) -> list[dict[str, object]]:
        """The lines of the steps of that run."""
        path = self.folder / name / "steps.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def saved(self, name: str) -> int:
        """The step of the newest checkpoint of that run."""
        found = (self.folder / name).glob("checkpoints/step_*")
        return max((int(path.name.removeprefix("step_")) for path in found), default=0)


def has_child(program: Program, module: str) -> bool:
    """Whether a process of `program` runs `module`."""
    for process in program.left:
        try:
            if module in process.cmdline():
                return True
        except psutil.Error:
            continue
    return False


Phase = Callable[[Runs, str, Program], bool]
PHASES: dict[str, Phase] = {
    "preparing": lambda runs, name, program: has_child(program, "roll_sft.preparing"),
    "set-up": lambda runs, name, _: (runs.folder / name / "logs" / "rank_01.log").exists(),
    "step": lambda runs, name, _: len(runs.lines(name)) >= 2,
    "evaluation": lambda runs, name, _: len(runs.lines(name)) == 2 * EVAL_STEPS,
    "save": lambda runs, name, _: any((runs.folder / name).glob("checkpoints/.staging_*")),
    "export": lambda runs, name, program: has_child(program, "roll_sft.convert.command"),
}


def main(folder: Path, _arguments: Sequence[str]) -> None:
    """Stop a run in each phase: by SIGTERM to it, and to its group, and by the other signals."""
    write_model(folder / "model", kind="qwen2-tied", num_layers=2)
    write_rows(folder / "rows.jsonl", num_rows=40)
    runs = Runs(folder)
    whole = runs.start("whole")
    assert whole.wait(timeout_s=600) == 0, whole.errors
    print("phase       to     signal   exit  seconds  steps lost")
    for name in ("pid", "group", "others"):
        for phase, is_there in PHASES.items():
            number = next(OTHERS) if name == "others" else signal.SIGTERM
            _stop(runs, name, phase, is_there, number=number)
        last = runs.start(name)
        assert last.wait(timeout_s=600) == 0, last.errors
        _same_steps(runs.lines(name), runs.lines("whole"))
        assert (folder / name / "hf" / "config.json").exists()


def _stop(runs: Runs, name: str, phase: str, is_there: Phase, *, number: signal.Signals) -> None:
    program = runs.start(name)
    try:
        program.wait_until(lambda: is_there(runs, name, program), timeout_s=300, what=phase)
        began = time.monotonic()
        program.signal(number, whole_group=name == "group")
        code = program.wait(timeout_s=120)
        seconds = time.monotonic() - began
    finally:
        program.close()
    lost = len(runs.lines(name)) - runs.saved(name)
    print(
        f"{phase:<11} {name:<6} {number.name:<8} {code:>4}  {seconds:7.1f}  {lost:>10}"
        f"  {program.errors.splitlines()[-1]}"
    )
    assert code == 75, program.errors
    assert lost == 0, program.errors
    assert "Traceback" not in program.errors, program.errors


def _same_steps(mine: list[dict[str, object]], theirs: list[dict[str, object]]) -> None:
    assert len(mine) == len(theirs) == STEPS
    for one, other in zip(mine, theirs, strict=True):
        assert [one[key] for key in EXACT] == [other[key] for key in EXACT], (one, other)
