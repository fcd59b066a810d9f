"""The door `python -m roll_sft.run`: exit codes, last lines, and what is written or left alone.

What needs no process of its own is called in this one, which then pays for transformers once.
"""

import contextlib
import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from omegaconf import OmegaConf

import roll_sft.run
from roll_sft import stages
from roll_sft.base import errors
from roll_sft.config.build import build_config
from roll_sft.config.composed import resolved
from roll_sft.config.schema import RunConfig, source_name
from tests import doors
from tests.doors import NUM_ROWS, Door, alpaca, contents, process, refused, write_rows

door, assets, arguments = doors.door, doors.assets, doors.arguments


# What the command line may say


def test_a_process_refuses_what_is_not_known(tmp_path: Path) -> None:
    refused(process(tmp_path, "+typo=1"), 2, "typo: no such key; did you mean `model.dtype`?")
    assert contents(tmp_path) == {}


def test_a_refusal_does_not_wait_for_the_heavy_libraries(tmp_path: Path) -> None:
    script = (
        "import sys, roll_sft.run\n"
        "code = roll_sft.run.main(['train.max_steps=abc'])\n"
        "heavy = {'torch', 'transformers', 'ray', 'mlflow', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'{code} {sorted(heavy)}' if code != 2 or heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["model.pth=x"], ["model.pth: no such key; did you mean `model.path`?"]),
        (["--config-name", "nope"], ["no configuration 'nope'", "base, demo, glm_4_5_air_sft"]),
        (["train.max_steps=abc"], ["train.max_steps: 'abc' is not an integer or null"]),
        (["--config-name", "dmeo"], ["no configuration 'dmeo'; did you mean 'demo'?"]),
        (["--config-name=qwen7b_sft", "train=nope"], ["'train/nope'", "full_finetune"]),
        (["modle.path=x"], ["modle.path: no such key; did you mean `model.path`?"]),
        (["++train.lr=1"], ["train.lr: no such key; did you mean `train.learning_rate`?"]),
        (["data.train=[{pth: x}]"], ["data.train[0].pth", "did you mean `data.train[0].path`?"]),
        (["data.train={path: x}"], ["data.train={path: x}"]),
        (["train=5"], ["'train=5': train is a section; write train.KEY=VALUE"]),
        (["data.train=[{"], ["'data.train=[{': ", "; write key=value, and a value"]),
        (["a b c="], ["'a b c=': ", "; write key=value, and a value"]),
        (["run_name=${nope}"], ["run_name: Interpolation key 'nope' not found; mend"]),
        (["output_dir=${oc.env:NOPE}"], ["output_dir: ", "'NOPE' not found"]),
        (["data.train.path=x"], ["'data.train.path': data.train is a list", "=[{path: my.jsonl}]"]),
        (["model=null"], ["Config group override must be a string"]),
        (["~model"], ["Could not delete 'model'"]),
        (["--config-dir", "nowhere"], ["nowhere' not found"]),
        (["--multirun", "seed=1,2"], ["--multirun: not available in this version; start each"]),
        (["-m", "seed=1,2"], ["--multirun: not available in this version; start each"]),
        (["--no-such-flag"], ["error: unrecognized arguments: --no-such-flag"]),
        (["--cfg", "jobs"], ["error: argument --cfg/-c: invalid choice: 'jobs'"]),
        (["--cfg=job", "--package=nope"], ["package 'nope' not found"]),
        ([], ["data.train: empty; give a list such as data.train=[{path: my.jsonl}]"]),
        (["--config-name=demo", "model.dtype=fp16"], ["'fp16' is not available in this version"]),
    ],
)
def test_every_error_of_the_command_line_is_code_2_without_a_traceback(
    door: Door, tmp_path: Path, given: list[str], parts: list[str]
) -> None:
    refused(door(*given), 2, *parts)
    assert contents(tmp_path) == {}


def test_a_path_may_begin_at_the_user_s_home(door: Door, tmp_path: Path) -> None:
    entry = "{path: ~/rows.jsonl, name: '~/rows'}"
    typed = door(
        f"data.train=[{entry}]", "model.path=~/models/m", "output_dir=~/out", "dry_run=true"
    )
    (tmp_path / "mine.yaml").write_text(
        f"defaults: [base, _self_]\noutput_dir: ~/out\nmodel: {{path: ~/models/m}}\n"
        f"data:\n  train: [{entry}]\ndry_run: true\n"
    )
    written = door("--config-dir=.", "--config-name=mine")
    for done in (typed, written):
        refused(done, 2, f"model.path: '{Path.home()}/models/m' is neither a folder nor a hub id")


@pytest.mark.parametrize("text", ["2024_11_25", "1e3", "1_0", "true", "0.50", "nan"])
def test_a_text_key_keeps_what_was_typed(door: Door, tmp_path: Path, text: str) -> None:
    entry = f"{{path: {text}, name: {text}, weight: 1e-1}}"
    given = [f"run_name={text}", f"+data.validation=[{{path: {text}}}]", f"data.train=[{entry}]"]
    typed = door(*given, f"model.path={text}", "train.learning_rate=1e-3", "--cfg", "job")
    (tmp_path / "mine.yaml").write_text(
        f"""
defaults: [base, _self_]
run_name: {text}
model: {{path: {text}}}
data:
  train: [{entry}]
  validation:
    - path: {text}
train: {{learning_rate: 1e-3}}
"""
    )
    filed = door(f"--config-dir={tmp_path}", "--config-name=mine", "--cfg", "job")
    for outcome in (typed, filed):
        config = build_config(yaml.safe_load(outcome.stdout))
        (source,), (validation,) = config.data.train, config.data.validation
        texts = {config.run_name, config.model.path, source.path, source.name, validation.path}
        assert texts == {text}
        assert (source.weight, config.train.learning_rate) == (0.1, 1e-3)


def test_a_number_of_yaml_means_what_it_looks_like(door: Door, tmp_path: Path) -> None:
    text = "defaults: [base, _self_]\ntrain: {max_steps: 010, save_steps: 1:30}\n"
    (tmp_path / "mine.yaml").write_text(text)
    shown = door(f"--config-dir={tmp_path}", "--config-name=mine", "--cfg", "job").stdout
    values = yaml.safe_load(shown)["train"]
    assert (values["max_steps"], values["save_steps"]) == ("010", "1:30")
    with pytest.raises(errors.ConfigError, match=r"train\.save_steps: '1:30'"):
        build_config({"train": values})
    assert build_config({"train": {"max_steps": "010"}}).train.max_steps == 10


def test_what_is_no_text_keeps_its_type(door: Door) -> None:
    outcome = door("run_name=${seed}", "model.path=null", "train.max_steps=1_0", "--cfg", "job")
    assert yaml.safe_load(outcome.stdout)["train"]["max_steps"] == 10
    config = build_config(resolved(OmegaConf.create(outcome.stdout)))
    assert (config.run_name, config.model.path) == ("42", None)


@pytest.mark.parametrize("key", ["x" * 100_000, "train." + "y" * 100_000])
def test_an_endless_key_or_value_is_not_echoed_whole(door: Door, key: str) -> None:
    for argument in (f"{key}=1", f"run_name={key}", f"train.max_steps={'9' * 100_000}"):
        outcome = door(argument, "model.path=m", "data.train=[{path: a}]")
        refused(outcome, 2)
        assert len(outcome.stderr) < 3000


def test_no_escape_sequence_of_a_file_reaches_the_terminal(door: Door, tmp_path: Path) -> None:
    hostile = "\\e[2J\\u202egpj"
    (tmp_path / "mine.yaml").write_text(f'defaults: [base, _self_]\n"{hostile}": 1\n')
    outcome = door(f"--config-dir={tmp_path}", "--config-name=mine")
    refused(outcome, 2, "no such key")
    assert outcome.last_line.isprintable()


def test_credentials_are_in_no_text_that_is_kept(door: Door) -> None:
    secret = "S3cr3t"
    arguments = [
        f"data.train=[{{path: 'https://me:{secret}@host/rows.jsonl'}}]",
        f"data.validation=[{{path: 'https://host/v.jsonl?token={secret}&part=1'}}]",
        f"tracking.mlflow_uri=postgresql://me:{secret}@host/db",
        f"model.path='https://host/model?access_token={secret}'",
    ]
    result = roll_sft.run.compose(arguments)
    assert result is not None
    config, text = result
    assert secret not in text
    names = [source_name(each) for each in (*config.data.train, *config.data.validation)]
    assert names == ["rows", "v"]
    assert secret in str(config)  # what connects still has them
    outcome = door(*arguments)
    assert outcome.code == 2
    assert secret not in outcome.stdout + outcome.stderr


def test_a_source_with_a_password_is_read_and_leaves_no_trace_of_it(
    door: Door, assets: Path, arguments: list[str], tmp_path: Path
) -> None:
    secret = "S3cr3t"
    with served(assets) as port:
        source = f"data.train=[{{path: 'http://me:{secret}@127.0.0.1:{port}/rows.jsonl'}}]"
        outcome = door(*arguments, source, "prepare_only=true", "output_dir=run")
    assert outcome.code == 0, outcome.stderr
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["sources"][0]["path"] == f"http://***@127.0.0.1:{port}/rows.jsonl"
    assert report["sources"][0]["kept"] == NUM_ROWS
    written = contents(tmp_path)
    assert {"run/config.yaml", "run/data_report.json"} <= set(written)
    assert [name for name, content in written.items() if secret.encode() in content] == []
    assert secret not in outcome.stdout + outcome.stderr


@contextlib.contextmanager
def served(folder: Path) -> Iterator[int]:
    """The port of a web server for the files of `folder`."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_all_values_that_cannot_run_are_shown_at_once(door: Door) -> None:
    wrong = ["seed=-1", "model.dtype=fp8", "train.max_steps=0", "tracking.backends=[comet]"]
    wrong += ["moe.dispatcher=flex", "train.lr=1"]
    outcome = door(*wrong, "model.path=m", "data.train=[{path: a}]")
    refused(outcome, 2)
    shown = {line.partition(":")[0] for line in outcome.stderr.splitlines()}
    assert shown == {override.partition("=")[0] for override in wrong}


def test_cfg_job_prints_every_key(door: Door, tmp_path: Path) -> None:
    outcome = door("--cfg", "job")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert build_config(yaml.safe_load(outcome.stdout)) == RunConfig()
    assert contents(tmp_path) == {}


# The user's own YAML


def own(folder: Path, text: str | bytes) -> list[str]:
    (folder / "mine").mkdir()
    content = text.encode() if isinstance(text, str) else text
    (folder / "mine" / "job.yaml").write_bytes(content)
    return ["--config-dir", "mine", "--config-name", "job"]


def test_a_folder_of_the_users_builds_on_ours(door: Door, tmp_path: Path) -> None:
    text = (
        "defaults: [base, parallel: gpus_8_tp2_pp2_cp2, _self_]\n"
        "run_name: mine\noutput_dir: /runs/${run_name}\n"
        "model: {path: m}\ndata:\n  train:\n    - path: a.jsonl\n"
    )
    outcome = door(*own(tmp_path, text), "--cfg", "job", "train.max_steps=5")
    assert outcome.code == 0
    config = build_config(resolved(OmegaConf.create(outcome.stdout)))
    assert (config.output_dir, config.train.max_steps) == ("/runs/mine", 5)
    assert config.parallel.num_workers == 8
    assert [source.path for source in config.data.train] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("defaults: [base, _self_]\nmodle: {path: x}\n", ["modle: no such key", "`model`"]),
        (
            "defaults: [base, _self_]\ndata:\n  train:\n    - pth: x\n",
            ["data.train[0].pth: no such key; did you mean `data.train[0].path`?"],
        ),
        (
            "defaults: [base, _self_]\nmodel: {path: m}\ntrain: {max_steps: few}\n",
            ["train.max_steps: 'few' is not an integer or null"],
        ),
        (
            "defaults: [bass, _self_]\n",
            ["Could not load 'bass'; did you mean 'base'?", "job, llama"],
        ),
        ("model: {path: m}\n", ["lacks 'output_dir'", "begin its file with `defaults: [base,"]),
        ("- a\n- b\n", ["primary config 'job' must be a DictConfig"]),
        ("a: [\n", ["the file cannot be read: ", 'mine/job.yaml", line 2', "; correct it"]),
        (b"a: \xff\n", ["the file cannot be read: ", "0xff in position 3", "; correct it"]),
    ],
)
def test_a_mistake_in_the_users_file_is_code_2_without_a_traceback(
    door: Door, tmp_path: Path, text: str | bytes, parts: list[str]
) -> None:
    refused(door(*own(tmp_path, text)), 2, *parts)


# The folder


def test_a_relative_output_dir_is_refused_under_a_ray_job(
    door: Door, tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for given in ([], ["output_dir=out"]):
        refused(door(*arguments, *given), 2, "output_dir: ", "is relative", "an absolute path")
    assert contents(tmp_path) == {}
    absolute = f"output_dir={tmp_path / 'out'}"
    assert door(*arguments, absolute, "prepare_only=true").code == 0


def test_a_folder_that_another_run_holds_is_refused(
    door: Door, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        before = contents(tmp_path)
        outcome = door(*arguments, "output_dir=out", "prepare_only=true")
        refused(outcome, 2, "output_dir: 'out' is in use by another run", "choose another")
        assert contents(tmp_path) == before
    assert door(*arguments, "output_dir=out", "prepare_only=true").code == 0


def test_a_folder_with_checkpoints_is_never_written_over(
    door: Door, tmp_path: Path, arguments: list[str]
) -> None:
    step = tmp_path / "outputs" / "sft" / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    (tmp_path / "outputs" / "sft" / "steps.jsonl").write_text("precious")
    before = contents(tmp_path)
    named = "'outputs/sft' already holds checkpoints up to step_00000001"
    refused(door(*arguments, "resume=none"), 2, named)
    refused(door(*arguments), 6, "none of its 1 checkpoints is whole")
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    made = {name for name in set(after) - set(before) if name.startswith("outputs")}
    assert made <= {"outputs/sft/.lock"}


def test_a_folder_that_cannot_be_made_is_refused(
    door: Door, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "outputs").write_text("a file")
    refused(door(*arguments), 2, "output_dir: cannot write to 'outputs/sft'", "choose another")


def test_prepare_only_fills_the_cache_and_writes_the_report_without_ray(
    door: Door, assets: Path, tmp_path: Path, arguments: list[str]
) -> None:
    rows = [alpaca(1), alpaca(2), {"instruction": "p", "output": ""}, alpaca(3)]
    path = write_rows(tmp_path / "few.jsonl", rows)
    validation = f"data.validation=[{{path: {assets / 'rows.jsonl'}, name: other}}]"
    train = f"data.train=[{{path: {path}}}]"
    outcome = door(*arguments, train, validation, "prepare_only=true")
    assert outcome.code == 0, outcome.stderr
    folder = tmp_path / "outputs" / "sft"
    written = {path.name for path in folder.iterdir()}
    assert written == {".lock", "config.yaml", "data_report.json", "job"}
    report = json.loads((folder / "data_report.json").read_text())
    (source,) = report["sources"]
    assert (source["name"], source["path"]) == ("few", str(path))
    assert (source["rows"], source["kept"], source["dropped"]) == (4, 3, {"empty_response": 1})
    assert source["tokens"] > source["supervised_tokens"] > 0
    assert [each["name"] for each in report["validation"]] == ["other"]
    config = build_config(yaml.safe_load((folder / "config.yaml").read_text()))
    assert (config.prepare_only, config.data.train[0].path) == (True, str(path))
    assert any((tmp_path / "cache").glob("*/tokens.bin"))
    again = door(*arguments, train, validation, "prepare_only=true")
    assert again.code == 0, "a folder without checkpoints can be prepared again"
    assert json.loads((folder / "data_report.json").read_text())["sources"][0]["cached"]


# How a run ends


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("why"), 2),
        (errors.DataError("why"), 3),
        (errors.ResourceError("why"), 4),
        (errors.DivergedError("why"), 5),
        (errors.CheckpointError("why"), 6),
        (errors.WorkerError("why"), 7),
        (KeyboardInterrupt(), 130),
        (SystemExit(143), 143),
    ],
)
def test_each_error_has_its_code_and_no_traceback(
    door: Door, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def end(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(stages, "run", end)
    outcome = door("model.path=m", "data.train=[{path: a}]")
    last = {130: "interrupted", 143: ""}.get(code, "why")
    refused(outcome, code)
    assert outcome.stderr.strip() == last


def test_a_fault_of_ours_keeps_its_traceback_and_ends_with_its_cause(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: object, **__: object) -> None:
        raise ValueError("ours")

    monkeypatch.setattr(stages, "run", end)
    outcome = door("model.path=m", "data.train=[{path: a}]")
    assert outcome.code == 1
    assert "Traceback" in outcome.stderr
    assert outcome.last_line == "ValueError: ours"
    monkeypatch.setattr(roll_sft.run, "build_config", end)
    outcome = door("model.path=m")
    assert (outcome.code, outcome.last_line) == (1, "ValueError: ours")
    assert "Traceback" in outcome.stderr


def test_nothing_is_reported_to_anyone_unless_asked_for(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in roll_sft.run.QUIET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DO_NOT_TRACK", "asked for")
    door("--cfg", "job")
    values = {name: os.environ[name] for name in roll_sft.run.QUIET}
    assert values == {**roll_sft.run.QUIET, "DO_NOT_TRACK": "asked for"}


def test_flags_may_stand_anywhere_among_the_overrides(door: Door, tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    (tmp_path / "a=b" / "mine.yaml").write_text("defaults: [base, _self_]\nseed: 7\n")
    given = ["run_name=x", "--config-dir", "a=b", "train.max_steps=3", "--cfg", "job"]
    outcome = door(*given, "--config-name", "mine", "data.num_proc=2")
    assert outcome.code == 0, outcome.stderr
    shown = yaml.safe_load(outcome.stdout)
    assert (shown["run_name"], shown["seed"]) == ("x", 7)
    assert (shown["train"]["max_steps"], shown["data"]["num_proc"]) == (3, 2)


def test_what_a_value_brings_along_cannot_steer_the_terminal(door: Door) -> None:
    outcome = door("--config-name", "x\x1b[31m\x9b2J")
    refused(outcome, 2, r"x\x1b[31m\x9b2J", "base, demo")
    assert outcome.last_line.isprintable()
