"""Every checkpoint exported while training goes on, and pushed: a run as the user starts it."""

import logging
import tempfile

import pytest

from roll_sft.config.build import build_config
from roll_sft.convert.each_save import exporting_saves, hold
from roll_sft.convert.to_hf import export
from tests import doors
from tests.doors import refused
from tests.stand_in_hub import READER, WRITER, stand_in_hub

assets, arguments, door = doors.assets, doors.arguments, doors.door


@pytest.mark.slow
@pytest.mark.long
def test_every_save_is_exported_and_a_revision_on_the_hub(arguments, tmp_path):
    folder = tmp_path / "run"
    keys = [f"output_dir={folder}", "train.max_steps=6", "train.save_steps=2"]
    keys += ["train.global_batch_size=4", "checkpoint.keep_last=2"]
    keys += ["checkpoint.hf_export=every_save", "export.push_to_hub.repo_id=me/model"]
    with stand_in_hub() as hub:
        known = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HUB_DISABLE_XET": "1"}
        known["RAY_TMPDIR"] = tempfile.gettempdir()  # its sockets need a short path
        done = doors.process(tmp_path, *arguments, *keys, **known)
    assert done.code == 0, done.stderr
    assert "warning" not in done.stderr.lower()
    exports = {path.name for path in (folder / "exports").iterdir()}
    assert exports == {"step_00000004"}, "as the checkpoints, without the last, which is hf/"
    assert not (folder / ".exporting").exists()
    export(folder / "checkpoints" / "step_00000004", tmp_path / "again", dtype=None, replace=False)
    weights = "model.safetensors"
    made = (folder / "exports" / "step_00000004" / weights).read_bytes()
    assert made == (tmp_path / "again" / weights).read_bytes()
    branches = hub.repositories["me/model"].branches
    assert {*branches} == {"main", "step_00000002", "step_00000004"}
    assert branches["step_00000004"][weights] == made
    assert branches["main"][weights] == (folder / "hf" / weights).read_bytes()
    assert len({branch[weights] for branch in branches.values()}) == 3
    held = [
        path
        for path in folder.rglob("*")
        if path.is_file() and WRITER.encode() in path.read_bytes()
    ]
    assert held == []


def test_an_export_that_fails_is_told_again_at_the_end_and_ends_nothing(tmp_path, caplog):
    config = build_config({"checkpoint": {"hf_export": "every_save"}})
    broken = tmp_path / "checkpoints" / "step_00000002"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{}")
    caplog.set_level(logging.INFO)
    last = tmp_path / "checkpoints" / "step_00000004"
    with exporting_saves(config, tmp_path, last_step=4) as finish:
        last.mkdir()
        hold(last, tmp_path)
        finish()
    told = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(told) == 3
    assert "step_00000002 is not exported: " in told[0]
    assert told[0].endswith("training continues")
    assert told[1].startswith("step_00000002 was not exported: ")
    assert told[2].startswith("1 of 1 exports failed; ")
    assert not (tmp_path / ".exporting").exists()


def test_exports_that_are_not_waited_for_are_ended(tmp_path, caplog):
    config = build_config({"checkpoint": {"hf_export": "every_save"}})
    for step in range(1, 4):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    with pytest.raises(OSError, match="a crash"), exporting_saves(config, tmp_path, last_step=9):
        raise OSError("a crash")
    assert not (tmp_path / ".exporting").exists()
    assert not caplog.records


def test_a_repository_without_rights_is_refused_before_training(door, arguments, monkeypatch):
    import huggingface_hub.constants
    import huggingface_hub.hf_api

    with stand_in_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", READER)
        outcome = door(*arguments, "export.push_to_hub.repo_id=me/x", "train.max_steps=1")
    refused(outcome, 2, "the token may not write to 'me/x'")
