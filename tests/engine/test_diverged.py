"""Runs that diverge: nothing ruined is kept, and what the last line advises goes on."""

import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from roll_sft.engine.build import not_finite
from tests import parity
from tests.local_run import Fault, Run
from tests.pool import RankPool

pytestmark = pytest.mark.slow

NAN, INFINITE = float("nan"), float("inf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("diverged")
    parity.write_model(root / "model", kind="qwen2-tied", num_layers=1)
    parity.write_rows(root / "rows.jsonl", num_rows=8)
    return root


@pytest.fixture
def run(folder: Path, pool: RankPool, tmp_path: Path) -> Run:
    return Run(folder, pool, tmp_path / "run")


TOO_HIGH = 1e30


@pytest.mark.parametrize(
    "is_async",
    [
        pytest.param(False, id="blocking"),
        pytest.param(True, id="asynchronous"),
    ],
)
def test_weights_that_overflow_are_neither_published_nor_exported(run: Run, is_async: bool) -> None:
    keys = {"train.max_steps": 1, "checkpoint.hf_export": "final"}
    fault = Fault(1, learning_rate=TOO_HIGH)
    code, last = run({**keys, "checkpoint.async_save": is_async}, fault=fault)
    assert code == 5
    assert re.match(r"step 1: \S+ reaches 1e\+30, which overflows, so no checkpoint is made", last)
    assert last.endswith("lower train.learning_rate or train.max_grad_norm and start anew")
    assert run.kept == []
    assert not (run.output / "hf").exists()
    # The same folder takes the advice.
    assert run({"train.max_steps": 2})[0] == 0
    assert run.kept == [1, 2]


def test_a_validation_loss_that_is_not_finite_ends_the_run_before_its_checkpoint(run: Run) -> None:
    fault = Fault(1, learning_rate=TOO_HIGH)
    code, last = run({**run.validation, "train.eval_steps": 1}, fault=fault)
    assert code == 5
    assert "the loss of validation set 'held_out' is nan and must be finite" in last
    assert run.kept == []
    assert run.lines("eval.jsonl") == []
    assert [line["step"] for line in run.lines("steps.jsonl")] == [1]


def test_the_advice_of_a_run_that_diverges_later_goes_on(run: Run) -> None:
    assert run({"train.max_steps": 2})[0] == 0
    keys = {"train.learning_rate": 1e-2, "checkpoint.allow_changes": "[schedule]"}
    code, last = run(keys, fault=Fault(3, learning_rate=TOO_HIGH))
    assert code == 5
    assert "step 3: " in last
    assert run.kept == [1, 2], "a ruined checkpoint is published, or a good one deleted"
    advice = last.partition("go back to it with ")[2]
    assert f"resume={run.output}/checkpoints/step_00000002 " in advice
    code, last = run({}, *shlex.split(advice))
    assert code == 0, last
    assert run.kept == [4, 5, 6]
    losses = [line["train_loss"] for line in run.lines("steps.jsonl")]
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))


def test_a_loss_that_is_not_finite_makes_the_checkpoint_before_it_suspect(run: Run) -> None:
    code, last = run({}, fault=Fault(5, (("loss_sum", NAN),)))
    assert code == 5
    assert last.startswith("step 5: train_loss nan and grad_norm ")
    assert "the last good checkpoint is step_00000003" in last, "step 5 was computed from step 4"
    assert [line["step"] for line in run.lines("steps.jsonl")] == [1, 2, 3, 4]
    (bad,) = run.lines("bad_batches.jsonl")
    assert (bad["step"], bad["train_loss"], len(bad["samples"])) == (5, None, 2)
    assert bad["samples"][0].startswith("rows:")
    code, last = run({}, *shlex.split(last.partition("go back to it with ")[2]))
    assert code == 0, last
    assert [line["step"] for line in run.lines("steps.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert run.lines("bad_batches.jsonl") == []


def test_a_sound_checkpoint_that_is_being_written_is_published_first(run: Run) -> None:
    keys = {"checkpoint.async_save": True, "train.save_steps": 2}
    code, last = run(keys, fault=Fault(3, (("grad_norm", INFINITE),), save_s=0.5))
    assert code == 5
    assert "grad_norm inf must be finite" in last
    assert run.kept == [2], "the save in flight is lost"
    assert "the last good checkpoint is step_00000002" in last


def test_a_suspect_checkpoint_that_is_being_written_is_not_published(run: Run) -> None:
    keys = {"checkpoint.async_save": True, "train.save_steps": 2}
    code, last = run(keys, fault=Fault(3, (("loss_sum", INFINITE),), save_s=0.5))
    assert code == 5
    assert run.kept == []
    assert "no checkpoint before it is known to be good" in last


def test_an_interrupted_run_says_which_checkpoint_is_kept_and_goes_on(run: Run) -> None:
    code, last = run({}, fault=Fault(4, error=KeyboardInterrupt))
    assert (code, last) == (130, "interrupted")
    said = f"{run.output}/checkpoints/step_00000003 is kept: the same command goes on from it"
    assert said in run.errors
    assert run({})[0] == 0
    assert [line["step"] for line in run.lines("steps.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "mlp.up_proj.weight"])
def test_a_number_that_is_none_in_the_given_model_is_named_by_its_tensor(
    name: str, folder: Path, run: Run, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    parity.write_model(broken, kind="qwen2-tied", num_layers=1)
    tensors = load_file(broken / "model.safetensors")
    tensors[f"model.layers.0.{name}"][3, 5] = NAN
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    code, last = run({"model.path": broken})
    assert code == 6
    assert f"model.layers.0.{name} holds 1 numbers that are not finite" in last
    assert run.lines("steps.jsonl") == []


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (NAN, "holds 1 numbers that are not finite"),
        (-INFINITE, "holds 1 numbers that are not finite"),
        (-(2.0**84), "reaches 1.93e+25, which overflows"),
        (1e15, None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_among_many_tensors_is_found(
    value: float, what: str | None, dtype: torch.dtype
) -> None:
    tensors = [(f"t{index}", torch.ones(3, 4, dtype=torch.float32)) for index in range(3)]
    tensors += [("halves", torch.ones(5, dtype=torch.bfloat16)), ("none", torch.empty(0))]
    tensors.append(("odd", torch.ones(2, 2, dtype=dtype)))
    tensors[-1][1][1, 0] = value
    found = not_finite(tensors)
    assert found == (None if what is None else ("odd", what))
