"""The model card of an export: what it shows of the run around the checkpoint."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from roll_sft.config import RunConfig
from roll_sft.config_build import build_config
from roll_sft.data.prepare import SourceReport
from roll_sft.engine import card
from roll_sft.engine.card import write_card


def write_run(run: Path) -> Path:
    """A run's own files, with a hostile name of a source; returns its checkpoint."""
    checkpoint = run / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    manifest = {"step": 2, "versions": {"torch": "2"}, "layout": {"tensor_size": 2}}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    config: RunConfig = build_config({"model": {"path": "/secret/place/Base-7B"}})
    (run / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    counts = dict.fromkeys(("rows", "kept", "tokens", "supervised_tokens"), 1234)
    assert counts.keys() <= {field.name for field in dataclasses.fields(SourceReport)}
    report = {"sources": [{"name": "a|b <script>", **counts}]}
    (run / "data_report.json").write_text(json.dumps(report))
    losses = [{"step": step, "train_loss": 3.0 / step} for step in (1, 2, 3)]
    (run / "steps.jsonl").write_text("\n".join(map(json.dumps, losses)))
    (run / "eval.jsonl").write_text(json.dumps({"step": 2, "name": "held", "loss": 0.5}))
    return checkpoint


@pytest.mark.parametrize("has_matplotlib", [True, False])
def test_the_card_tells_of_the_run_up_to_the_checkpoint(
    has_matplotlib: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_matplotlib:
        monkeypatch.setattr(card.importlib.util, "find_spec", lambda _name: None)
    write_card(write_run(tmp_path / "run"), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "First step 3.0000, last step 1.5000" in text
    assert "| a/b &lt;script&gt; | 1,234 |" in text
    assert "| held | 2 | 0.5000 |" in text
    assert "Base-7B" in text
    assert "/secret" not in text
    assert (tmp_path / "loss.png").exists() == has_matplotlib
    assert ("<svg" in text) != has_matplotlib


def test_a_checkpoint_away_from_its_run_has_no_card(tmp_path: Path) -> None:
    write_card(tmp_path / "a" / "b", tmp_path)
    assert list(tmp_path.iterdir()) == []
