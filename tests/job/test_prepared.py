"""What preparing hands over to training, in files."""

from pathlib import Path

import pytest

from roll_sft.job.prepare import prepare
from roll_sft.job.prepared import read_prepared, write_prepared
from tests import parity


@pytest.mark.parametrize("kind", ["qwen2", "gemma3", "phi3_partial"])
def test_the_shape_of_the_model_is_read_as_it_was_written(kind: str, tmp_path: Path) -> None:
    parity.write_model(tmp_path / "model", kind=kind)
    parity.write_rows(tmp_path / "rows.jsonl")
    prepared = prepare(parity.parity_config(tmp_path))
    write_prepared(prepared, tmp_path / "job")
    found = read_prepared(prepared.config, tmp_path / "job").source.shape
    assert found == prepared.source.shape
