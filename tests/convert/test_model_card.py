"""The model card of an export: what it shows of the run around it, and of its source."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from roll_sft.base.layout import ParallelLayout
from roll_sft.checkpoint.manifest import Manifest, RunState
from roll_sft.config.build import build_config
from roll_sft.config.schema import RunConfig
from roll_sft.convert import model_card
from roll_sft.convert.model_card import write_card
from roll_sft.data.tokens.cache import SourceReport

STATE = RunState(
    step=2,
    epoch=0,
    samples_seen_in_epoch=8,
    seed=3,
    global_batch_size=4,
    global_batch_tokens=None,
    sequence_length=64,
    sources={},
    layout=ParallelLayout(2, 2),
    dtype="bf16",
)
MANIFEST = Manifest(2, STATE, versions={"torch": "2"}, files={})
SOURCE_CARD = """\
---
license: other
license_name: some-licence
license_link: LICENSE
language: [en, de]
base_model: org/Base-7B
extra: /secret/of/the/source
---
# The source's own card
"""


def write_run(run: Path, **config: Any) -> Path:
    """A run's own files, with a hostile name of a source; returns its checkpoint."""
    checkpoint = run / "checkpoints" / "step_00000002"
    (checkpoint / "hf_assets").mkdir(parents=True)
    (checkpoint / "hf_assets" / "README.md").write_text(SOURCE_CARD)
    values = {"model": {"path": "/secret/place/Base-7B"}, "run_name": "a: 'b' #c", **config}
    built: RunConfig = build_config(values)
    (run / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(built)))
    counts = dict.fromkeys(("rows", "kept", "tokens", "supervised_tokens"), 1234)
    assert counts.keys() <= {field.name for field in dataclasses.fields(SourceReport)}
    report = {"sources": [{"name": "a|b <script>", "path": "/secret/rows.jsonl", **counts}]}
    (run / "data_report.json").write_text(json.dumps(report))
    losses = [{"step": step, "train_loss": 3.0 / step} for step in (1, 2, 3)]
    (run / "steps.jsonl").write_text("\n".join(map(json.dumps, losses)))
    (run / "eval.jsonl").write_text(json.dumps({"step": 2, "name": "held: out", "loss": 0.5}))
    return checkpoint


def card_of(checkpoint: Path, folder: Path) -> ModelCard:
    folder.mkdir(exist_ok=True)
    write_card(checkpoint, folder, manifest=MANIFEST, dtype="bf16")
    return ModelCard((folder / "README.md").read_text())


@pytest.mark.parametrize("has_lora", [True, False])
def test_the_card_of_adapters_says_that_routed_experts_have_none(
    has_lora: bool, tmp_path: Path
) -> None:
    checkpoint = write_run(tmp_path / "run")
    (checkpoint / "hf_assets" / "config.json").write_text('{"num_local_experts": 8}')
    facts = {"lora": {"rank": 4}} if has_lora else {}
    manifest = dataclasses.replace(MANIFEST, state=dataclasses.replace(STATE, facts=facts))
    (tmp_path / "hf").mkdir()
    write_card(checkpoint, tmp_path / "hf", manifest=manifest, dtype="bf16", is_adapter=has_lora)
    text = (tmp_path / "hf" / "README.md").read_text()
    assert ("Routed experts and routers have no adapters" in text) == has_lora


@pytest.mark.parametrize("has_matplotlib", [True, False])
def test_the_card_tells_of_the_run_up_to_the_checkpoint(
    has_matplotlib: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_matplotlib:
        monkeypatch.setattr(model_card.importlib.util, "find_spec", lambda _name: None)
    text = card_of(write_run(tmp_path / "run"), tmp_path / "hf").content
    assert "First step 3.0000, last step 1.5000" in text
    assert "| a/b &lt;script&gt; | 1,234 |" in text
    assert "| held: out | 2 | 0.5000 | 1.649 |" in text
    assert "Base-7B" in text
    assert "exported in\nbf16" in text
    assert "/secret" not in text
    assert (tmp_path / "hf" / "loss.png").exists() == has_matplotlib
    assert ("<svg" in text) != has_matplotlib


def test_the_metadata_is_what_the_hub_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "rows").mkdir()
    paths = ["org/data", "org/data/part", "/secret/rows.jsonl", "folder/rows", "in/rows.jsonl"]
    data = {"train": [{"path": path} for path in paths]}
    checkpoint = write_run(tmp_path / "out" / "run", model={"path": "org/Model-7B"}, data=data)
    metadata = card_of(checkpoint, tmp_path / "hf").data
    assert metadata.base_model == "org/Model-7B"
    assert metadata.base_model_relation == "finetune"
    assert metadata.datasets == ["org/data"]
    for name in (metadata.base_model, *metadata.datasets):
        validate_repo_id(name)
    licence = {key: getattr(metadata, key) for key in model_card.LICENCE}
    assert licence == {
        "license": "other", "license_name": "some-licence", "license_link": "LICENSE",
    }  # fmt: skip
    assert metadata.language == ["en", "de"]
    assert metadata.library_name == "transformers"
    assert metadata.pipeline_tag == "text-generation"
    results = {each.metric_type: each.metric_value for each in metadata.eval_results}
    assert results == {"loss": 0.5, "perplexity": 1.648721}
    monkeypatch.chdir("/")  # relative paths of the run are looked for where it lies
    assert card_of(checkpoint, tmp_path / "hf").data.datasets == ["org/data"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"path": "/x/models--org--Model-7B/snapshots/0123"}, "org/Model-7B"),
        ({"path": "/secret/place/My-7B"}, "org/Base-7B"),  # by the card of the local copy
        ({"path": "org/Model-7B", "random_init": True}, None),
    ],
)
def test_the_base_is_named_where_it_is_known(
    model: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    metadata = card_of(write_run(tmp_path / "run", model=model), tmp_path / "hf").data
    assert metadata.base_model == expected


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
DAMAGES: dict[str, bytes] = {
    "steps.jsonl": b'{"step": 1, "train_loss": 3.0}\n{"step": 2, "train_l',
    "eval.jsonl": b'{"step": 1, "name": 5, "loss": NaN}\n[1]\n{"step": "2"}\nnull\n\xff\xfe',
    "data_report.json": b'{"sources": [{"name": "a"}, 7, {"rows": "x"}',
    "config.yaml": f"{BOMB}\nrun_name: *i\ndata: *i\nmodel: {{path: *i}}\n".encode(),
    "checkpoints/step_00000002/hf_assets/README.md": f"---\n{BOMB}\nlicense: *i\n---".encode(),
}


@pytest.mark.parametrize("name", [*DAMAGES, "all"])
@pytest.mark.parametrize("is_gone", [False, True])
def test_whatever_is_damaged_there_is_a_card(name: str, is_gone: bool, tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path / "run")
    for each in DAMAGES if name == "all" else [name]:
        if is_gone:
            (tmp_path / "run" / each).unlink()
        else:
            (tmp_path / "run" / each).write_bytes(DAMAGES[each])
    found = card_of(checkpoint, tmp_path / "hf")
    assert found.data.library_name == "transformers"
    assert "| layout.tensor_size | 2 |" in found.content
    assert len(found.content) < 5_000
    if name == "steps.jsonl" and not is_gone:
        assert "First step 3.0000, last step 3.0000" in found.content


def test_a_model_that_was_only_converted_keeps_its_own_card(tmp_path: Path) -> None:
    manifest = dataclasses.replace(MANIFEST, state=dataclasses.replace(STATE, step=0))
    write_card(tmp_path / "a" / "b", tmp_path, manifest=manifest, dtype="fp32")
    assert list(tmp_path.iterdir()) == []
