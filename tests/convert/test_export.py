"""Checkpoint folders: what makes one complete, and what an export does with one."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from roll_sft.base.errors import CheckpointError
from roll_sft.base.layout import ParallelLayout
from roll_sft.checkpoint.manifest import MANIFEST, RunState
from roll_sft.checkpoint.publish import publish, staging_folder
from roll_sft.checkpoint.reader import Reader
from roll_sft.config.schema import layout_of
from roll_sft.convert import command
from roll_sft.job.in_process import prepare_job
from tests import parity
from tests.pool import RankPool

STATE = RunState(
    step=3,
    epoch=0,
    samples_seen_in_epoch=12,
    seed=1,
    global_batch_size=4,
    global_batch_tokens=None,
    sequence_length=64,
    sources={"rows": "0123"},
    layout=ParallelLayout(2, 2),
    dtype="fp32",
)


def test_a_published_folder_has_a_manifest_that_verifies(tmp_path: Path) -> None:
    staging = staging_folder(tmp_path, 3)
    (staging / "hf_assets").mkdir()
    (staging / "hf_assets" / "config.json").write_text("{}")
    (staging / "shard").write_bytes(b"weights")
    final = publish(staging, state=STATE, versions={"torch": "2"})
    assert final == tmp_path / "step_00000003"
    assert (tmp_path / "latest").read_text().strip() == final.name
    assert not staging.exists()
    manifest = json.loads((final / MANIFEST).read_text())
    assert manifest["step"] == 3
    assert manifest["layout"]["tensor_size"] == 2
    found = {p for p in final.rglob("*") if p.is_file() and p.name != MANIFEST}
    assert {final / name for name in manifest["files"]} == found
    for name, facts in manifest["files"].items():
        content = (final / name).read_bytes()
        assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_killed_attempt_is_cleared_and_never_named_a_step(tmp_path: Path) -> None:
    (staging_folder(tmp_path, 3) / "half").write_bytes(b"x")
    assert not list(tmp_path.glob("step_*"))
    assert not list(staging_folder(tmp_path, 3).iterdir())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, pool: RankPool) -> Path:
    """A published checkpoint of TP2 x PP2, model and optimizer."""
    root = tmp_path_factory.mktemp("export")
    parity.write_model(root / "model")
    parity.write_rows(root / "rows.jsonl")
    layout = {"num_workers": 4, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    config = parity.parity_config(root, parallel=layout, train={"max_steps": 1})
    staging = staging_folder(root / "checkpoints", 1)
    pool.run(parity.engine_run, layout_of(config.parallel), config, staging)
    parity.export_run(prepare_job(config), staging, root / "hf")
    return root / "checkpoints" / "step_00000001"


@pytest.mark.slow
def test_the_export_keeps_the_source_dtype_and_rounds_on_request(
    checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    plain = load_file(checkpoint.parents[1] / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in plain.values()} == {torch.float32}
    arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "half")]
    assert command.main([*arguments, "--dtype", "bf16"]) == 0
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert half.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(half[name], tensor.bfloat16()), name
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow
def test_a_folder_that_is_no_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(tmp_path), "--output", str(tmp_path / "hf")]
    assert command.main(arguments) == 6
    assert "manifest.json" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_shard_gives_one_line_and_no_model(
    damage: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "step_00000001"
    shutil.copytree(checkpoint, copy)
    for shard in copy.glob("*.distcp"):
        if damage == "missing":
            shard.unlink()
        else:
            shard.write_bytes(shard.read_bytes()[:100])
    assert command.main(["--checkpoint", str(copy), "--output", str(tmp_path / "hf")]) == 6
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert str(copy) in last_line
    assert "damaged" in last_line
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
def test_a_damaged_number_of_bytes_is_seen_by_the_reader_too(
    checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "step_00000001"
    shutil.copytree(checkpoint, copy)
    for shard in copy.glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"index\.json.*__0_0\.distcp"):
        Reader(copy)
    with pytest.raises(CheckpointError, match=r"nothing\.weight\b"):
        Reader(checkpoint).read("decoder.layers.0.nothing.weight")


@pytest.mark.slow
def test_a_model_in_the_way_is_kept_unless_told(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "hf")]
    assert command.main(arguments) == 0
    assert command.main(arguments) == 6
    assert "not empty" in capsys.readouterr().err.splitlines()[-1]
    assert command.main([*arguments, "--replace"]) == 0
