import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from roll_sft import outputs
from roll_sft.config import build_config
from roll_sft.errors import ConfigError
from roll_sft.outputs import JsonLines, claimed, output_folder, write_json

HOLD = """
import sys, time
from pathlib import Path
from roll_sft.outputs import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
WRITE = """
import sys, time
from pathlib import Path
from roll_sft.outputs import JsonLines
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
    with pytest.raises(ConfigError, match="output_dir: 'outputs/sft' is relative"):
        output_folder(run_of())
    assert str(output_folder(run_of(output_dir="/data/x"))) == "/data/x"


def test_claimed_folder_is_made_resolved_and_free_afterwards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with claimed(outputs.Path("a/b")) as folder:
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
    for name in ("steps.jsonl", "samples.jsonl"):
        lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)]
        (tmp_path / name).write_text("".join(lines) + '{"step": 5, "los')
    eval_lines = [{"step": step, "name": name, "loss": 1.0} for step in (2, 4) for name in "ab"]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in eval_lines))
    outputs.cut_logs(tmp_path, step=3, origin=tmp_path)
    lines = JsonLines(tmp_path / "steps.jsonl")
    lines.write({"step": 4})
    lines.close()
    for name, steps in (("steps", [1, 2, 3, 4]), ("samples", [1, 2, 3]), ("eval", [2, 2])):
        text = (tmp_path / f"{name}.jsonl").read_text()
        assert [json.loads(line)["step"] for line in text.splitlines()] == steps
    assert outputs.losses(tmp_path, "b") == {2: 1.0}
    assert caplog.text == ""
    outputs.cut_logs(tmp_path, step=9, origin=tmp_path)
    assert "has not every line up to step 9" in caplog.text
    outputs.cut_logs(tmp_path, step=0, origin=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"output_dir: cannot write to .* choose another$"
    with pytest.raises(ConfigError, match=message), claimed(tmp_path / "file" / "run"):
        pass


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
