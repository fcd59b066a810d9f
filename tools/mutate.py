#!/usr/bin/env python3
"""Which small faults in the code would no test notice? One mutant at a time, on a copy of the tree.

    python tools/mutate.py                            # all targets, ten minutes
    python tools/mutate.py packing epochs --seconds 300

A mutant differs from a module in one place: an operator, a comparison, a constant, a condition or
a statement that is left out. It is killed if a test of that module fails, and else it survives and
is printed. Asserts and texts are left alone. Mutants are taken in a seeded random order, so that a
run that is out of time has tried some of every function.
"""

import argparse
import ast
import contextlib
import copy
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Tests of the engine run on ranks and are called slow; most of that is what a rank imports, which
# forked ranks have. Compiling is slow whatever is imported.
_WITH_RANKS = ("-m", "slow or not slow", "-k", "not compiled")
# Module -> the tests that cover it, as arguments of pytest.
TARGETS = {
    "roll_sft/data/steps/packing.py": ["tests/data/steps/test_packing.py"],
    "roll_sft/data/steps/plan.py": ["tests/data/steps/test_plan.py"],
    "roll_sft/data/steps/epochs.py": [
        "tests/data/steps/test_epochs.py",
        "tests/data/steps/test_shuffle.py",
    ],
    "roll_sft/data/steps/batch.py": ["tests/data/steps/test_batch.py"],
    "roll_sft/data/steps/learning_rate.py": ["tests/data/steps/test_learning_rate.py"],
    "roll_sft/data/chat/mask.py": ["tests/data/chat/test_mask.py"],
    "roll_sft/data/chat/fast/answer_markers.py": [
        "tests/data/chat/test_mask.py",
        "tests/data/chat/test_chat.py",
    ],
    "roll_sft/engine/loss.py": ["tests/engine/test_head.py", *_WITH_RANKS],
    "roll_sft/engine/micro_batch.py": [
        "tests/engine/test_micro_batch.py",
        "tests/engine/test_attention.py",
        *_WITH_RANKS,
    ],
    "roll_sft/base/metrics.py": ["tests/base/test_metrics.py"],
}
COPIED = ("roll_sft", "tests", "conf", "pyproject.toml")
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.Mod: ast.Add, ast.Pow: ast.Mult, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or,
    ast.Or: ast.And,
}  # fmt: skip
SKIPPED_FIELDS = ("annotation", "returns", "decorator_list", "type_params")


@dataclass(frozen=True)
class Mutant:
    """`source` is the whole module with one change, in `line`."""

    path: str
    line: int
    change: str
    source: str


@dataclass
class Trial:
    """The process that tests a mutant in the copy `folder`."""

    mutant: Mutant
    folder: Path
    process: int
    deadline: float


def main() -> int:
    """Try mutants until there are no more or the time is over; print those that survive."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", help="parts of the paths of modules; default: all")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    paths = [path for path in TARGETS if any(name in path for name in options.modules or [""])]
    mutants = [mutant for path in paths for mutant in mutants_of(path)]
    random.Random(options.seed).shuffle(mutants)
    import_what_tests_need()
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        folders = [copy_of_tree(Path(scratch) / str(number)) for number in range(options.jobs)]
        slowest = {path: check_unchanged(path, folders[0]) for path in paths}
        survivors, tried = run(mutants, folders, slowest, seconds=options.seconds)
    for mutant in sorted(survivors, key=lambda each: (each.path, each.line)):
        print(f"{mutant.path}:{mutant.line}: {mutant.change}")
    print(f"{len(survivors)} of {tried} mutants survive; there are {len(mutants)}")
    return 0


def run(
    mutants: list[Mutant], folders: list[Path], slowest: dict[str, float], *, seconds: float
) -> tuple[list[Mutant], int]:
    """The mutants that no test notices, and how many were tried within `seconds`."""
    free, trials, waiting = list(folders), list[Trial](), list(reversed(mutants))
    survivors, end = list[Mutant](), time.monotonic() + seconds
    while trials or (waiting and time.monotonic() < end):
        while free and waiting and time.monotonic() < end:
            trials.append(start(waiting.pop(), free.pop(), slowest))
        time.sleep(0.05)
        for trial in list(trials):
            is_late = time.monotonic() > trial.deadline
            if is_late:  # an endless loop: killed as well
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(trial.process, signal.SIGKILL)
            ended, status = os.waitpid(trial.process, 0 if is_late else os.WNOHANG)
            if ended:
                path = trial.mutant.path
                (trial.folder / path).write_bytes((ROOT / path).read_bytes())
                trials.remove(trial)
                free.append(trial.folder)
                if status == 0:
                    survivors.append(trial.mutant)
    return survivors, len(mutants) - len(waiting)


def start(mutant: Mutant, folder: Path, slowest: dict[str, float]) -> Trial:
    """Begin the tests of `mutant` in `folder`."""
    (folder / mutant.path).write_text(mutant.source, encoding="utf-8")
    deadline = time.monotonic() + 10 + 5 * slowest[mutant.path]
    return Trial(mutant, folder, fork_tests(mutant.path, folder), deadline)


def check_unchanged(path: str, folder: Path) -> float:
    """Seconds that the tests of the module `path` take; ends the program where they fail."""
    started = time.monotonic()
    _, status = os.waitpid(fork_tests(path, folder), 0)
    if status:
        sys.exit(f"{path}: {' '.join(TARGETS[path])} fails without a mutant; mend it first")
    return time.monotonic() - started


def fork_tests(path: str, folder: Path) -> int:
    """The process, and group of processes, that runs the tests of the module `path` in `folder`."""
    if process := os.fork():
        return process
    os.setsid()
    os.chdir(folder)
    sys.path[:] = [str(folder), *(each for each in sys.path if each not in ("", str(ROOT)))]
    os.environ["PYTHONPATH"] = str(folder)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True  # two mutants of one second and size would share a .pyc
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    import pytest

    flags = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:warnings"]
    os._exit(pytest.main([*flags, *TARGETS[path]]))


def import_what_tests_need() -> None:
    """Once, before any fork; nothing of ours, which each process reads from its copy."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["RANKS_START_BY"] = "fork"
    import hypothesis  # noqa: F401
    import megatron.core.models.gpt  # noqa: F401
    import numpy as np  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401


def copy_of_tree(folder: Path) -> Path:
    """The tracked files that tests read, in the new `folder`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", *COPIED], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def mutants_of(path: str) -> Iterator[Mutant]:
    """Every mutant of the module `path`."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for number, node in enumerate(walk(tree)):
        for field, value in edits(node):
            mutated = copy.deepcopy(tree)
            twin = next(itertools.islice(walk(mutated), number, None))
            setattr(twin, field, value)
            change = f"{shortened(node)}  ->  {shortened(twin)}"
            source = ast.unparse(ast.fix_missing_locations(mutated))
            yield Mutant(path, getattr(node, "lineno", 0), change, source)


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and all below it that may be mutated."""
    if isinstance(node, ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in SKIPPED_FIELDS:
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST):
                yield from walk(each)


def edits(node: ast.AST) -> Iterator[tuple[str, object]]:
    """The single changes of `node`: a field and its new value."""
    if isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            swapped = SWAPS[type(operator)]()
            yield "ops", [*node.ops[:number], swapped, *node.ops[number + 1 :]]
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        yield "op", SWAPS[type(node.op)]()
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "value", not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "value", node.value + 1
        yield "value", node.value - 1
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "test", ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "value", ast.Constant(None)  # the statement is left out


def shortened(node: ast.AST) -> str:
    """The first line of the code of `node`."""
    line = ast.unparse(node).partition("\n")[0]
    return line if len(line) <= 70 else f"{line[:67]}..."


if __name__ == "__main__":
    sys.exit(main())
