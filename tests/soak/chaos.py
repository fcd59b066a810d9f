"""Random faults for ten minutes: kills and stops of what a run consists of, and new layouts.

A command is started again and again, each time on a layout drawn by chance, until its run is whole.
Victims are ranks, ranks that are writing a checkpoint, the driver and the process that converts. A
driver or a converter that is stopped goes on after some seconds; a stopped rank is for the watchdog
to find. In the end the weights are those of a run that nobody disturbed, as far as layouts agree:
their distance is a small part of the way that training has gone. `--seconds` is how long faults
happen, `--seed` draws them again.
"""

import argparse
import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from tests.leftovers import check_nothing_left, workers_of
from tests.parity import write_model, write_rows
from tests.runtime.ray_cluster import Program, is_alive

STEPS, SAVE_STEPS = 120, 8
LAYOUTS = {
    "DP2": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
}
VICTIMS = ("rank", "rank", "writer", "driver", "converter")
# Layouts differ in the order of sums. No bias: the gradient of a key's bias is noise alone.
KIND, TOLERANCE = "llama", 1e-3
TIMEOUT_S = 600.0
DEADLINE_S = 8.0  # of a step and of a save: how long a stopped rank stays unnoticed
WARM_S, MOST_PAUSE_S = 1.0, 6.0
STOPPED_S = 3.0


@dataclass
class Tally:
    """What happened."""

    faults: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    largest_distance: float = 0.0


def main(folder: Path, arguments: Sequence[str]) -> None:
    """Rounds of one run each, until the time is over."""
    parser = argparse.ArgumentParser(prog="make soak ARGS=chaos")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args(arguments)
    print(f"chaos: {options.seconds:g} s, --seed {options.seed}", flush=True)
    write_model(folder / "model", kind=KIND, num_layers=2)
    write_rows(folder / "rows.jsonl", num_rows=40)
    chance, tally = random.Random(options.seed), Tally()
    whole = start(folder, "whole", "DP2")
    try:
        assert whole.wait(timeout_s=TIMEOUT_S) == 0, whole.errors
    finally:
        whole.close()
    ends = time.monotonic() + options.seconds
    while tally.rounds == 0 or time.monotonic() < ends:
        name = f"round_{tally.rounds}"
        one_round(folder, name, chance, tally, ends=ends)
        tally.rounds += 1
        distance = distance_of(folder, name)
        tally.largest_distance = max(tally.largest_distance, distance)
        assert distance < TOLERANCE, f"{name}: the weights differ by {distance:.2g} of the way"
        check_nothing_left(folder / name)
    show(tally)
    assert tally.faults.total() > 0, "no fault happened"


def start(folder: Path, name: str, layout: str) -> Program:
    """The command of the run `name` on `layout`."""
    keys = {
        "output_dir": folder / name,
        "model.path": folder / "model",
        "data.train": f"[{{path: {folder / 'rows.jsonl'}}}]",
        "data.cache_dir": folder / "cache",
        "data.sequence_length": 200,
        "train.global_batch_size": 4,
        "train.max_steps": STEPS,
        "train.save_steps": SAVE_STEPS,
        "train.learning_rate": 1e-3,
        "checkpoint.async_save": "true",
        "checkpoint.hf_export": "every_save",
        "parallel.num_workers": 2,
        "parallel.device": "cpu",
        "tracking.backends": "[jsonl]",
        "cluster.step_timeout_s": DEADLINE_S,
        "cluster.checkpoint_timeout_s": DEADLINE_S,
        "cluster.max_restarts": 100,
        **{f"parallel.{key}": value for key, value in LAYOUTS[layout].items()},
    }
    arguments = [f"{key}={value}" for key, value in keys.items()]
    return Program("-m", "roll_sft.run", *arguments, folder=folder)


def one_round(folder: Path, name: str, chance: random.Random, tally: Tally, *, ends: float) -> None:
    """Give the command of the run `name` until it ends with 0."""
    while True:
        layout, before = chance.choice([*LAYOUTS]), tally.faults.total()
        tally.layouts[layout] += 1
        program = start(folder, name, layout)
        try:
            while time.monotonic() < ends and not _is_over(program, chance):
                disturb(program, folder / name, chance, tally)
            code = program.wait(timeout_s=TIMEOUT_S)
        finally:
            program.close()
        tally.codes[code] += 1
        print(f"{name} on {layout}: exit {code}, {_last_line(program)}", flush=True)
        if code == 0:
            return
        # The driver was killed, or the last export; or a step failed three times, as chance has it.
        assert code in (-signal.SIGKILL, 6, 7), program.errors
        assert tally.faults.total() > before, f"exit {code} without a fault: {program.errors}"


def disturb(program: Program, output: Path, chance: random.Random, tally: Tally) -> None:
    """One fault, if its victim is there."""
    victim = chance.choice(VICTIMS)
    found = processes_of(victim, program, output)
    if not found:
        return
    sent = chance.choice((signal.SIGKILL, signal.SIGSTOP))
    process = chance.choice(sorted(found, key=lambda each: each.pid))
    try:
        process.send_signal(sent)
    except psutil.NoSuchProcess:
        return
    tally.faults[f"{sent.name} of {victim}"] += 1
    if sent == signal.SIGSTOP and victim in ("driver", "converter"):
        time.sleep(STOPPED_S)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


def processes_of(victim: str, program: Program, output: Path) -> list[psutil.Process]:
    """The processes that `victim` names and that are there."""
    if victim == "driver":
        # Before its first steps a driver would only ever start.
        return [program.process] if (output / "steps.jsonl").exists() else []
    if victim == "converter":
        return [each for each in program.left if _runs(each, "roll_sft.convert.command")]
    if victim == "writer" and not any((output / "checkpoints").glob(".staging_*")):
        return []
    return workers_of(output)


def distance_of(folder: Path, name: str) -> float:
    """How far the weights of a run are from the undisturbed run's, over the way that those went."""
    begun, whole, mine = (
        load_file(folder / place / "model.safetensors")
        for place in ("model", "whole/hf", f"{name}/hf")
    )
    assert mine.keys() == whole.keys()
    off = sum(float((mine[key] - whole[key]).double().square().sum()) for key in whole)
    way = sum(float((begun[key] - whole[key]).double().square().sum()) for key in whole)
    assert all(bool(torch.isfinite(each).all()) for each in mine.values())
    return float((off / way) ** 0.5)


def show(tally: Tally) -> None:
    """The summary."""
    print(f"rounds that ended with equal weights: {tally.rounds}")
    print(f"largest distance of weights, over the way: {tally.largest_distance:.2g}")
    for title, counts in (
        ("faults", tally.faults),
        ("layouts of commands", tally.layouts),
        ("exit codes", tally.codes),
    ):
        print(f"{title}: " + ", ".join(f"{key} {counts[key]}" for key in sorted(counts)))


def _is_over(program: Program, chance: random.Random) -> bool:
    """Whether the program ends before the next fault is due."""
    due = time.monotonic() + WARM_S + chance.random() * MOST_PAUSE_S
    while time.monotonic() < due:
        if not _is_running(program):
            return True
        time.sleep(0.05)
    return False


def _is_running(program: Program) -> bool:
    try:
        return is_alive(program.process)
    except psutil.NoSuchProcess:
        return False


def _runs(process: psutil.Process, module: str) -> bool:
    try:
        return module in process.cmdline()
    except psutil.Error:
        return False


def _last_line(program: Program) -> str:
    return (program.errors.strip().splitlines() or ["no message"])[-1]
