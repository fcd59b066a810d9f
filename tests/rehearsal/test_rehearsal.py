"""`roll-sft rehearse`: tiny models of every family on every layout, and a rehearsal to its end."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from roll_sft.config.build import build_config
from roll_sft.config.schema import ParallelConfig
from roll_sft.job.model import model_problems
from roll_sft.models.files.config_file import load_hf_config
from roll_sft.models.source import family_of
from roll_sft.rehearsal import tiny
from roll_sft.rehearsal.faults import Fault, Runs
from tests.families import FAMILIES
from tests.parity import EXPERTS, model_config, write_model, write_rows

KINDS = ("qwen2-tied", "qwen3", "llama3", "mistral", "olmo2", *FAMILIES, *EXPERTS)
LAYOUTS = (
    ParallelConfig(),
    ParallelConfig(num_workers=4, tensor_model_parallel_size=2, context_parallel_size=2),
    ParallelConfig(
        num_workers=4, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    ),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_model_is_of_the_family_and_fits_the_layout(kind: str, tmp_path: Path) -> None:
    given = model_config(kind, num_layers=6)
    given.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[given.model_type]]
    given.save_pretrained(tmp_path / "given")
    content = json.loads((tmp_path / "given" / "config.json").read_text())
    path = tmp_path / "config.json"
    for parallel in LAYOUTS:
        path.write_text(json.dumps(tiny.tiny_config(content, parallel)))
        config = load_hf_config(str(tmp_path), trust_remote_code=False)
        shape = family_of(config).shape(config)
        assert family_of(config) is family_of(given)
        fitting = replace(build_config({"data": {"sequence_length": 256}}), parallel=parallel)
        assert [*model_problems(fitting, shape)] == []
        assert shape.num_parameters < 2e6


@pytest.mark.parametrize(
    ("most", "kept"),
    [
        (128, (8, 4, 2, 128)),
        (64, (4, 4, 2, 64)),
        (8, (1, 2, 2, 8)),
        (3, (1, 1, 1, 2)),
        (1, (1,) * 4),
    ],
)
def test_a_layout_is_halved_until_the_machine_holds_it(most: int, kept: tuple[int, ...]) -> None:
    wanted = ParallelConfig(
        num_workers=512,
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=4,
        context_parallel_size=2,
        sequence_parallel=True,
    )
    found = tiny.layout_for(wanted, most=most, device="cpu")
    assert kept == (
        found.tensor_model_parallel_size,
        found.pipeline_model_parallel_size,
        found.context_parallel_size,
        found.num_workers,
    )
    assert found.sequence_parallel == (found.tensor_model_parallel_size > 1)


def test_experts_are_shared_by_as_many_ranks_as_there_are() -> None:
    wanted = ParallelConfig(num_workers=64, expert_model_parallel_size=8)
    assert tiny.layout_for(wanted, most=8, device="cpu").expert_model_parallel_size == 2


def arguments(folder: Path) -> list[str]:
    write_model(folder / "model", kind="qwen3", num_layers=2)
    write_rows(folder / "rows.jsonl")
    return [f"model.path={folder / 'model'}", f"data.train=[{{path: {folder / 'rows.jsonl'}}}]"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_fault_of_a_rehearsal_happens_and_the_run_goes_on(tmp_path: Path) -> None:
    layout = ["parallel.num_workers=2", "parallel.tensor_model_parallel_size=2"]
    done = subprocess.run(
        [sys.executable, "-m", "roll_sft.cli", "rehearse", *arguments(tmp_path), *layout],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stderr}\n{done.stdout}"
    assert "Rehearsal: 2 ranks on cpu, TP2 PP1 CP1 EP1" in done.stdout
    rows = [line for line in done.stdout.splitlines() if re.search(r" yes +.$", line)]
    assert len(rows) == 9, done.stdout
    print(done.stdout)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_row_whose_fault_does_not_happen_fails(tmp_path: Path) -> None:
    parallel = ParallelConfig(num_workers=1, device="cpu")
    write_model(tmp_path / "given", num_layers=2)
    overrides = tiny.write_model(tmp_path, tmp_path / "given", parallel)
    keys = ["train.max_steps=2", "parallel.device=cpu", "checkpoint.hf_export=none"]
    keys += ["tracking.backends=[jsonl]", "train.global_batch_size=4"]
    late = Fault("too late", "kind: kill, step: 9")
    assert Runs(tmp_path, [*overrides, *keys]).rehearsed("late", late).problem == (
        "the fault did not happen"
    )
