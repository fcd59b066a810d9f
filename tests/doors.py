"""The main job's door for tests: called in this process, or as a process, and what came of it.

A test module takes a fixture over by giving it a name of its own, as in `door = doors.door`.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import roll_sft.run
from roll_sft import stages
from roll_sft.config.schema import RunConfig
from roll_sft.preparing import prepare_into
from tests.outcome import Outcome
from tests.parity import write_model

NUM_ROWS = 70


Door = Callable[..., Outcome]


@contextlib.contextmanager
def prepares_here(config: RunConfig, folder: Path) -> Iterator[Callable[[], None]]:
    """`preparing` in this process, which imports what it needs once for many runs."""
    yield lambda: prepare_into(config, folder)


def starts_nothing(*_: object, **__: object) -> Any:
    """`cluster.starting` for a run that needs no Ray."""
    return contextlib.nullcontext(lambda: None)


@pytest.fixture
def door(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Door]:
    """`main` in this process, in an empty folder, without Ray; what it changes is put back."""

    def no_ray(*_: object, **__: object) -> None:
        raise RuntimeError("Ray was started")  # which is reported as a `ResourceError`

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = roll_sft.run.main([*arguments])
        return Outcome(code, *capsys.readouterr())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", no_ray)
    monkeypatch.setattr(stages, "preparing", prepares_here)
    environment, logger = dict(os.environ), logging.getLogger("roll_sft")
    kept = (signal.getsignal(signal.SIGTERM), logger.handlers[:], logger.level, logger.propagate)
    yield call
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, kept[0])
    logger.handlers[:], logger.level, logger.propagate = kept[1:]


def process(folder: Path, *arguments: str, **environment: str) -> Outcome:
    """`python -m roll_sft.run` as the user starts it."""
    result = subprocess.run(
        [sys.executable, "-m", "roll_sft.run", *arguments],
        cwd=folder,
        env={**os.environ, "HOME": str(folder), "RAY_TMPDIR": str(folder / "ray"), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return Outcome(result.returncode, result.stdout, result.stderr)


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def alpaca(number: int) -> dict[str, str]:
    return {"instruction": f"Say {number}.", "input": "", "output": f"It is {number}. " * 3}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, bare/ (a model's config.json alone) and rows.jsonl."""
    folder = tmp_path_factory.mktemp("assets")
    write_model(folder / "model", kind="qwen2-tied", num_layers=2)
    (folder / "bare").mkdir()
    shutil.copy(folder / "model" / "config.json", folder / "bare")
    write_rows(folder / "rows.jsonl", [alpaca(number) for number in range(NUM_ROWS)])
    return folder


@pytest.fixture
def arguments(assets: Path, tmp_path: Path) -> list[str]:
    """What every run of the small model needs."""
    return [
        f"model.path={assets / 'model'}",
        f"data.train=[{{path: {assets / 'rows.jsonl'}}}]",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.sequence_length=100",
        "tracking.backends=[jsonl]",
        "parallel.device=cpu",
    ]


def refused(outcome: Outcome, code: int, *parts: str) -> None:
    """Exit code, no traceback, and a last line with all `parts`."""
    assert outcome.code == code, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert "Error executing job" not in outcome.stderr
    for part in parts:
        assert part in outcome.last_line


def cells(text: str, first: str) -> list[str]:
    """The cells of the table row whose first cell is `first`."""
    (line,) = [line for line in text.splitlines() if line.split("\u2502")[0].strip() == first]
    return [cell.strip() for cell in line.split("\u2502")]
