"""The door without Ray: torchrun drives the engine with floors 0 to 2 alone.

Every process here is one of a bare machine (`tests/bare`), which has no package that only floors
above need.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.checkpoint import tensors
from roll_sft.checkpoint.publish import publish_step, staging_folder
from roll_sft.job.in_process import prepare_job
from roll_sft.torchrun import steps_to_make
from tests import parity

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "bare")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        arguments, capture_output=True, text=True, env=environment, timeout=200, check=False
    )


@pytest.mark.slow
def test_torchrun_trains_like_transformers_and_saves(tmp_path: Path) -> None:
    parity.write_model(tmp_path / "model")
    parity.write_rows(tmp_path / "rows.jsonl")
    layout = {"num_workers": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    config = parity.parity_config(tmp_path, parallel=layout)
    # JSON is YAML; what `--cfg job --resolve` prints is read the same way.
    (tmp_path / "run.yaml").write_text(json.dumps({**dataclasses.asdict(config), "hydra": {}}))
    door = ["-m", "roll_sft.torchrun", "--config", str(tmp_path / "run.yaml"), "--steps", "3"]
    result = run([*TORCHRUN, "--nproc-per-node", "2", *door, "--save", str(tmp_path / "out")])
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    losses = [float(loss) for loss in re.findall(r"step \d/3  loss (\S+)", result.stdout)]
    wanted, _ = parity.reference_run(prepare_job(config))
    assert losses == pytest.approx([step["loss"] for step in wanted[:3]], rel=1e-6)
    assert (tmp_path / "out" / "latest").read_text().strip() == "step_00000003"
    door[-1] = "5"
    result = run(
        [*TORCHRUN, "--nproc-per-node", "2", *door, "--load", str(tmp_path / "out/step_00000003")]
    )
    losses = [float(loss) for loss in re.findall(r"step \d/5  loss (\S+)", result.stdout)]
    assert losses == pytest.approx([step["loss"] for step in wanted[3:5]], rel=1e-6), result.stderr


def test_steps_count_from_the_beginning_and_are_never_taken_back(tmp_path: Path) -> None:
    """Else a checkpoint of step 3 would be published as one of step 2."""
    parity.write_model(tmp_path / "model", kind="qwen2-tied", num_layers=1)
    parity.write_rows(tmp_path / "rows.jsonl")
    config = parity.parity_config(tmp_path)
    job = prepare_job(config)
    staging = staging_folder(tmp_path / "run", 3)
    tensors.write(staging, [], objects={}, writer=tensors.Writer(0, 1, optimizer_step=3))
    loads = publish_step(
        job.state, job.planner.step(3), staging=staging, save_assets=job.save_assets
    )
    assert steps_to_make(job, steps=None, loads=None) == (1, job.total_steps)
    assert steps_to_make(job, steps=5, loads=loads) == (4, 5)
    assert steps_to_make(job, steps=3, loads=loads) == (4, 3), "saved anew, on another layout"
    for steps, said in ((2, "2 steps are fewer than the 3 of"), (0, "0 must"), (-5, "-5 must")):
        with pytest.raises(ConfigError, match=f"--steps: {said}"):
            steps_to_make(job, steps=steps, loads=loads)
    other = replace(config, seed=config.seed + 1)
    with pytest.raises(ConfigError, match=r"\bseed\b"):
        steps_to_make(prepare_job(other), steps=5, loads=loads)


@pytest.mark.slow
def test_a_bad_value_ends_with_its_code_and_one_line(tmp_path: Path) -> None:
    parity.write_model(tmp_path / "model")
    config = dataclasses.asdict(parity.parity_config(tmp_path))
    config["train"]["learning_rate"] = -1.0
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "roll_sft.torchrun", "--config", str(tmp_path / "run.yaml")]
    os.environ["WORLD_SIZE"] = "1"
    try:
        result = run(command)
    finally:
        del os.environ["WORLD_SIZE"]
    assert result.returncode == 2
    assert "train.learning_rate: -1.0 must be above 0" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bare_machine_lacks_what_it_should() -> None:
    code = """
import importlib.metadata
for name in ("ray", "omegaconf", "pyarrow"):
    try:
        __import__(name)
        print("imported", name)
    except ModuleNotFoundError:
        pass
    try:
        importlib.metadata.version(name)
        print("found", name)
    except importlib.metadata.PackageNotFoundError:
        pass
"""
    result = run([sys.executable, "-c", code])
    assert (result.stdout, result.stderr) == ("", "")


@pytest.mark.slow
@pytest.mark.long
def test_the_gpu_checks_run_on_a_cpu_as_far_as_they_can() -> None:
    script = ROOT / "tests" / "gpu" / "check.py"
    # Compiled code has tests of its own, and takes a compiler's time.
    some = ["--only", "kernels", "engine", "waits", "repeats"]
    result = run([*TORCHRUN, str(script), "--device", "cpu", *some])
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("ok  ") >= 5
    assert "FAIL" not in result.stdout


@pytest.mark.slow
@pytest.mark.long
def test_the_gpu_benchmark_runs_on_a_cpu() -> None:
    script = ROOT / "benchmarks" / "gpu" / "step.py"
    result = run([*TORCHRUN, str(script), "--device", "cpu"])
    assert result.returncode == 0, result.stdout + result.stderr
    measures = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    names = {measure["name"]: measure["ratio"] for measure in measures}
    assert {"mfu", "packed_over_unpadded", "our_step_over_bare_torch"} < names.keys()
    assert all(ratio > 0 for ratio in names.values())
