"""A run that answers prompts while it trains: its files, its metrics, and what goes wrong."""

import json
import math
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from roll_sft.base.files import json_lines
from roll_sft.base.layout import ParallelLayout
from tests import doors
from tests.doors import Door
from tests.local_run import main_job
from tests.pool import RankPool

assets, arguments, door = doors.assets, doors.arguments, doors.door

QUESTION = "Say 1."


@pytest.fixture
def prompts(assets: Path, tmp_path: Path) -> str:
    """`evaluation.prompts`: a text, two rows with answers, and one without."""
    rows = [doors.alpaca(7), doors.alpaca(8), {"instruction": "Say nothing."}]
    doors.write_rows(tmp_path / "questions.jsonl", rows)
    return f"evaluation.prompts=['{QUESTION}', {{path: {tmp_path / 'questions.jsonl'}}}]"


@pytest.mark.slow
def test_answers_and_metrics_are_written_and_a_broken_metric_costs_itself(
    arguments: list[str], prompts: str, pool: RankPool, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [*arguments, prompts, f"output_dir={folder}", "evaluation.max_new_tokens=12"]
    command += ["train.global_batch_size=20", "train.eval_steps=2", "checkpoint.hf_export=none"]
    command += ["evaluation.metric_fn=tests.metrics.score", "evaluation.metric_modules=[tests]"]
    ((code, errors),) = pool.run(main_job, ParallelLayout(1), command)
    assert code == 0, errors
    lines = list(json_lines(folder / "generations.jsonl"))
    assert [(each["step"], each["index"]) for each in lines] == [
        (step, index) for step in (2, 4) for index in range(4)
    ]
    first = lines[:4]
    assert [each["prompt"] for each in first] == [QUESTION, "Say 7.", "Say 8.", "Say nothing."]
    assert [each["reference"] for each in first] == [
        None,
        doors.alpaca(7)["output"],
        doors.alpaca(8)["output"],
        None,
    ]
    for each in first:
        assert each["metrics"]["length"] == len(each["output"])
        assert each["metrics"]["output_tokens"] <= 12
        assert (each["metrics"]["exact_match"] is None) == (each["reference"] is None)
    evaluations = list(json_lines(folder / "eval.jsonl"))
    assert [(each["step"], each["name"]) for each in evaluations] == [
        (2, "generation"),
        (4, "generation"),
    ]
    means = evaluations[0]["metrics"]
    assert means["known"] == 2
    assert math.isclose(means["length"], sum(len(each["output"]) for each in first) / 4)
    assert {"exact_match", "token_f1", "rouge_l", "distinct_1", "distinct_2", "stopped"} <= set(
        means
    )
    stored = json.loads((folder / "job" / "prompts.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "job" / "hf_assets")
    chat = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert stored[0]["ids"] == list(ids)


def test_a_deadline_costs_the_rest_of_the_answers_and_a_warning(
    arguments: list[str], prompts: str, pool: RankPool, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [*arguments, prompts, f"output_dir={folder}", "evaluation.max_new_tokens=12"]
    command += ["train.global_batch_size=20", "checkpoint.hf_export=none"]
    ((code, errors),) = pool.run(
        main_job, ParallelLayout(1), [*command, "evaluation.deadline_s=0.000001"]
    )
    assert code == 0, errors
    assert "4 of 4 answers were cut by evaluation.deadline_s 1e-06; raise it" in errors
    for line in json_lines(folder / "generations.jsonl"):
        assert line["metrics"]["output_tokens"] <= 1


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [
        (["evaluation.max_new_tokens=600"], 2, ["evaluation.prompts[0]", "600", "512 positions"]),
        (["evaluation.metric_fn=roll_sft_metrics.f"], 2, ["evaluation.metric_fn", "imported"]),
        (
            ["evaluation.metric_fn=json.none", "evaluation.metric_modules=[json]"],
            2,
            ["evaluation.metric_fn", "json.none", "imported"],
        ),
        (
            ["evaluation.metric_fn=json.tool", "evaluation.metric_modules=[json]"],
            2,
            ["evaluation.metric_fn", "json.tool"],
        ),
    ],
)
def test_what_cannot_be_answered_or_measured_is_refused_before_ray_starts(
    more: list[str], code: int, named: list[str], door: Door, arguments: list[str], prompts: str
) -> None:
    doors.refused(door(*arguments, prompts, *more), code, *named)


@pytest.mark.parametrize("content", ["", "[]", '{"other": 1}\n'])
def test_a_file_without_prompts_is_refused(
    content: str, door: Door, arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "none.jsonl").write_text(content)
    outcome = door(*arguments, f"evaluation.prompts=[{{path: {tmp_path / 'none.jsonl'}}}]")
    doors.refused(outcome, 3, "none.jsonl")
