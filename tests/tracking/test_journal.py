"""Metrics as trackers are told them, and the page that explains them; no tracker is needed."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from roll_sft.base import metrics
from roll_sft.tracking.journal import (
    DOCUMENTED_NAMES,
    EVAL_NAMES,
    LINES_AT_ONCE,
    STEP_NAMES,
    Journal,
    safe_name,
)
from roll_sft.tracking.system_metrics import SystemMetrics
from roll_sft.training.cut_logs import cut_logs

NOT_NUMBERS = {"step", "sample_ids_sha256"}
PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def write(path, records):
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read(journal):
    return [point for records in journal.batches() for record in records for point in record.points]


def test_every_number_of_a_step_has_a_name_in_a_group_and_documented_names_stay():
    fields = {field.name for field in dataclasses.fields(metrics.StepRecord)}
    assert set(STEP_NAMES) == fields - NOT_NUMBERS
    assert {name.partition("/")[0] for name in STEP_NAMES.values()} == {
        "train",
        "perf",
        "data",
    }
    assert set(DOCUMENTED_NAMES) <= fields


def test_journal_gives_each_complete_line_once_and_what_comes_later(tmp_path):
    journal = Journal(tmp_path, logging_steps=2, total_steps=5)
    assert read(journal) == []
    write(tmp_path / "steps.jsonl", [{"step": n, "train_loss": 1 / n, "mfu": None} for n in (1, 2)])
    write(tmp_path / "eval.jsonl", [{"step": 2, "name": "a", "loss": 3.0, "perplexity": 20.0}])
    assert read(journal) == [
        ("train/loss", 0.5, 2),
        ("train_loss", 0.5, 2),
        ("eval/a/loss", 3.0, 2),
        ("eval/a/perplexity", 20.0, 2),
    ]
    assert read(journal) == []
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"step": 4, "train')
    assert read(journal) == []
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('_loss": 0.25}\n{"step": 5, "train_loss": 0.2}\n')
    assert [point[2] for point in read(journal)] == [4, 4, 5, 5]


def test_journal_reads_no_step_again_from_logs_that_a_restart_has_cut(tmp_path):
    def step(number):
        return {"step": number, "train_loss": number}

    def evaluation(number, name):
        return {"step": number, "name": name, "loss": number, "perplexity": number}

    steps, evals = tmp_path / "steps.jsonl", tmp_path / "eval.jsonl"
    journal = Journal(tmp_path, logging_steps=1, total_steps=9)
    write(steps, [step(1), step(2), step(3)])
    write(evals, [evaluation(1, "a"), evaluation(1, "b"), evaluation(3, "a")])
    assert [point.step for point in read(journal) if point.name == "train/loss"] == [1, 2, 3]
    cut_logs(tmp_path, step=1, origin=tmp_path)
    assert read(journal) == []
    write(steps, [step(2), step(3), step(4)])
    write(evals, [evaluation(3, "a"), evaluation(3, "b")])
    assert [point[1:] for point in read(journal) if point.name == "train/loss"] == [(4, 4)]
    write(evals, [evaluation(4, "a")])
    losses = [point for point in read(journal) if point.name.endswith("/loss")]
    assert losses == [("eval/a/loss", 4, 4)]


def test_a_torn_line_is_passed_over(tmp_path):
    (tmp_path / "steps.jsonl").write_text('{"step": 1, "tr\n{"step": 2, "train_loss": 0.5}\n')
    points = read(Journal(tmp_path, logging_steps=1, total_steps=2))
    assert [point[2] for point in points] == [2, 2]


def test_a_long_history_comes_in_parts_that_fit_a_request(tmp_path):
    fields = dict.fromkeys(STEP_NAMES, 1.0)
    write(tmp_path / "steps.jsonl", [{"step": n, **fields} for n in range(1, 301)])
    journal = Journal(tmp_path, logging_steps=1, total_steps=300)
    parts = [[point for record in part for point in record.points] for part in journal.batches()]
    assert len(parts) == -(-300 // LINES_AT_ONCE)
    assert max(map(len, parts)) <= 1000
    assert sum(map(len, parts)) == 300 * 21


@pytest.mark.parametrize(
    "name", ["held_out", "a/b", "v1.2", "données", "测试", "a b", "host:3", "x" * 200]
)
def test_names_that_mlflow_takes_stay(name):
    assert safe_name(name) == name


HOSTILE = [
    "val (1)", "a|b", "a&b", "x" * 300, "../up", "/abs", "a//b", "a/./b", "", "\n", "tab\there",
    "\ud800", "\0", "100%", "<script>", "'; drop table runs; --", "a/", ".", "..", "'", '"',
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_any_other_name_becomes_one_that_mlflow_takes(name):
    from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name

    for pattern in EVAL_NAMES.values():
        key = pattern.format(safe_name(name))
        _validate_metric_name(key)
        assert len(key) <= MAX_ENTITY_KEY_LENGTH
    safe_name(name).encode()


def test_names_that_differ_stay_different():
    assert len({safe_name(name) for name in HOSTILE}) == len(HOSTILE)
    assert safe_name("val (1)").startswith("val_1-")


def rows_of(page, heading):
    """First two cells of each row of the table below `heading`, each as its names in code."""
    section = page.partition(f"\n## {heading}")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("|")][2:]
    return [tuple(re.findall("`([^`]+)`", cell) for cell in row[1:3]) for row in rows]


@pytest.mark.parametrize(
    ("heading", "record", "names"),
    [
        ("Each optimizer step", metrics.StepRecord, STEP_NAMES),
        ("Each evaluation", metrics.EvalRecord, EVAL_NAMES),
    ],
)
def test_the_page_of_metrics_explains_every_key_under_its_names(heading, record, names):
    rows = rows_of(PAGE.read_text(encoding="utf-8"), heading)
    keys = [field.name for field in dataclasses.fields(record)]
    assert [key for ((key,), _) in rows] == keys
    shown = {key: tracked[0] for ((key,), tracked) in rows if tracked}
    assert shown == {key: name.replace("{}", "<set>") for key, name in names.items()}


def test_the_page_of_metrics_has_the_names_that_mlflow_gives_to_the_machine():
    rows = rows_of(PAGE.read_text(encoding="utf-8"), "The machine of the driver")
    listed = {name for (names, _) in rows for name in names}
    sampled = {point.name for point in SystemMetrics({}).points(every_s=0)}
    assert {re.sub(r"gpu_\d+", "gpu_<n>", name) for name in sampled} <= listed
    assert len(listed) == 13


def test_the_page_of_metrics_names_those_that_are_recorded_twice():
    introduction = PAGE.read_text(encoding="utf-8").partition("\n## ")[0]
    assert set(DOCUMENTED_NAMES) <= set(re.findall("`([^`]+)`", introduction))


def test_samples_of_the_machine_count_on_after_those_of_an_earlier_process():
    earlier = {"system/cpu_utilization_percentage": 6, "system/disk_usage_megabytes": 4, "x": 99}
    system = SystemMetrics(earlier)
    assert {point.step for point in system.points(every_s=0)} == {7}
    assert {point.step for point in system.points(every_s=0)} == {8}
    assert system.points(every_s=60) == []
