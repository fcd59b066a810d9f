"""Parameters and tags that a tracker is given of a run."""

import subprocess

import pytest

from roll_sft.config.build import build_config
from roll_sft.tracking import run_facts


def params_of(**sections):
    return run_facts.params_of(build_config(sections))


def test_params_are_what_decides_the_run_and_what_was_set():
    params = params_of()
    assert params["train.learning_rate"] == "1e-05"
    assert {"seed", "data.sequence_length", "parallel.tensor_model_parallel_size"} <= set(params)
    sections = {key.partition(".")[0] for key in params}
    assert sections == {"seed", "deterministic", "model", "data", "parallel", "train"}
    assert "train.logging_steps" not in params
    assert "model.path" not in params, "a key without a value"
    params = params_of(train={"logging_steps": 7}, checkpoint={"async_save": True})
    assert (params["train.logging_steps"], params["checkpoint.async_save"]) == ("7", "True")


def test_sources_are_a_list_of_names_and_shares():
    train = [
        {"path": "a.jsonl"},
        {"path": "b.jsonl", "weight": 0.5},
        {"path": "c.jsonl", "samples": 9},
    ]
    assert params_of(data={"train": train})["data.train"] == "a, b (weight 0.5), c (9 samples)"


def test_params_hold_no_credential():
    params = params_of(
        model={"path": "https://me:hunter2@host/model?token=hunter3"},
        data={"train": [{"path": "https://me:hunter4@host/a.jsonl?key=hunter5"}]},
        tracking={"mlflow_uri": "https://me:hunter6@host"},
    )
    assert "hunter" not in str(params)


def test_tags_name_the_commit_of_the_folder_and_whether_it_was_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "git.dirty" not in run_facts.tags_here()
    (tmp_path / "file").write_text("1")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "file"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], check=True)
    tags = run_facts.tags_here()
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert (tags["mlflow.source.git.commit"], tags["git.dirty"]) == (head.stdout.strip(), "false")
    (tmp_path / "file").write_text("2")
    assert run_facts.tags_here()["git.dirty"] == "true"


def test_tags_without_git_or_a_user_are_those_that_are_known(monkeypatch):
    def nobody():
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(run_facts.getpass, "getuser", nobody)
    tags = run_facts.tags_here()
    assert "mlflow.user" not in tags
    assert "mlflow.source.git.commit" not in tags
    assert {"host", "version.python", "version.torch"} <= set(tags)


@pytest.mark.parametrize("key", ["output_dir", "run_name", "tracking.experiment", "data.cache_dir"])
def test_keys_that_say_nothing_about_the_result_are_left_out(key):
    section, _, name = key.rpartition(".")
    value = {name: "/some/where"}
    assert key not in params_of(**({section: value} if section else value))
