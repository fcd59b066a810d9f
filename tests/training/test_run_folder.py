import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from roll_sft.base.errors import ConfigError, ResourceError
from roll_sft.base.files import json_lines
from roll_sft.config.build import build_config
from roll_sft.training import run_folder
from roll_sft.training.cut_logs import cut_logs
from roll_sft.training.evaluations import losses_of
from roll_sft.training.run_folder import JsonLines, claimed, output_folder, write_json

HOLD = """
import sys, time
from pathlib import Path
from roll_sft.training.run_folder import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
WRITE = """
import sys, time
from pathlib import Path
from roll_sft.training.run_folder import JsonLines
lines = JsonLines(Path(sys.argv[1]))
for step in range(3):
    lines.write({"step": step, "samples": ["x" * 100] * 1000})
print("written", flush=True)
time.sleep(60)
"""


def run_of(**keys):
    return build_config(keys)


def started(script, path):
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline(), "the script ended"
    return process


def test_output_folder_is_named_after_the_run_unless_told():
    assert str(output_folder(run_of(run_name="mine"))) == "outputs/mine"
    assert str(output_folder(run_of(output_dir="/data/x"))) == "/data/x"


def test_relative_folder_is_refused_under_a_ray_job(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match="output_dir: 'outputs/sft'"):
        output_folder(run_of())
    assert str(output_folder(run_of(output_dir="/data/x"))) == "/data/x"


def test_claimed_folder_is_made_resolved_and_free_afterwards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with claimed(run_folder.Path("a/b")) as folder:
            assert folder == tmp_path / "a" / "b"
            assert folder.is_dir()
    assert not (tmp_path / "a" / "b" / ".lock_holder").exists()


def test_folder_is_free_again_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="mine"), claimed(tmp_path):
        raise ValueError("mine")
    with claimed(tmp_path):
        pass


@pytest.mark.slow
def test_folder_in_use_names_its_holder_and_is_free_once_that_is_killed(tmp_path):
    holder = started(HOLD, tmp_path)
    with pytest.raises(ConfigError) as caught, claimed(tmp_path):
        pass
    assert f"{os.uname().nodename} pid {holder.pid}" in str(caught.value)
    assert "choose another output_dir or run_name" in str(caught.value)
    assert "\n" not in str(caught.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with claimed(tmp_path):
        pass


def test_folder_with_checkpoints_is_never_written_over(tmp_path):
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
    message = "already holds checkpoints up to step_00000010"
    with pytest.raises(ConfigError, match=message), claimed(tmp_path):
        pass
    with claimed(tmp_path, resumes=True):
        pass


def test_logs_are_cut_to_a_step_and_a_torn_line_is_left_out(tmp_path, caplog):
    for name in ("steps.jsonl", "samples.jsonl", "stragglers.jsonl"):
        lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)]
        (tmp_path / name).write_text("".join(lines) + '{"step": 5, "los')
    eval_lines = [{"step": step, "name": name, "loss": 1.0} for step in (2, 4) for name in "ab"]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in eval_lines))
    cut_logs(tmp_path, step=3, origin=tmp_path)
    lines = JsonLines(tmp_path / "steps.jsonl")
    lines.write({"step": 4})
    lines.close()
    for name, steps in (
        ("steps", [1, 2, 3, 4]),
        ("samples", [1, 2, 3]),
        ("stragglers", [1, 2, 3]),
        ("eval", [2, 2]),
    ):
        text = (tmp_path / f"{name}.jsonl").read_text()
        assert [json.loads(line)["step"] for line in text.splitlines()] == steps
    assert losses_of(tmp_path, "b") == {2: 1.0}
    assert caplog.text == ""
    cut_logs(tmp_path, step=9, origin=tmp_path)
    assert "steps.jsonl: lines before step 10 are missing" in caplog.text
    cut_logs(tmp_path, step=0, origin=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f".set_aside_{name}.jsonl{number}"
        for name in ("steps", "samples", "stragglers", "eval")
        for number in ("", "_1")
    }
    set_aside = (tmp_path / ".set_aside_steps.jsonl").read_text()
    assert set_aside == '{"step": 4}\n{"step": 5, "los', "a line is lost"
    text = (tmp_path / ".set_aside_steps.jsonl_1").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2, 3, 4]


def test_logs_of_another_run_take_the_place_of_what_is_there_which_is_kept(tmp_path):
    for folder, loss in (("origin", 1.0), ("own", 2.0)):
        (tmp_path / folder).mkdir()
        line = json.dumps({"step": 1, "train_loss": loss}) + "\n"
        (tmp_path / folder / "steps.jsonl").write_text(line)
    cut_logs(tmp_path / "own", step=1, origin=tmp_path / "origin")
    assert next(json_lines(tmp_path / "own" / "steps.jsonl"))["train_loss"] == 1.0
    kept = list(json_lines(tmp_path / "own" / ".set_aside_steps.jsonl"))
    assert kept[0]["train_loss"] == 2.0
    cut_logs(tmp_path / "own", step=1, origin=tmp_path / "own")
    assert len(list((tmp_path / "own").iterdir())) == 2, "a cut that cuts nothing keeps a copy"


def test_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"output_dir: cannot write to .* choose another$"
    with pytest.raises(ConfigError, match=message), claimed(tmp_path / "file" / "run"):
        pass


def test_a_number_that_is_not_finite_is_null_and_never_breaks_the_json(tmp_path):
    lines = JsonLines(tmp_path / "lines.jsonl")
    lines.write({"step": 1, "loss": float("nan"), "rest": [float("-inf"), {"x": 1e308 * 10}]})
    lines.close()
    write_json(tmp_path / "report.json", {"share": float("nan")})

    def refuse(constant):
        raise AssertionError(constant)

    (line,) = (tmp_path / "lines.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 1,
        "loss": None,
        "rest": [None, {"x": None}],
    }
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text, parse_constant=refuse) == {"share": None}


def no_room_after(num_bytes):
    """In a child: files end there, as on a full disk, after a part of a line."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def write_until_full(folder, kind):
    no_room_after(250)
    line, written = {"step": 0, "text": "x" * 50}, 0
    try:
        if kind == "lines":
            lines = JsonLines(folder / "steps.jsonl")
            for _ in range(9):
                lines.write(line)
                written += 1
        elif kind == "report":
            write_json(folder / "data_report.json", [line] * 9)
        elif kind == "config":
            run_folder.write_config(folder, "x" * 999)
        else:
            cut_logs(folder / "own", step=9, origin=folder / "origin")
    except ResourceError as error:
        (folder / "message").write_text(f"{written}|{str(error)[:200]}")


@pytest.mark.parametrize("kind", ["lines", "report", "config", "cut"])
def test_a_full_disk_is_one_line_with_the_path_and_tears_nothing(kind, tmp_path):
    record = json.dumps({"step": 1, "text": "x" * 400}) + "\n"
    for name in ("own", "origin"):
        (tmp_path / name).mkdir()
    (tmp_path / "origin" / "steps.jsonl").write_text(record)
    (tmp_path / "own" / "steps.jsonl").write_text("{}\n")
    child = multiprocessing.get_context("fork").Process(
        target=write_until_full, args=(tmp_path, kind)
    )
    child.start()
    child.join(30)
    written, message = (tmp_path / "message").read_text().split("|")
    assert "cannot be written: File too large; make room" in message
    assert message.startswith(str(tmp_path))
    assert "\n" not in message
    assert ResourceError.exit_code == 4
    if kind == "lines":
        lines = list(json_lines(tmp_path / "steps.jsonl"))
        assert len(lines) == int(written) > 0, "a line is torn"
    assert not (tmp_path / "data_report.json").exists()
    assert not (tmp_path / "config.yaml").exists()
    assert (tmp_path / "own" / "steps.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_lines_of_a_folder_that_is_gone_are_an_error_and_not_written_to_nobody(how, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = JsonLines(folder / "steps.jsonl")
    lines.write({"step": 1})
    if how == "removed":
        shutil.rmtree(folder)
    elif how == "moved":
        folder.rename(tmp_path / "elsewhere")
    else:
        (folder / "steps.jsonl").rename(folder / "old")
        (folder / "steps.jsonl").touch()
    with pytest.raises(ResourceError, match=r"steps\.jsonl: "):
        lines.write({"step": 2})
    lines.close()


def test_lines_are_objects_in_order_and_readable_while_the_file_is_open(tmp_path):
    @dataclass(frozen=True, slots=True)
    class Record:
        step: int
        text: str

    lines = JsonLines(tmp_path / "lines.jsonl")
    lines.write(Record(1, "caf\u00e9\n"))
    lines.write({"step": 2})
    read = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert read == [{"step": 1, "text": "caf\u00e9\n"}, {"step": 2}]
    lines.close()


@pytest.mark.slow
def test_lines_survive_the_kill_of_their_writer(tmp_path):
    writer = started(WRITE, tmp_path / "lines.jsonl")
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    read = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [line["step"] for line in read] == [0, 1, 2]


def test_json_is_replaced_as_a_whole_and_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"rows": 1})
    assert json.loads(path.read_text()) == {"rows": 1}
    before = path.stat().st_ino
    with pytest.raises(TypeError):
        write_json(path, {"rows": object()})
    assert json.loads(path.read_text()) == {"rows": 1}
    write_json(path, {"rows": 2})
    assert json.loads(path.read_text()) == {"rows": 2}
    assert path.stat().st_ino != before, "rewritten in place, so a reader may see a part"
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]
