"""`roll_sft.load_config`, `roll_sft.train` up to where workers would start, and its result."""

import inspect
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

import roll_sft
from roll_sft import run, stages
from roll_sft.base.errors import CheckpointError, ConfigError, DataError
from roll_sft.config.evaluation import PromptSource
from roll_sft.config.schema import RunConfig
from roll_sft.python_api.result import Result
from tests import doors
from tests.doors import Door

door, assets = doors.door, doors.assets
GIVEN = ["model.path=m", "data.train=[{path: a.jsonl}]", "run_name=1e3", "train.learning_rate=1e-4"]


def process_state() -> dict[str, Any]:
    """What a library must leave alone."""
    names = ("", "roll_sft", "ray", "mlflow")
    loggers = [logging.getLogger(name) for name in names]
    variables = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    return variables | {
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
        "signals": [signal.getsignal(each) for each in sorted(signal.valid_signals())],
        "logs": [(each.handlers[:], each.level, each.propagate) for each in loggers],
        "streams": (sys.stdout, sys.stderr, os.fstat(2).st_ino),
        "other": (sys.argv[:], str(Path.cwd())),
    }


@pytest.fixture
def unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = process_state()
    yield
    after = process_state()
    names = before.keys() | after.keys()
    changed = {name: (before.get(name), after.get(name)) for name in names}
    assert not {name: each for name, each in changed.items() if each[0] != each[1]}


@pytest.fixture
def small(assets: Path, tmp_path: Path) -> RunConfig:
    return RunConfig().evolve(
        model={"path": assets / "model"},
        data={"sequence_length": 100, "cache_dir": tmp_path / "cache"},
        parallel={"device": "cpu"},
        tracking={"backends": ["jsonl"]},
        prepare_only=True,
    )


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("name", ["base", "qwen7b_sft"])
def test_a_configuration_is_the_commands(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it, and leaves it
        composed = run.compose(["--config-name", name, *GIVEN])
    assert composed is not None
    assert roll_sft.load_config(name, GIVEN) == composed[0]


@pytest.mark.parametrize("found", [None, "0", "1"])
def test_a_variable_that_was_found_is_left(
    found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    if found is not None:
        monkeypatch.setenv("HYDRA_FULL_ERROR", found)
    roll_sft.load_config("base", GIVEN)
    assert os.environ.get("HYDRA_FULL_ERROR") == found


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("base", ["train.learning_rat=1"]),
        ("base", ["trian.seed=1"]),
        ("base", ["train.learning_rate=fast", "seed=x"]),
        ("base", ["train.learning_rate=-1"]),
        ("base", ["seed=(3"]),
        ("base", ["train=3"]),
        ("qwen7b", []),
    ],
)
def test_a_refusal_is_the_commands(name: str, overrides: list[str], door: Door) -> None:
    with pytest.raises(ConfigError) as refused:
        roll_sft.load_config(name, overrides)
    outcome = door("--config-name", name, *GIVEN, *overrides)
    assert outcome.code == 2
    assert str(refused.value).splitlines()[-1] in outcome.stderr


@pytest.mark.usefixtures("unchanged")
def test_a_folder_of_ones_own_and_what_is_no_override(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [base, _self_]\nseed: 7\n")
    assert roll_sft.load_config("mine", config_dir=tmp_path).seed == 7
    with pytest.raises(ConfigError, match=r"config_dir: there is no folder '.*/gone'"):
        roll_sft.load_config("mine", config_dir=tmp_path / "gone")
    for wrong in ("seed=1", ["--cfg"], [3]):
        with pytest.raises(ConfigError, match=r"overrides: .* is not in a list of texts"):
            roll_sft.load_config("base", wrong)  # type: ignore[arg-type]


def test_a_program_with_hydra_of_its_own_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("defaults: [schema]\n")
    ConfigStore.instance().store(name="schema", node={"mine": 1})
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.2"):
        found = GlobalHydra.instance().hydra
        assert roll_sft.load_config().seed == RunConfig().seed
        assert GlobalHydra.instance().hydra is found
        assert dict(hydra.compose("own")) == {"mine": 1}


def test_train_is_a_function() -> None:
    assert inspect.isfunction(roll_sft.train)
    with pytest.raises(ConfigError, match=r"config: 3 is neither a configuration"):
        roll_sft.train(["a"], config=3)
    assert {"train", "load_config", "Result", "RunConfig"} <= set(dir(roll_sft))
    assert "samples" in inspect.signature(roll_sft.train).parameters
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = roll_sft.trian


@pytest.mark.usefixtures("unchanged")
def test_an_error_is_the_one_that_the_command_ends_with(
    door: Door, small: RunConfig, assets: Path, tmp_path: Path
) -> None:
    rows = doors.write_rows(tmp_path / "rows.jsonl", [{"prompt": "", "completion": "a"}])
    with pytest.raises(DataError) as refused:
        roll_sft.train(rows, config=small)
    overrides = [f"data.cache_dir={tmp_path / 'cache'}", "data.sequence_length=100"]
    source = f"data.train=[{{path: {rows}}}]"
    outcome = door(f"model.path={assets / 'model'}", source, "prepare_only=true", *overrides)
    assert (outcome.code, outcome.last_line) == (3, str(refused.value))


@pytest.mark.usefixtures("unchanged")
def test_samples_are_prepared_as_rows_of_a_file_are(
    monkeypatch: pytest.MonkeyPatch, small: RunConfig
) -> None:
    monkeypatch.setattr(stages, "preparing", doors.prepares_here)
    pairs = [(f"Say {number}.", f"It is {number}.") for number in range(5)]
    result = roll_sft.train(pairs, eval_samples=pairs[:2], config=small)
    report = json.loads((result.folder / "data_report.json").read_text())
    assert [(each["name"], each["rows"]) for each in report["sources"]][:1] == [("train", 5)]
    assert result.folder.parent.name == "outputs"
    again = roll_sft.train(iter(pairs), eval_samples=pairs[:2], config=small)
    other = roll_sft.train(pairs[:4], config=small)
    assert again.folder == result.folder != other.folder
    named = roll_sft.train(pairs, config=small.evolve(run_name="mine"))
    assert named.folder.name == "mine"


@pytest.mark.usefixtures("unchanged")
def test_prompts_are_texts_or_rows_with_references(
    monkeypatch: pytest.MonkeyPatch, small: RunConfig
) -> None:
    monkeypatch.setattr(stages, "preparing", doors.prepares_here)
    pairs = [(f"Say {number}.", f"It is {number}.") for number in range(5)]
    texts = roll_sft.train(pairs, eval_prompts=["Say 9."], config=small)
    assert texts.config.evaluation.prompts == ["Say 9."]
    rows = roll_sft.train(pairs, eval_prompts=iter(pairs[:2]), config=small)
    (source,) = rows.config.evaluation.prompts
    assert isinstance(source, PromptSource)
    assert json.loads(Path(source.path or "").read_text().splitlines()[0]) == {
        "prompt": "Say 0.",
        "completion": "It is 0.",
    }
    with pytest.raises(ConfigError, match=r"metric_fn: without evaluation\.prompts"):
        roll_sft.train(pairs, metric_fn=len, config=small)


def test_one_run_at_a_time(small: RunConfig) -> None:
    refusals = []

    def samples() -> Iterator[str]:
        try:
            roll_sft.train(["b"], config=small)
        except ConfigError as error:
            refusals.append(str(error))
        yield from ()

    with pytest.raises(DataError, match="samples: is empty"):
        roll_sft.train(samples(), config=small)
    assert "another roll_sft.train of this process is running" in refusals[0]


def test_the_history_has_an_entry_for_each_step(tmp_path: Path) -> None:
    steps = [{"step": step, "train_loss": 1.0 / step, "mfu": None} for step in (1, 2, 3)]
    doors.write_rows(tmp_path / "steps.jsonl", steps)
    doors.write_rows(tmp_path / "eval.jsonl", [{"step": 2, "name": "held_out", "loss": 0.5}])
    with (tmp_path / "eval.jsonl").open("a") as file:
        file.write('{"step": 3, "name": "generation", "metrics": {"score": 1.0}}\n')
    result = Result(tmp_path, RunConfig())
    assert result.history["train_loss"] == [1.0, 0.5, 1.0 / 3]
    assert result.history["eval/held_out/loss"] == [None, 0.5, None]
    assert result.history["eval/generation/score"] == [None, None, 1.0]
    frame = result.history.frame()
    assert list(frame.index) == [1, 2, 3]
    assert frame["eval/held_out/loss"].notna().tolist() == [False, True, False]
    assert repr(result) == f"<Result of {tmp_path}: 3 steps, train_loss 0.3333>"
    assert result.checkpoint is result.model is None
    assert "held_out" in result.report().read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="nothing to push"):
        result.push_to_hub("me/my_model")
    with pytest.raises(CheckpointError, match="neither a model nor a checkpoint to save"):
        result.save_pretrained(tmp_path / "copy")
