"""`roll-sft parity`, from the command line to the exit code, and every shipped configuration."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from roll_sft import run
from roll_sft.base.errors import ConfigError
from roll_sft.demo import demo
from roll_sft.job.in_process import prepare_job
from roll_sft.parity import command as parity_command
from tests import faulty_worker, parity
from tests.doors import cells
from tests.outcome import Outcome
from tests.pool import RankPool

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def command(module: str, folder: Path, *arguments: str) -> Outcome:
    """`python -m module parity arguments` in `folder`, as the user starts it."""
    environment = {**os.environ, "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", module, "parity", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    return Outcome(result.returncode, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and rows.jsonl."""
    root = tmp_path_factory.mktemp("command")
    parity.write_model(root / "model")
    parity.write_rows(root / "rows.jsonl")
    return root


def test_the_demonstration_is_green_and_leaves_logs_alone(tmp_path: Path) -> None:
    demo.make_assets(tmp_path / demo.ASSETS)
    outcome = command("roll_sft.cli", tmp_path, "--config-name", "demo", "--samples", "3")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.startswith("demo beside transformers: 3 samples on 2 workers")
    assert "parallel.use_distributed_optimizer is off here" in outcome.stderr
    for what in ("outputs of 26 modules", "tokens lost", "loss", "gradient norm"):
        assert cells(outcome.stdout, what)[3] == "ok"
    assert {path.name for path in (tmp_path / "outputs" / "demo").iterdir()} == {"parity"}
    left = {path.name for path in (tmp_path / "outputs" / "demo" / "parity").iterdir()}
    assert left == {".lock", "logs"}


@pytest.mark.long
def test_a_fault_in_the_workers_is_red_and_the_last_line_names_where(folder: Path) -> None:
    outcome = command(
        faulty_worker.__name__,
        folder,
        *stand_in(folder),
        "parallel.num_workers=2",
        "parallel.tensor_model_parallel_size=2",
    )
    assert outcome.code == 1, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.last_line.startswith("parity: the loss of rows:")
    assert "the gradient of lm_head.weight (output_layer.weight)" in outcome.last_line
    assert cells(outcome.stdout, "outputs of 26 modules")[3] == "ok"
    assert cells(outcome.stdout, "loss")[3] == "differs"


def test_a_model_with_experts_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parity.write_model(tmp_path / "model", kind="qwen3moe", num_layers=1)
    parity.write_rows(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.path: Qwen3MoeForCausalLM has experts"):
        parity_command.run(parity.parity_config(tmp_path), samples=None)


# Both ask for eight ranks; four of them take turns with the axes here.
@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("qwen7b_sft", "pipeline_model_parallel_size"),  # TP 2 x DP 2
        ("qwen7b_long_sft", "pipeline_model_parallel_size"),  # TP 2 x CP 2
        ("qwen7b_long_sft", "context_parallel_size"),  # TP 2 x PP 2
    ],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_main_configurations_are_green(
    name: str, axis: str, dtype: str, folder: Path, pool: RankPool, tmp_path: Path
) -> None:
    composed = run.compose(
        [
            f"--config-name={name}",
            *stand_in(folder),
            f"model.dtype={dtype}",
            "parallel.use_distributed_optimizer=false",
            "parallel.num_workers=4",
            f"parallel.{axis}=1",
        ]
    )
    assert composed is not None
    job = prepare_job(composed[0])
    parity.write_reference_of(job, tmp_path / "reference")
    verdict = parity.compared(job, pool, tmp_path / "reference")
    print({check.what: f"{check.measured:.1e}" for check in verdict.checks})
    assert verdict.first_difference is None


def stand_in(folder: Path) -> list[str]:
    """What puts a small model and its data into a shipped configuration."""
    return [
        f"model.path={folder / 'model'}",
        f"data.train=[{{path: {folder / 'rows.jsonl'}}}]",
        f"data.cache_dir={folder / 'cache'}",
        "data.sequence_length=200",
        "train.micro_batch_tokens=400",
        "parallel.device=cpu",
    ]
