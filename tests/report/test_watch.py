"""`roll-sft watch`: states of runs told from their files, and what is shown of them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from roll_sft import cli
from roll_sft.report import tail
from roll_sft.report.run_files import RunReader, read_run
from roll_sft.report.state import QUIET_S, State, current_state
from roll_sft.report.terminal_chart import braille, chart
from tests.report.made_run import HOSTILE, make_failed_run, make_run


def state(folder: Path) -> State:
    return current_state(read_run(folder))


def hold(folder: Path, pid: int, host: str | None = None) -> None:
    (folder / ".lock_holder").write_text(f"{host or os.uname().nodename} pid {pid}")


def test_the_state_follows_from_the_end_the_holder_and_the_age_of_the_last_line(
    tmp_path: Path,
) -> None:
    assert state(make_run(tmp_path / "a", num_steps=3)).kind == "finished"
    failed = state(make_failed_run(tmp_path / "b", num_steps=3))
    assert (failed.kind, failed.exit_code) == ("failed", 5)
    for code in (75, 130, 143):
        stopped = state(make_run(tmp_path / f"c{code}", num_steps=3, end=(code, "x")))
        assert (stopped.kind, stopped.exit_code) == ("stopped", code)
    run = make_run(tmp_path / "d", num_steps=3, end=None)
    assert state(run).kind == "unknown"
    hold(run, os.getpid())
    assert state(run).kind == "running"
    assert not state(run).is_over
    long_ago = time.time() - QUIET_S - 60
    for name in ("steps.jsonl", "eval.jsonl", "generations.jsonl"):
        os.utime(run / name, (long_ago, long_ago))
    quiet = state(run)
    assert quiet.kind == "quiet"
    assert "last line 0:06:00 ago" in quiet.text
    hold(run, 4711, host="elsewhere")
    assert state(run).kind == "quiet"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    hold(run, gone.pid)
    assert state(run).kind == "failed"
    for name in ("steps.jsonl", "eval.jsonl", "generations.jsonl"):
        (run / name).unlink()
    hold(run, os.getpid())
    assert state(run).kind == "starting"


def test_one_view_has_the_state_the_last_step_curves_and_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", num_steps=60)
    assert cli.main(["watch", str(run), "--once"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "run  finished (exit code 0)",
        "step 60",
        "s per step",
        "eval/held_out loss",
        "train loss  ",
        "gradient norm  ",
        "step 60  token_f1 0.7",
    ):
        assert part in shown
    assert any("\u2801" <= letter <= "\u28ff" for letter in shown)
    assert max(map(len, shown.splitlines())) <= 120


def test_without_a_terminal_new_steps_are_lines_and_the_end_ends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", num_steps=30, end=(1, HOSTILE))
    assert cli.main(["watch", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == [str(step) for step in range(21, 31)]
    assert lines[-1].startswith("failed: ")
    assert "\x1b" not in lines[-1]
    assert cli.main(["watch", str(tmp_path / "none")]) == 2
    assert "give the output_dir of a run" in capsys.readouterr().err


def test_a_run_is_read_on_and_anew_where_its_files_were_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[bytes]()

    def parsed(line: bytes) -> object:
        read.append(line)
        return json.loads(line)

    monkeypatch.setattr(tail, "parsed", parsed)
    run = make_run(tmp_path / "run", num_steps=30)
    steps = run / "steps.jsonl"
    lines = steps.read_text().splitlines(keepends=True)
    steps.write_text("".join(lines[:20]) + lines[20][:30])  # the last one is being written
    reader = RunReader(run)

    def shown() -> list[float]:
        read.clear()
        found: list[float] = reader.read().step.tolist()
        return found

    def check() -> None:
        found, whole = reader.read(), read_run(run)
        assert found.steps.keys() == whole.steps.keys()
        for key, column in whole.steps.items():
            np.testing.assert_array_equal(found.steps[key], column)
        assert (found.evals, found.experts) == (whole.evals, whole.experts)

    assert shown() == [*range(1, 21)]
    assert len(read) > 20
    assert shown() == [*range(1, 21)]
    assert not read
    with steps.open("a") as file:
        file.write(lines[20][30:] + lines[21])
    assert shown() == [*range(1, 23)]
    assert len(read) == 2
    check()
    # A run that goes on from a checkpoint cuts its files, and may have grown beyond since.
    steps.write_text("".join([*lines[:10], *lines[25:], *lines[10:20]]))
    assert shown() == [*range(1, 21), *range(26, 31)]
    check()
    steps.write_text(lines[0])
    assert shown() == [1]
    steps.unlink()
    assert shown() == []


@pytest.mark.slow
def test_ctrl_c_ends_it_with_0(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=3, end=None)
    hold(run, os.getpid())
    command = [sys.executable, "-m", "roll_sft.cli", "watch", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline().startswith("step 1")
        watching.send_signal(2)
        assert watching.wait(60) == 0


def test_a_curve_of_dots() -> None:
    x = np.arange(8.0)
    assert braille(x, x, width=4, height=2) == ["⠀⠀⡠⠊", "⡠⠊⠀⠀"]
    flat = braille(np.array([1.0]), np.array([np.nan]), width=2, height=1)
    assert flat == ["⠀⠀"]
    assert chart("none", x, np.full(8, np.nan), width=20, height=3) == []
    lines = chart("loss", x, x, width=20, height=3)
    assert lines[0] == "loss  7"
    assert lines[1].startswith("7 ")
    assert lines[-1].startswith("0 ")


def test_watching_loads_neither_ray_nor_torch_nor_matplotlib(tmp_path: Path) -> None:
    make_run(tmp_path / "run", num_steps=3)
    code = (
        "import sys; from roll_sft import cli\n"
        "cli.main(['watch', sys.argv[1], '--once'])\n"
        "heavy = {'torch', 'ray', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    subprocess.run(command, check=True, capture_output=True)
