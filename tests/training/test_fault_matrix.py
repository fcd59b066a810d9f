"""Every fault of a rank in every phase, of the driver and of the converter, in real runs.

Each run proves that its fault happened, ends as an undisturbed run, and leaves nothing behind. A
line for each is printed (`-s` shows it): detected after, back at work after, steps lost.
"""

import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from roll_sft.base.files import json_lines
from roll_sft.runtime.faults import happened
from tests.exact import exact
from tests.leftovers import check_nothing_left
from tests.parity import write_model, write_rows
from tests.runtime.ray_cluster import Program
from tests.soak.stops import STEPS, Runs, has_child

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(600)]

DEADLINE_S = 10.0  # of every phase, in runs whose ranks are stopped
GRACE_S = 5.0  # from the deadline until the driver knows
BACK_S = 10.0  # the goal from the death of a rank to the next step, on an idle machine
PHASES = ("step", "evaluation", "checkpoint", "setup")
# Steps with an evaluation, with a save, and with neither, see `Runs`.
STEP_OF = {"step": 9, "evaluation": 8, "checkpoint": 12, "setup": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("matrix")
    write_model(folder / "model", kind="qwen2-tied", num_layers=2)
    write_rows(folder / "rows.jsonl", num_rows=40)
    found = Runs(folder)
    finish(found.start("whole"), code=0)
    return found


@pytest.fixture(autouse=True)
def nothing_left(runs: Runs, request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    output = runs.folder / name_of(request.node.name)
    if output.exists():
        check_nothing_left(output)


def name_of(test: str) -> str:
    return "".join(each if each.isalnum() else "_" for each in test)


def finish(program: Program, *, code: int) -> None:
    try:
        assert program.wait(timeout_s=300) == code, program.errors
    finally:
        program.close()


def check_same(runs: Runs, name: str) -> None:
    mine, theirs = (exact(runs.lines(each)) for each in (name, "whole"))
    assert len(mine) == STEPS
    assert mine == theirs


def planted(runs: Runs, name: str, fault: str) -> tuple[float, float, int]:
    """Run with a fault: seconds until it was found, until work went on, and steps lost."""
    deadlines = [f"cluster.{each}_timeout_s={DEADLINE_S}" for each in ("step", "checkpoint")]
    # The set-up loads libraries, which takes long where many tests share a machine.
    deadlines.append(f"cluster.setup_timeout_s={3 * DEADLINE_S}")
    keys = [*deadlines, f"debug.faults=[{{{fault}}}]", "checkpoint.hf_export=none"]
    finish(runs.start(name, *keys), code=0)
    mark = happened(runs.folder / name, 0)
    assert mark.exists(), "the fault did not happen"
    (restart,) = json_lines(runs.folder / name / "restarts.jsonl")
    detected_s = restart["time"] - mark.stat().st_mtime
    back_s, lost = detected_s + restart["seconds"], restart["step"] - 1 - restart["from_step"]
    print(f"\n{fault:<50} found {detected_s:5.1f} s  back {back_s:5.1f} s  lost {lost}")
    check_same(runs, name)
    return detected_s, back_s, lost


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", PHASES)
def test_a_rank_that_is_killed(
    runs: Runs, where: str, rank: int, request: pytest.FixtureRequest
) -> None:
    fault = f"kind: kill, rank: {rank}, where: {where}, step: {STEP_OF[where]}"
    detected_s, _, lost = planted(runs, name_of(request.node.name), fault)
    assert detected_s < DEADLINE_S, "a death is found without a deadline"
    assert lost <= 6


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", PHASES)
def test_a_rank_that_is_stopped(
    runs: Runs, where: str, rank: int, request: pytest.FixtureRequest
) -> None:
    fault = f"kind: stop, rank: {rank}, where: {where}, step: {STEP_OF[where]}"
    detected_s, _, lost = planted(runs, name_of(request.node.name), fault)
    assert detected_s < (3 if where == "setup" else 1) * DEADLINE_S + GRACE_S
    assert lost <= 6


def test_the_driver_that_is_killed(runs: Runs, request: pytest.FixtureRequest) -> None:
    name = name_of(request.node.name)
    program = runs.start(name)
    try:
        program.wait_until(lambda: len(runs.lines(name)) >= 9, timeout_s=120, what="nine steps")
        program.signal(signal.SIGKILL)
        began = time.monotonic()
        assert program.wait(timeout_s=60) == -signal.SIGKILL
    finally:
        program.close()
    gone_s, reached = time.monotonic() - began, len(runs.lines(name))
    assert reached < STEPS
    lost = reached - runs.saved(name)
    finish(runs.start(name), code=0)
    print(f"\n{'kill of the driver':<50} gone {gone_s:5.1f} s  lost {lost}")
    check_same(runs, name)


def test_the_converter_that_is_killed(runs: Runs, request: pytest.FixtureRequest) -> None:
    name, module = name_of(request.node.name), "roll_sft.convert.command"
    program = runs.start(name)
    try:
        program.wait_until(lambda: has_child(program, module), timeout_s=180, what="the export")
        for process in program.left:
            try:
                if module in process.cmdline():
                    process.kill()
            except psutil.Error:
                continue
        code = program.wait(timeout_s=60)
    finally:
        program.close()
    assert code not in (0, 1), program.errors
    assert not (runs.folder / name / "hf").exists(), "a partial export has the final name"
    assert "Traceback" not in program.errors
    finish(runs.start(name), code=0)
    assert (runs.folder / name / "hf" / "config.json").exists()
    check_same(runs, name)
