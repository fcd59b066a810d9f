"""What the data section of a configuration becomes: mixtures, batches of tokens, and full packs."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.config.build import build_config
from roll_sft.config.schema import RunConfig, SourceConfig
from roll_sft.job.in_process import prepare_job
from roll_sft.job.job import Job, shares_of
from roll_sft.job.overview import expected_fill, first_steps, warn_of_poor_fill
from tests import doors
from tests.doors import Door, alpaca, cells, write_rows

door, assets, arguments = doors.door, doors.assets, doors.arguments

BATCH_OF_FOUR = {"global_batch_size": 4}


@pytest.fixture
def config(assets: Path, tmp_path: Path) -> Any:
    """A function that makes a configuration over two sources, of 40 and of 10 rows."""
    write_rows(tmp_path / "a.jsonl", [alpaca(number) for number in range(40)])
    write_rows(tmp_path / "b.jsonl", [alpaca(number) for number in range(100, 110)])

    def make(of_a: dict[str, Any], of_b: dict[str, Any], **sections: Any) -> RunConfig:
        sources = [{"path": f"{tmp_path}/a.jsonl", **of_a}, {"path": f"{tmp_path}/b.jsonl", **of_b}]
        return build_config(
            {
                "model": {"path": str(assets / "model")},
                "data": {
                    "train": sources,
                    "cache_dir": f"{tmp_path}/cache",
                    "sequence_length": 100,
                },
                "train": {"global_batch_size": 8, **sections.pop("train", {})},
                **sections,
            }
        )

    return make


def drawn(job: Job, epoch: int) -> list[str]:
    first, stop = job.planner.steps_in(epoch), job.planner.steps_in(epoch + 1)
    plans = [job.planner.step(step) for step in range(first + 1, stop + 1)]
    return [job.data.train.sample_name(index) for plan in plans for index in plan.sample_ids]


def test_a_mixture_draws_what_its_entries_ask_for(config: Any) -> None:
    job = prepare_job(config({"weight": 0.5}, {"samples": 30}))
    for epoch in (0, 1):
        names = drawn(job, epoch)
        of_a = [name for name in names if name.startswith("a:")]
        of_b = [name for name in names if name.startswith("b:")]
        assert (len(of_a), len(set(of_a))) == (20, 20)
        assert (len(of_b), len(set(of_b))) == (30, 10)
    assert set(drawn(job, 0)) != set(drawn(job, 1))
    assert job.total_steps == job.planner.steps_per_epoch == 7


def test_a_mixture_changes_the_address_that_a_resume_compares(config: Any) -> None:
    whole = prepare_job(config({}, {})).state.sources
    same = prepare_job(config({"samples": 40}, {"weight": 1.0})).state.sources
    half = prepare_job(config({"weight": 0.5}, {})).state.sources
    assert whole == same
    assert half["b"] == whole["b"]
    assert half["a"] != whole["a"]
    assert prepare_job(config({"samples": 20}, {})).state.sources == half


def test_a_step_of_tokens_meets_its_budget(config: Any) -> None:
    job = prepare_job(config({}, {}, train={"global_batch_tokens": 300, "num_train_epochs": 3}))
    lengths = job.data.train.lengths
    assert job.total_steps == job.planner.steps_in(3)
    for step in range(1, job.planner.steps_per_epoch):
        plan = job.planner.step(step)
        assert plan.total_tokens >= 300
        assert plan.total_tokens - lengths[plan.sample_ids[-1]] < 300


def test_poor_packs_are_warned_of_with_a_batch_that_fills_them(
    config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    many = {"parallel": {"num_workers": 4}}
    with caplog.at_level(logging.WARNING):
        poor = prepare_job(
            config({}, {}, train=BATCH_OF_FOUR | {"micro_batch_tokens": 300}, **many)
        )
        warn_of_poor_fill(poor, first_steps(poor.planner))
    (message,) = caplog.messages
    assert message.startswith("packs of 300 tokens on 4 data-parallel ranks will be 18 % full")
    assert message.endswith("train.global_batch_tokens=1080, or raise train.global_batch_size")
    caplog.clear()
    filled = {"global_batch_tokens": 1080, "micro_batch_tokens": 300}
    with caplog.at_level(logging.WARNING):
        job = prepare_job(config({}, {}, train=filled, **many))
        warn_of_poor_fill(job, first_steps(job.planner))
    assert not caplog.messages
    fills = [expected_fill(first_steps(each.planner)) for each in (job, poor)]
    assert fills[0] > 3 * fills[1]


def test_packs_that_no_batch_can_fill_are_told_apart(
    config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        job = prepare_job(config({}, {}, train=BATCH_OF_FOUR, parallel={"num_workers": 4}))
        warn_of_poor_fill(job, first_steps(job.planner))
    assert caplog.messages[0].endswith("so raise train.micro_batch_tokens to join them")


def test_the_plan_and_the_report_show_the_mixture(
    door: Door, assets: Path, tmp_path: Path, arguments: list[str]
) -> None:
    given = [*arguments, f"data.train=[{{path: {assets / 'rows.jsonl'}, weight: 0.5}}]"]
    given += ["train.global_batch_tokens=400", "prepare_only=true", "output_dir=out"]
    outcome = door(*given)
    assert outcome.code == 0, outcome.stderr
    assert cells(outcome.stdout, "rows, train")[-1] == "35"
    assert cells(outcome.stdout, "tokens per step")[1].startswith("400 ")
    assert cells(outcome.stdout, "packs")[1].endswith("% full")
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report["sources"][0]["samples_per_epoch"] == 35


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([{"weight": 1001.0}], "an epoch of 10,010 samples of a repeats each of its 10 more than"),
        ([{"samples": 999_999_999_999}], "an epoch of 999,999,999,999 samples of a repeats each"),
        ([{"samples": 10_000}], ""),
        ([{"samples": 1 << 29}, {"samples": 1 << 30}], "an epoch of 1,610,612,736 samples is more"),
    ],
)
def test_an_epoch_that_could_not_be_shuffled_is_refused(
    entries: list[dict[str, Any]], expected: str
) -> None:
    sources = [SourceConfig(path="x", name="ab"[at], **each) for at, each in enumerate(entries)]
    size = 10 if len(entries) == 1 else 1 << 29
    ranges = {"a": range(size), "b": range(size, 2 * size)}
    if expected:
        with pytest.raises(ConfigError, match=expected):
            shares_of(sources, ranges)
    else:
        assert shares_of(sources, ranges)["a"].per_epoch == 10_000
