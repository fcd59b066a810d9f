"""`loss.png`, of files that a run leaves."""

import json
import logging

import pytest

from roll_sft.report.loss_curve import draw_losses
from roll_sft.report.run_files import RunFiles, read_run


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("num_steps", [1, 60, 2500])
def test_a_run_of_any_length_has_a_picture(num_steps, tmp_path, recwarn):
    steps = ({"step": n, "train_loss": None if n == 7 else 1 / n} for n in range(1, num_steps + 1))
    write(tmp_path / "steps.jsonl", steps)
    names = ("held_out", "_hidden", "$x$ \\frac", "测试\n", "")
    write(tmp_path / "eval.jsonl", ({"step": 1, "name": name, "loss": 0.5} for name in names))
    draw_losses(read_run(tmp_path))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))
    assert not recwarn


def test_no_picture_of_nothing_and_one_line_where_it_cannot_be_written(tmp_path, caplog):
    draw_losses(RunFiles(tmp_path, "run", {}))
    assert not list(tmp_path.iterdir())
    assert not caplog.records
    write(tmp_path / "steps.jsonl", [{"step": 1, "train_loss": 1.0}])
    (tmp_path / "loss.png").mkdir()
    draw_losses(read_run(tmp_path))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(tmp_path / "loss.png") in record.getMessage()
