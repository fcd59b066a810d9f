"""Steps whose loss or gradient is not finite, or a spike: what ranks do and what is said."""

import math
import re
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch

from roll_sft.base.errors import DataError
from roll_sft.base.metrics import StepMetrics
from roll_sft.checkpoint.manifest import read_manifest
from roll_sft.config.build import build_config
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.data.steps.plan import StepPlan
from roll_sft.job.in_process import prepare_job
from roll_sft.training.records import BEHIND, LEAST, WINDOW, BadSteps
from tests import parity
from tests.doors import write_rows
from tests.exact import exact
from tests.local_run import Fault, Run, spoil_gradient
from tests.pool import RankPool
from tests.runtime.light import plan

NAN, INFINITE = float("nan"), float("inf")
LAYOUTS = {
    "DP2": {"num_workers": 2},
    "DP2, optimizer not split": {"num_workers": 2, "use_distributed_optimizer": False},
    "TP2xPP2+SP": {
        "num_workers": 4,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    },
}


def spoilt_steps(config: RunConfig, rank: int, kind: str) -> list[tuple[Any, ...]]:
    """In a pool: of two steps of which `rank` spoils the first, in this rank's eyes:

    whether a parameter changed, and `is_skipped` and the norm of the reporting rank.
    """
    import torch.distributed as dist

    from roll_sft.engine.engine import Engine

    job = prepare_job(config)
    engine = Engine(config, source=job.source, data=job.data)
    data_rank = job.layout.coordinate(dist.get_rank()).data_rank
    accumulate, found = engine.accumulate_gradients, []

    def infinite_loss(batches: Any) -> None:
        accumulate(batches)
        engine.row_losses = [rows * INFINITE for rows in engine.row_losses]

    spoilt: dict[str, Any] = {
        "gradient": partial(spoil_gradient, accumulate, engine, value=NAN),
        "loss": infinite_loss,
        "spike": partial(spoil_gradient, accumulate, engine, value=1e6),
    }
    for step in (1, 2):
        limits = (1e9, 1e3) if kind == "spike" else None
        step_plan = replace(job.planner.step(step), limits=limits)
        work = step_plan.work_for(data_rank, learning_rate=1e-2)
        before = [each.detach().clone() for each in engine.chunks[0].parameters()]
        is_mine = step == 1 and dist.get_rank() == rank
        with patch.object(engine, "accumulate_gradients", spoilt[kind] if is_mine else accumulate):
            metrics = engine.train_step(work)
        after = list(engine.chunks[0].parameters())
        is_changed = not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        found.append((is_changed, metrics and metrics.is_skipped, metrics and metrics.grad_norm))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad_steps")
    parity.write_model(root / "model", kind="qwen2-tied", num_layers=2)
    parity.write_rows(root / "rows.jsonl", num_rows=8)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("DP2", "gradient"),
        ("DP2, optimizer not split", "gradient"),
        ("DP2, optimizer not split", "loss"),
        ("TP2xPP2+SP", "gradient"),
        ("TP2xPP2+SP", "loss"),
        ("TP2xPP2+SP", "spike"),
    ],
)
def test_no_rank_makes_the_update_that_one_of_them_spoils(
    layout: str, kind: str, folder: Path, pool: RankPool
) -> None:
    config = parity.parity_config(folder, parallel=LAYOUTS[layout], train={"max_grad_norm": 0})
    size = layout_of(config.parallel)
    # The loss is that of the last stage; the gradient may be any rank's.
    rank = size.world_size - 1 if kind == "loss" else 0
    ranks = pool.run(spoilt_steps, size, config, rank, kind)
    assert [first[0] for first, _ in ranks] == [False] * size.world_size
    assert [second[0] for _, second in ranks] == [True] * size.world_size
    (told,) = [rank for rank in ranks if rank[0][1] is not None]
    assert [is_skipped for _, is_skipped, _ in told] == [True, False]
    assert told[0][2] >= 1e5 if kind == "spike" else math.isnan(told[0][2])
    assert told[1][2] < 1e3


@pytest.fixture
def run(folder: Path, pool: RankPool, tmp_path: Path) -> Run:
    return Run(folder, pool, tmp_path / "run")


SKIP = {"train.on_nan": "skip", "train.save_steps": 2}


@pytest.mark.slow
def test_a_skipped_step_is_a_step_of_the_run_and_resume_is_exact(run: Run, tmp_path: Path) -> None:
    code, last = run(SKIP, fault=Fault(3, gradient=INFINITE))
    assert code == 0, last
    assert "step 3: train_loss " in run.errors
    assert "not finite, no update; the samples of this step are in bad_batches.jsonl" in run.errors
    whole = run.lines("steps.jsonl")
    assert [line["step"] for line in whole] == [1, 2, 3, 4, 5, 6]
    assert [line.get("skipped") for line in whole] == [None, None, "not finite", None, None, None]
    assert whole[2]["grad_norm"] is None
    (bad,) = run.lines("bad_batches.jsonl")
    assert (bad["step"], bad["reason"], bad["skipped"]) == (3, "not finite", True)
    assert len(bad["samples"]) == 2
    state = read_manifest(run.output / "checkpoints" / "step_00000006").state
    assert (state.step, state.optimizer_step) == (6, 5)
    again = run.beside("again")
    stopped = Fault(3, gradient=INFINITE, signals=(signal.SIGTERM,))
    assert again(SKIP, fault=stopped)[0] == 75
    assert again(SKIP)[0] == 0
    resumed = again.lines("steps.jsonl")
    assert exact(resumed) == exact(whole)


@pytest.mark.slow
def test_more_skipped_steps_than_allowed_end_the_run(run: Run) -> None:
    keys = {**SKIP, "train.max_skipped_steps": 1}
    assert run(keys, fault=Fault(2, gradient=NAN, signals=(signal.SIGTERM,)))[0] == 75
    code, last = run(keys, fault=Fault(5, gradient=NAN))
    assert code == 5
    assert "2 steps would be skipped, and train.max_skipped_steps is 1" in last
    assert [line["step"] for line in run.lines("bad_batches.jsonl")] == [2, 5]


@pytest.mark.slow
def test_by_default_a_gradient_that_is_not_finite_ends_the_run_and_spoils_nothing(
    run: Run,
) -> None:
    code, last = run({}, fault=Fault(3, gradient=NAN))
    assert code == 5
    assert re.match(r"step 3: train_loss \S+ and grad_norm nan must be finite", last)
    assert "the last good checkpoint is step_00000002" in last
    (bad,) = run.lines("bad_batches.jsonl")
    assert (bad["step"], bad["skipped"]) == (3, False)


# Spikes, without an engine


class Records:
    """Keeps what is recorded."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps, self.bad = folder, list[dict[str, Any]](), list[dict[str, Any]]()

    def step(self, plan: StepPlan, result: StepMetrics, *, skipped: str | None = None) -> None:
        line = {
            "step": plan.step,
            "train_loss": result.loss_sum / result.supervised_tokens,
            "grad_norm": result.grad_norm,
        }
        self.steps.append(line if skipped is None else {**line, "skipped": skipped})

    def open(self, path: Path) -> Any:
        assert path == self.folder / "bad_batches.jsonl"
        return SimpleNamespace(write=self.bad.append)

    @property
    def reasons(self) -> list[tuple[Any, ...]]:
        return [(line["step"], line["reason"], line["skipped"]) for line in self.bad]


def judge(records: Records, *, step: int = 0, **train: Any) -> BadSteps:
    config = build_config({"train": train})
    job = SimpleNamespace(config=config, layout=layout_of(config.parallel))
    job.data = SimpleNamespace(train=SimpleNamespace(sample_name=lambda index: f"rows:{index}"))
    group = cast(Any, None)  # one data rank is compared with no other
    return BadSteps(cast(Any, job), cast(Any, records), group, step=step)


def take(bad: BadSteps, step: int, *, spike: float = 0.0) -> StepPlan:
    """One step with a loss and a norm that wander a little, and `spike` on top of its norm."""
    begun = bad.begin(plan(step))
    tokens, wandering = begun.supervised_tokens, math.sin(step)
    norm = 1.0 + 0.1 * wandering + spike
    result = StepMetrics(
        step=step,
        loss_sum=tokens * (2.0 + 0.1 * wandering),
        supervised_tokens=tokens,
        grad_norm=norm,
        learning_rate=1e-4,
        step_time_s=0.0,
        data_wait_s=0.0,
        peak_memory_gib=0.0,
        is_skipped=begun.limits is not None and norm > begun.limits[1],
    )
    bad.finish(begun, result)
    return begun


def test_a_spike_is_recorded_and_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = Records(tmp_path)
    bad = judge(records)
    for step in range(1, 61):
        assert take(bad, step, spike=5.0 * (step in (20, 50))).limits is None
    assert records.reasons == [(50, "spike", False)], "20 comes before there is a mean"
    assert len(records.steps) == 60
    assert not any("skipped" in line for line in records.steps)
    assert "step 50: train_loss " in caplog.text


def test_limits_are_those_of_the_definition_and_the_same_after_a_resume(tmp_path: Path) -> None:
    records = Records(tmp_path)
    bad = judge(records, on_spike="skip", spike_sigma=4.0)
    limits = [take(bad, step, spike=9.0 * (step in (70, 150))).limits for step in range(1, 201)]
    assert records.reasons == [(70, "spike", True), (150, "spike", True)]
    assert limits[LEAST + BEHIND - 2] is None
    assert all(limit is not None for limit in limits[LEAST + BEHIND - 1 :])
    norms = [line["grad_norm"] for line in records.steps[: 200 - BEHIND] if "skipped" not in line]
    seen = torch.tensor(norms[-WINDOW:], dtype=torch.float64)
    wanted = float(seen.mean() + 4.0 * seen.std(correction=0))
    found = limits[-1]
    assert found is not None
    assert found[1] == pytest.approx(wanted, rel=1e-12)
    for step in (40, 71, 151, 190):
        write_rows(tmp_path / "steps.jsonl", records.steps[:step])
        write_rows(
            tmp_path / "bad_batches.jsonl", [each for each in records.bad if each["step"] <= step]
        )
        resumed = judge(Records(tmp_path), step=step, on_spike="skip", spike_sigma=4.0)
        later = [
            take(resumed, each, spike=9.0 * (each == 150)).limits for each in (step + 1, step + 2)
        ]
        assert later == limits[step : step + 2]


def test_a_step_without_supervised_tokens_is_an_error_that_names_its_samples(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match=r"^step 7: .* as of rows:0\b"):
        judge(Records(tmp_path)).begin(replace(plan(7), supervised_tokens=0))
