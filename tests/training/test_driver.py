"""Real runs through the main job's door, on a real cluster: what they leave, and how they end."""

import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import roll_sft.run
from roll_sft.base.metrics import StepRecord
from roll_sft.checkpoint.resume import step_folders
from roll_sft.data.steps.objective import TOLD
from roll_sft.report import command, starts
from roll_sft.runtime import group
from roll_sft.runtime.worker import Worker
from roll_sft.signals import REPEAT_S
from tests import slow_worker
from tests.parity import write_model, write_rows
from tests.runtime.ray_cluster import Program, is_alive, two_nodes, wait_until

pytestmark = pytest.mark.slow

NUM_ROWS, BATCH, STEPS = 24, 7, 4
STEP_KEYS = [
    "step",
    "epoch",
    "train_loss",
    "grad_norm",
    "learning_rate",
    "supervised_tokens",
    "total_tokens",
    "total_tokens_including_padding",
    "per_device_tps",
    "per_device_tps_including_padding",
    "step_time_s",
    "data_wait_s",
    "mfu",
    "peak_memory_gib",
    "dp_imbalance",
    "pack_fill",
    "sample_ids_sha256",
]


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    write_model(folder / "model", kind="qwen2-tied", num_layers=2)
    write_rows(folder / "rows.jsonl", num_rows=NUM_ROWS)
    write_rows(folder / "validation.jsonl", num_rows=9)
    return folder


@pytest.fixture(scope="module")
def door():
    """The main job in this process; what it changes here is put back."""
    handler, logger = signal.getsignal(signal.SIGTERM), logging.getLogger("roll_sft")
    environment, propagate = dict(os.environ), logger.propagate
    # The report of each run in this process, which imports matplotlib once for all.
    with patch.object(starts, "make_report", lambda folder: command.make([folder], None)):
        yield lambda arguments: roll_sft.run.main(arguments)
    signal.signal(signal.SIGTERM, handler)
    os.environ.clear()
    os.environ.update(environment)
    logger.handlers.clear()
    logger.propagate = propagate


def arguments_of(assets: Path, output: Path, **overrides: object) -> list[str]:
    keys: dict[str, object] = {
        "output_dir": output,
        "model.path": assets / "model",
        "data.train": f"[{{path: {assets / 'rows.jsonl'}, name: chat}}]",
        "data.validation": f"[{{path: {assets / 'validation.jsonl'}, name: held_out}}]",
        "data.sequence_length": 200,
        "data.cache_dir": output.parent / "cache",
        "train.global_batch_size": BATCH,
        "train.learning_rate": 1e-3,
        "train.log_samples": True,
        "parallel.num_workers": 2,
        "parallel.device": "cpu",
    }
    keys |= {name.replace("__", "."): value for name, value in overrides.items()}
    return [f"{key}={value}" for key, value in keys.items()]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def num_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture(scope="module")
def run(assets, door, tmp_path_factory):
    """The folder of a finished run on two data ranks."""
    output = tmp_path_factory.mktemp("runs") / "first"
    overrides = {
        "cluster__address": two_nodes().address,
        "train__save_steps": 2,
        "train__eval_steps": 3,
        "train__logging_steps": 2,
    }
    assert door(arguments_of(assets, output, **overrides)) == 0
    return output


# What a run leaves


def test_every_file_of_the_contract_is_there_and_no_other(run):
    names = {path.name for path in run.iterdir()}
    assert names == {
        ".lock",
        ".mlflow_run",
        ".tracking.json",
        "checkpoints",
        "config.yaml",
        "data_report.json",
        "eval.jsonl",
        "hf",
        "job",
        "logs",
        "loss.png",
        "mlflow",
        "report.html",
        "samples.jsonl",
        "starts.jsonl",
        "steps.jsonl",
    }
    assert {path.name for path in (run / "logs").iterdir()} == {"rank_00.log", "rank_01.log"}


def test_every_step_has_a_line_with_exactly_the_keys_of_the_contract(run):
    steps = lines_of(run / "steps.jsonl")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    for step in steps:
        assert list(step) == STEP_KEYS == list(StepRecord.__dataclass_fields__)
        assert step["mfu"] is None
        assert step["total_tokens_including_padding"] >= step["total_tokens"]
        assert step["total_tokens"] > step["supervised_tokens"] > 0
        assert step["step_time_s"] > step["data_wait_s"] >= 0
        assert step["per_device_tps"] == pytest.approx(
            step["total_tokens"] / step["step_time_s"] / 2
        )
        assert step["dp_imbalance"] >= 1
    assert [step["epoch"] for step in steps] == [7 / 24, 14 / 24, 21 / 24, 1.0]
    assert steps[-1]["train_loss"] < steps[0]["train_loss"]


def test_samples_of_a_step_are_named_by_source_and_row_and_hashed_in_order(run):
    samples, steps = lines_of(run / "samples.jsonl"), lines_of(run / "steps.jsonl")
    assert [line["step"] for line in samples] == [step["step"] for step in steps]
    for line, step in zip(samples, steps, strict=True):
        digest = hashlib.sha256("\n".join(line["samples"]).encode()).hexdigest()
        assert digest == step["sample_ids_sha256"]
    names = [name for line in samples for name in line["samples"]]
    assert sorted(names) == sorted(f"chat:{row}" for row in range(NUM_ROWS))
    assert names != [f"chat:{row}" for row in range(NUM_ROWS)], "not shuffled"
    assert [len(line["samples"]) for line in samples] == [7, 7, 7, 3]


def test_validation_loss_is_that_of_transformers_on_the_exported_model(run, assets):
    evaluations = lines_of(run / "eval.jsonl")
    keys = ["step", "name", "loss", "perplexity", "supervised_tokens", "time_s"]
    keys += ["token_accuracy", "best_loss", "best_step", "parts"]
    assert [list(line) for line in evaluations] == [keys, keys]
    assert [(line["step"], line["name"]) for line in evaluations] == [
        (3, "held_out"),
        (STEPS, "held_out"),
    ]
    loss, supervised = transformers_loss(run / "hf", lines_of(assets / "validation.jsonl"))
    assert evaluations[-1]["supervised_tokens"] == supervised
    assert evaluations[-1]["loss"] == pytest.approx(loss, rel=1e-6)


def transformers_loss(folder: Path, rows: list[dict]) -> tuple[float, int]:
    """Mean cross-entropy of all answers, and their number of tokens: by rendering prefixes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    total, count = 0.0, 0
    for row in rows:
        messages = row["messages"]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            question = tokenizer.apply_chat_template(
                messages[:index], add_generation_prompt=True, return_dict=False
            )
            last = ids.index(end, len(question))
            for position in range(len(question), last + 1):
                total -= log_probabilities[position - 1, ids[position]].item()
                count += 1
    return total / count, count


def test_checkpoints_are_complete_and_their_files_are_those_of_the_manifest(run):
    checkpoints = run / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {
        "step_00000002",
        "step_00000004",
        "latest",
    }
    assert (checkpoints / "latest").read_text() == "step_00000004\n"
    for step in (2, STEPS):
        folder = checkpoints / f"step_{step:08d}"
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["step"] == step
        assert manifest["samples_seen_in_epoch"] == min(step * BATCH, NUM_ROWS)
        assert manifest["layout"]["world_size"] == 2
        assert {"torch", "megatron-core"} <= set(manifest["versions"])
        found = {
            str(path.relative_to(folder)): {
                "size": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in folder.rglob("*")
            if path.is_file() and path.name != "manifest.json"
        }
        assert manifest["files"] == found
        assert any(name.endswith(".distcp") for name in found)


def test_exported_model_answers_through_transformers_and_stops_at_the_end_of_turn(run):
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    assert "<|im_start|>" in tokenizer.chat_template
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    stops = model.generation_config.eos_token_id
    assert end in (stops if isinstance(stops, list) else [stops])
    messages = [{"role": "user", "content": "one more"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    length = prompt["input_ids"].shape[1]
    assert model.generate(**prompt, do_sample=False, max_new_tokens=4).shape[1] > length
    # A model that has learnt to say nothing: it must stop there, by what the export says alone.
    with torch.no_grad():
        hidden = model(**prompt, output_hidden_states=True).hidden_states[-1][0, -1]
        model.lm_head.weight[end] = 100 * hidden / hidden.norm() ** 2
    said = model.generate(**prompt, do_sample=False, max_new_tokens=8)[0, length:]
    assert said.tolist() == [end]


def test_configuration_is_kept_as_composed_and_the_data_as_counted(run):
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["train"]["global_batch_size"] == BATCH
    assert kept["train"]["warmup_ratio"] == 0.03, "a default is missing"
    report = json.loads((run / "data_report.json").read_text())
    (source,) = report["sources"]
    assert (source["name"], source["rows"], source["kept"]) == ("chat", NUM_ROWS, NUM_ROWS)
    assert report["validation"][0]["name"] == "held_out"


def test_mlflow_has_the_run_beside_the_folder_with_what_steps_jsonl_has(run):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("roll_sft")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    params, tags = found.data.params, found.data.tags
    assert params["train.global_batch_size"] == str(BATCH)
    assert (params["data.train"], params["data.validation"]) == ("chat", "held_out")
    assert not [key for key in params if key.startswith(("lora.", "evaluation.", "tracking."))]
    assert (tags["layout"], tags["device"]) == ("TP 1, PP 1, CP 1, DP 2", "2 x CPU")
    assert tags["version.torch"] == version("torch")
    assert tags["host"] == os.uname().nodename
    assert len(tags["mlflow.source.git.commit"]) == 40
    (source,) = json.loads((run / "data_report.json").read_text())["sources"]
    chat, held_out = found.inputs.dataset_inputs
    assert (chat.dataset.name, held_out.dataset.name) == ("chat", "held_out")
    assert json.loads(chat.dataset.profile)["tokens"] == source["tokens"]
    losses = {step["step"]: step["train_loss"] for step in lines_of(run / "steps.jsonl")}
    for name in ("train/loss", "train_loss"):
        history = client.get_metric_history(found.info.run_id, name)
        assert {point.step: point.value for point in history} == {2: losses[2], 4: losses[4]}
    evaluations = client.get_metric_history(found.info.run_id, "eval/held_out/loss")
    assert [point.step for point in evaluations] == [3, 4]
    artifacts = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert artifacts == {"config.yaml", "data_report.json", "loss.png", "model"}


@pytest.mark.long
def test_a_run_stops_early_tells_its_terms_and_exports_its_best_checkpoint(
    assets, door, tmp_path, capfd
):
    output = tmp_path / "run"
    overrides = {
        "cluster__address": two_nodes().address,
        "parallel__num_workers": 1,
        "tracking__backends": "[jsonl]",
        "train__eval_steps": 1,
        "train__early_stopping": "held_out",
        "train__early_stopping_patience": 1,
        "train__early_stopping_min_delta": 1000,  # no step improves so much
        "train__z_loss_coef": 1e-3,
        "checkpoint__keep_best": "held_out",
    }
    assert door(arguments_of(assets, output, **overrides)) == 0
    assert "early stopping after step 2: 1 evaluations" in capfd.readouterr().err
    assert [line["step"] for line in lines_of(output / "eval.jsonl")] == [1, 2]
    for step in (steps := lines_of(output / "steps.jsonl")):
        assert list(step) == [*STEP_KEYS, *TOLD]
        terms = step["train_loss"] + step["z_loss"] + step["label_smoothing_loss"]
        assert step["objective"] == pytest.approx(terms, rel=1e-6)
        assert step["z_loss"] > 0
    assert len(steps) == 2
    assert [path.name for path in step_folders(output / "checkpoints")] == ["step_00000002"]
    assert (output / "hf" / "config.json").exists()
    assert door(arguments_of(assets, output, **overrides)) == 0
    told = capfd.readouterr().err
    assert "early stopping after step 2" in told
    assert "it is finished" in told


def test_finished_run_started_again_says_so_and_changes_nothing(run, assets, door, capfd):
    before = (run / "steps.jsonl").read_bytes()
    assert door(arguments_of(assets, run)) == 0
    assert "has all 4 steps of this run: it is finished" in capfd.readouterr().err
    assert door(arguments_of(assets, run, resume="none")) == 2
    assert "already holds checkpoints up to step_00000004" in capfd.readouterr().err
    assert (run / "steps.jsonl").read_bytes() == before


# How a run ends when something breaks


@pytest.fixture
def meanwhile():
    """Runs a function beside the main job."""
    threads: list[threading.Thread] = []

    def start(action):
        threads.append(threading.Thread(target=action))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()


def pid_of(run: Path, rank: int) -> int:
    log = (run / "logs" / f"rank_{rank:02d}.log").read_text()
    return int(log.partition("pid ")[2].partition(")")[0])


def test_killed_worker_ends_the_run_with_one_line_that_names_it(
    assets, door, meanwhile, tmp_path, capfd
):
    output, killed = tmp_path / "runs" / "killed", {}
    steps = output / "steps.jsonl"

    def kill():
        wait_until(lambda: num_lines(steps) > 2, timeout_s=120, what="steps")
        killed["workers"] = [psutil.Process(pid_of(output, rank)) for rank in (0, 1)]
        killed["at"] = time.monotonic()
        killed["workers"][1].kill()

    meanwhile(kill)
    overrides = {
        "cluster__address": two_nodes().address,
        "cluster__max_restarts": 0,
        "train__max_steps": 5000,
    }
    code = door(arguments_of(assets, output, **overrides))
    seconds = time.monotonic() - killed["at"]
    output_text, errors = capfd.readouterr()
    assert code == 7
    assert seconds < 15
    host = os.uname().nodename
    *others, last = errors.splitlines()
    assert last.startswith(f"rank 1 on {host} (")
    assert " died during step " in last
    assert "it was killed, by a signal or by the kernel for want of memory" in last
    assert last.endswith(str(output / "logs" / "rank_01.log"))
    is_plain = re.compile(r"\d{4}-\d\d-\d\d [\d:]{8} (?!warning: |error: )")
    assert not [line for line in others if not is_plain.match(line)]
    assert "no checkpoint was made yet: the same command begins again with step 1" in errors
    assert "Traceback" not in errors + output_text
    assert "(raylet)" not in errors
    assert not any(map(is_alive, killed["workers"]))
    recorded = [line["step"] for line in lines_of(steps)]
    assert recorded == list(range(1, len(recorded) + 1))


@pytest.mark.long
def test_token_cache_that_vanishes_ends_the_run_with_its_name_and_the_exit_code_of_data(
    assets, door, meanwhile, tmp_path, capfd
):
    output = tmp_path / "runs" / "vanished"

    def remove():
        wait_until(lambda: num_lines(output / "steps.jsonl") > 0, timeout_s=120, what="a step")
        shutil.rmtree(tmp_path / "runs" / "cache")

    meanwhile(remove)
    overrides = {
        "cluster__address": two_nodes().address,
        "train__eval_steps": 100,
        "train__max_steps": 100,
        "tracking__backends": "[jsonl]",
    }
    assert door(arguments_of(assets, output, **overrides)) == 3
    errors = capfd.readouterr().err
    last = errors.splitlines()[-1]
    assert last.startswith("rank ")
    assert "failed during evaluation of held_out" in last
    assert str(tmp_path / "runs" / "cache") in last
    assert "Traceback" not in errors
    assert num_lines(output / "steps.jsonl") == 100


@pytest.mark.parametrize(
    ("number", "is_repeated"),
    [
        (signal.SIGTERM, False),
        # Ctrl-C, and again after a while
        pytest.param(signal.SIGINT, True, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_the_group_of_the_driver_saves_and_a_second_one_ends_at_once(
    number, is_repeated, assets, tmp_path
):
    output = tmp_path / "runs" / "signalled"
    module = slow_worker.__name__ if is_repeated else "tests.runtime.light"
    arguments = arguments_of(assets, output, train__max_steps=100_000)
    program = Program("-m", module, *arguments, folder=tmp_path)
    try:
        steps = output / "steps.jsonl"
        program.wait_until(lambda: num_lines(steps) > 2, timeout_s=120, what="steps")
        program.wait_until((output / ".mlflow_run").exists, timeout_s=120, what="MLflow's run")
        assert len(program.left) > 5
        program.signal(number, whole_group=True)
        if is_repeated:
            writing = functools.partial((output / "checkpoints").glob, ".staging*/*.distcp")
            program.wait_until(lambda: [*writing()], timeout_s=60, what="a save")
            time.sleep(REPEAT_S)
            program.signal(number, whole_group=True)
        assert program.wait(timeout_s=90) == (130 if is_repeated else 75)
    finally:
        program.close()
    step, last_line = num_lines(steps), program.errors.splitlines()[-1]
    saved = output / "checkpoints" / f"step_{step:08d}"
    if is_repeated:
        assert last_line.startswith("ended by a second signal, SIGINT: no checkpoint was made yet")
        assert not saved.exists()
    else:
        going_on = f"{saved} is kept: the same command goes on from it"
        assert last_line == f"ended by {number.name}: {going_on}"
        assert json.loads((saved / "manifest.json").read_text())["step"] == step
    assert "Traceback" not in program.errors
    assert (output / ".mlflow_run").read_text().endswith(" KILLED\n")


def test_driver_killed_during_a_save_leaves_no_process_and_no_checkpoint(assets, tmp_path):
    output = tmp_path / "runs" / "killed"
    overrides = {"train__max_steps": 1, "data__validation": "[]"}
    arguments = arguments_of(assets, output, **overrides)
    program = Program("-m", slow_worker.__name__, *arguments, folder=tmp_path)
    try:
        checkpoints = output / "checkpoints"
        writing = functools.partial(checkpoints.glob, ".staging*/*.distcp")
        started = functools.partial((output / "logs").glob, "rank_*.log")
        program.wait_until(lambda: len([*started()]) == 2, timeout_s=120, what="workers")
        assert len(program.left) > 5
        program.wait_until(lambda: [*writing()], timeout_s=120, what="a save")
        program.signal(signal.SIGKILL)
        assert program.wait(timeout_s=5) == -signal.SIGKILL
    finally:
        program.close()
    assert not [*checkpoints.glob("step_*")]
    assert not (checkpoints / "latest").exists()


def one_rank_cannot_write() -> type[Worker]:
    """Workers whose rank 1 meets an error of its disk in the save of step 4, once a folder.

    Made in a function, the class travels to the workers by value.
    """

    class Failing(Worker):
        def setup(self, *args: Any) -> str | None:
            name = super().setup(*args)
            from roll_sft.checkpoint import tensors

            write_file, fired = tensors._write_file, self._spec.logs / "fault_fired"

            def failing(path: Path, *rest: Any, **options: Any) -> Any:
                if self._spec.rank == 1 and "00000004" in str(path) and not fired.exists():
                    fired.touch()
                    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
                return write_file(path, *rest, **options)

            tensors._write_file = failing
            return name

    return Failing


def test_a_save_that_fails_on_one_rank_ends_the_run_and_the_same_command_goes_on(
    assets, door, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(group, "Worker", one_rank_cannot_write())
    output = tmp_path / "runs" / "failing"
    overrides = {
        "cluster__address": two_nodes().address,
        "train__save_steps": 2,
        "train__max_steps": 6,
        "train__num_train_epochs": 3,
        "checkpoint__async_save": True,
        "checkpoint__keep_last": 3,
        "checkpoint__hf_export": "none",
        "data__validation": "[]",
        "tracking__backends": "[jsonl]",
    }
    started = time.monotonic()
    assert door(arguments_of(assets, output, **overrides)) == 6
    assert time.monotonic() - started < 60
    assert (output / "logs" / "fault_fired").exists(), "the fault did not happen"
    last_line = capfd.readouterr().err.splitlines()[-1]
    assert last_line.startswith("rank 1 on ")
    assert "cannot be written" in last_line
    assert "Input/output error" in last_line
    checkpoints = output / "checkpoints"
    assert [path.name for path in checkpoints.glob("step_*")] == ["step_00000002"]
    assert door(arguments_of(assets, output, **overrides)) == 0
    assert [line["step"] for line in lines_of(output / "steps.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert f"goes on from {checkpoints / 'step_00000002'}" in capfd.readouterr().err
