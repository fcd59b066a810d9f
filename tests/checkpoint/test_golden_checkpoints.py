"""Checkpoints that earlier versions wrote, one for each schema: they still load, to the last bit.

Each is of step 2 of one run of four: Qwen2 with a tied head, one rank, fp32, with its optimizer.
What steps 3 and 4 came to was written down when the checkpoint was made.
"""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from roll_sft.base.errors import CheckpointError
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.convert import command
from tests import parity
from tests.checkpoint.test_resume import PP2, TP2, steps_of
from tests.pool import RankPool

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden"
SCHEMAS = (2,)
STEPS = [(197.5707244873047, 0.9811102299856096), (203.67132568359375, 0.9500517780850055)]
MODEL_SHA256 = "6c6dd36c3e3951a995c18f193ad143f51bb34d725e4549a9cdb7c893b78eb437"


@pytest.fixture(scope="module", params=SCHEMAS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"schema_{request.param}") / "step_00000002"
    with tarfile.open(GOLDEN / f"checkpoint_schema_{request.param}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    assert json.loads((folder / "manifest.json").read_text())["schema"] == request.param
    return folder


def config_of(checkpoint: Path, parallel: dict[str, Any]) -> RunConfig:
    """The configuration of the run, on another layout."""
    folder = checkpoint.parent
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(8):
            question = f"What is the sum of {number} and {number + 1}?"
            answer = f"The answer is {2 * number + 1}."
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return parity.parity_config(
        folder,
        model={"path": str(checkpoint / "hf_assets"), "random_init": True},
        train={"max_steps": 4, "global_batch_size": 4, "num_train_epochs": 3},
        parallel=parallel,
    )


@pytest.mark.parametrize("parallel", [{"num_workers": 1}, TP2, PP2], ids=["1", "TP2", "PP2"])
def test_a_run_goes_on_from_it(parallel: dict[str, Any], checkpoint: Path, pool: RankPool) -> None:
    config = config_of(checkpoint, parallel)
    ranks = pool.run(steps_of, layout_of(config.parallel), config, 3, 4, checkpoint, None)
    (steps,) = [rank for rank in ranks if rank]
    for (loss, norm, _), (wanted_loss, wanted_norm) in zip(steps, STEPS, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-6)
        assert norm == pytest.approx(wanted_norm, rel=1e-5)


def test_it_converts_to_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    assert command.main([str(checkpoint), "--output", str(tmp_path / "hf")]) == 0
    content = (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == MODEL_SHA256


def test_one_of_a_later_schema_is_refused_by_its_number(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = checkpoint / "manifest.json"
    original = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(original), "schema": 3}))
    try:
        code = command.main([str(checkpoint), "--output", str(tmp_path / "hf")])
    finally:
        manifest.write_text(original)
    assert code == CheckpointError.exit_code
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{checkpoint}: ")
    assert "schema 3" in line
