"""The kinds of fuzzing, and how a case of one is run."""

import random
import shutil
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.utils.logging import disable_progress_bar

from tests.fuzz import adapters, checkpoints, configurations, data_files, models
from tests.fuzz.case import inside

KINDS: dict[str, ModuleType] = {
    "configurations": configurations,
    "data": data_files,
    "checkpoints": checkpoints,
    "models": models,
    "adapters": adapters,
}


@dataclass(frozen=True)
class Result:
    """A case that was run: what it was, and what is wrong."""

    what: str
    faults: list[str]


def build(home: Path, names: Iterable[str]) -> None:
    """What the cases of these kinds share, each in its folder of `home`."""
    disable_progress_bar()
    for name in names:
        (home / name).mkdir(parents=True)
        KINDS[name].build(home / name)


def build_in_child(home: Path, names: Iterable[str], context: BaseContext) -> None:
    """The same in a process that ends, so that this one can be forked again and again."""
    child: Any = context.Process(target=build, args=(home, list(names)))
    child.start()
    child.join()
    assert child.exitcode == 0, "the assets could not be made"


def run_case(kind: str, seed: int, home: Path, *, process: bool = False) -> Result:
    """Make the case of `kind` and `seed`, run it, and clear what it left."""
    folder = home / "case"
    shutil.rmtree(folder, ignore_errors=True)
    with inside(folder):
        what = "a case that could not be made"
        try:
            case = KINDS[kind].case(random.Random(f"{kind}:{seed}"), home / kind)
            what = case.what
            faults = case.run_process() if process else case.run()
        except Exception as error:  # noqa: BLE001 -- of the harness, or of a door that let it through
            faults = [f"{type(error).__name__}: {error}", traceback.format_exc()[-1500:]]
    return Result(what, faults)
