"""Before a worker exists: the model, the layout and the data are judged, and the plan is shown."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import doors
from tests.doors import NUM_ROWS, Door, alpaca, cells, contents, process, refused, write_rows
from tests.tiny import tiny_tokenizer

door, assets, arguments = doors.door, doors.assets, doors.arguments

# The numbers of Qwen/Qwen2.5-7B's config.json.
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


@pytest.fixture
def changed_model(assets: Path, tmp_path: Path) -> Callable[..., str]:
    """`model.path` of the small model with other values in config.json."""

    def change(**changes: object) -> str:
        folder = tmp_path / "model"
        shutil.copytree(assets / "model", folder)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return f"model.path={folder}"

    return change


# The model


@pytest.mark.parametrize(
    ("changes", "given", "parts"),
    [
        (
            {"architectures": ["Qwen2ForTokenClassification"]},
            [],
            ["['Qwen2ForTokenClassification']", "supports one of: ", "choose such a model"],
        ),
        ({"use_sliding_window": True}, [], ["use_sliding_window true (only false)"]),
        (
            {"vocab_size": 399},
            ["model.random_init=true"],
            ["the id 399", "embedding has 399 rows, from 0; use the model's own"],
        ),
        ({}, ["data.sequence_length=513"], ["513 exceeds", "max_position_embeddings 512; lower"]),
        (
            {},
            ["parallel.num_workers=3", "parallel.pipeline_model_parallel_size=3"],
            ["3 stages", "2 layers; choose at most 2"],
        ),
        (
            {},
            ["model.tokenizer_path=nowhere"],
            ["'nowhere' is not a folder; give one, or a hub id"],
        ),
        ({}, ["model.path=nowhere"], ["'nowhere' is neither a folder nor a hub id"]),
    ],
)
def test_a_model_that_cannot_run_is_refused_before_ray(
    door: Door,
    arguments: list[str],
    changed_model: Callable[..., str],
    changes: dict[str, object],
    given: list[str],
    parts: list[str],
) -> None:
    refused(door(*arguments, changed_model(**changes), *given), 2, *parts)


def test_all_layout_errors_are_shown_at_once(door: Door, arguments: list[str]) -> None:
    wrong = [
        "parallel.num_workers=8",
        "parallel.tensor_model_parallel_size=3",
        "parallel.pipeline_model_parallel_size=3",
        "data.sequence_length=1000",
    ]
    outcome = door(*arguments, *wrong)
    refused(outcome, 2)
    for line in (
        "context_parallel_size 1 = 9 does not divide num_workers 8",
        "parallel.tensor_model_parallel_size: 3 does not divide the model's num_attention_heads 4",
        "parallel.tensor_model_parallel_size: 3 does not divide the model's num_key_value_heads 2",
        "parallel.tensor_model_parallel_size: 3 does not divide the model's intermediate_size 160",
        "parallel.pipeline_model_parallel_size: 3 stages",
        "data.sequence_length: 1000 exceeds the model's max_position_embeddings 512",
    ):
        assert line in outcome.stderr


def test_a_folder_without_a_tokenizer_is_refused(
    door: Door, assets: Path, arguments: list[str]
) -> None:
    given = [*arguments, f"model.path={assets / 'bare'}"]
    refused(door(*given), 2, "neither model.safetensors nor", "model.random_init=true")
    parts = ("bare' holds no tokenizer; give a folder with tokenizer.json",)
    refused(door(*given, "model.random_init=true"), 2, *parts)


# The data


@pytest.mark.parametrize(
    ("lines", "given", "parts"),
    [
        (None, [], ["rows.jsonl: no such file; check the path"]),
        ([""], [], ["rows.jsonl: the file is empty; it must hold at least one row"]),
        (['{"instruction": "p", "output": "r"}', "{broken"], [], ["rows.jsonl:2: broken JSON"]),
        (
            ['{"instruction": "p", "output": "r"}', '{"instruction": "p", "answer": "r"}'],
            [],
            ["rows.jsonl:2: no response: ", "columns found: answer, instruction", "response_key"],
        ),
        (
            ['{"q": "p", "a": "r"}'],
            ["data.prompt_key=q", "data.response_key=answer"],
            ["rows.jsonl:1: no response: column 'answer' is absent or null"],
        ),
        (
            ['{"instruction": "p", "output": "r"}'],
            ["data.sequence_length=5"],
            ["data.sequence_length=5 is shorter than every sample", "raise data.sequence_length"],
        ),
        (
            ['{"instruction": "p", "output": ""}'],
            [],
            ["none of its 1 rows can be trained on (1 empty_response)"],
        ),
    ],
)
def test_data_that_cannot_be_trained_on_is_code_3(
    door: Door, tmp_path: Path, arguments: list[str], lines: Any, given: Any, parts: Any
) -> None:
    path = tmp_path / "rows.jsonl"
    if lines is not None:
        path.write_text("\n".join(lines))
    refused(door(*arguments, f"data.train=[{{path: {path}}}]", *given), 3, str(path), *parts)


# The plan


def qwen_7b(folder: Path) -> Path:
    """A folder with the real configuration, a tiny tokenizer and no weights."""
    tiny_tokenizer().save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps(QWEN_7B))
    return folder


@pytest.mark.slow
def test_a_dry_run_of_seven_billion_parameters_prints_the_plan_and_writes_nothing(
    door: Door, assets: Path, tmp_path: Path
) -> None:
    given = [
        *("--config-name", "qwen7b_sft", f"model.path={qwen_7b(tmp_path / 'model')}"),
        *(f"data.train=[{{path: {assets / 'rows.jsonl'}}}]", "data.cache_dir=cache"),
        "train.global_batch_size=32",
    ]
    prepared = door(*given, "prepare_only=true", "model.random_init=true", "output_dir=prepared")
    assert prepared.code == 0, prepared.stderr
    before = contents(tmp_path)
    outcome = process(tmp_path, *given, "dry_run=true")
    assert (outcome.code, outcome.stderr) == (0, "")
    (header,) = [line for line in outcome.stdout.splitlines() if line.startswith(" workers")]
    assert [cell.strip() for cell in header.split("\u2503")[:5]] == [
        "workers",
        "TP",
        "PP",
        "CP",
        "DP",
    ]
    assert cells(outcome.stdout, "8")[1:7] == ["2", "1", "1", "4", "on", "8192"]
    assert cells(outcome.stdout, "Qwen2ForCausalLM") == [
        *("Qwen2ForCausalLM", "7,615,616,512", "28", "3584", "bf16")
    ]
    steps = math.ceil(NUM_ROWS / 32)
    assert cells(outcome.stdout, "optimizer steps")[1].startswith(f"{steps} ({steps} per epoch")
    tokenizer = tiny_tokenizer()
    texts = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ],
            tokenize=False,
        )
        for row in map(alpaca, range(NUM_ROWS))
    ]
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert cells(outcome.stdout, "tokens in the run")[1] == f"{tokens:,}"
    # 7.6e9 parameters over TP 2, 2 + 4 bytes each, and 12 more cut over DP 4.
    assert 31 < float(cells(outcome.stdout, "weights, gradients, optimizer")[1].split()[0]) < 33
    assert contents(tmp_path) == before


def test_a_dry_run_tokenises_nothing_and_estimates_what_is_not_in_the_cache(
    door: Door, assets: Path, tmp_path: Path, arguments: list[str]
) -> None:
    outcome = door(*arguments, "dry_run=true")
    assert outcome.code == 0, outcome.stderr
    assert "lacks the tokens of 1 of 1 parts of the data; prepare_only=true" in outcome.stderr
    assert cells(outcome.stdout, "rows (train)")[1:3] == [str(NUM_ROWS)] * 2
    assert "(estimate)" in outcome.stdout
    assert contents(tmp_path) == {}
    assert door(*arguments, "prepare_only=true").code == 0
    before = contents(tmp_path)
    outcome = door(*arguments, "dry_run=true")
    assert "optimizer steps (estimate)" not in outcome.stdout
    cells(outcome.stdout, "optimizer steps")
    assert contents(tmp_path) == before
    # Fewer bytes than one token is taken for are a step all the same.
    tiny = write_rows(tmp_path / "tiny.jsonl", [{"instruction": "a", "output": "b"}])
    short = [f"data.train=[{{path: {tiny}}}]", "train.global_batch_tokens=10", "dry_run=true"]
    outcome = door(*arguments, *short)
    assert outcome.code == 0, outcome.stderr
    assert cells(outcome.stdout, "optimizer steps (estimate)")[1].startswith("1 ")
    tiny.unlink()
    # One more file: what is in the cache no longer says what a run would do.
    more = write_rows(tmp_path / "more.jsonl", [alpaca(1)])
    both = f"data.train=[{{path: {assets / 'rows.jsonl'}}}, {{path: {more}}}]"
    outcome = door(*arguments, both, "dry_run=true")
    assert "lacks the tokens of 1 of 2 parts" in outcome.stderr
    assert contents(tmp_path).keys() == {*before, "more.jsonl"}


def test_a_dry_run_without_a_tokenizer_guesses_the_tokens_and_says_so(
    door: Door, assets: Path, tmp_path: Path, arguments: list[str]
) -> None:
    outcome = door(*arguments, f"model.path={assets / 'bare'}", "dry_run=true")
    assert outcome.code == 0, outcome.stderr
    assert "holds no tokenizer; give a folder with tokenizer.json" in outcome.stderr
    assert "guessed as UTF-8 bytes / 4" in outcome.stderr
    rows = [alpaca(number) for number in range(NUM_ROWS)]
    tokens = sum(len(row["instruction"] + row["output"]) for row in rows) // 4
    assert cells(outcome.stdout, "tokens in the run (estimate)")[1] == f"{tokens:,}"
    assert cells(outcome.stdout, "optimizer steps (estimate)")[1].startswith("1 (1 per epoch")
    assert cells(outcome.stdout, "1")[1:5] == ["1", "1", "1", "1"]
    assert contents(tmp_path) == {}


def test_a_dry_run_without_a_tokenizer_still_judges_the_rows(
    door: Door, assets: Path, tmp_path: Path, arguments: list[str]
) -> None:
    rows = [alpaca(1), {"instruction": "p", "output": ""}, {"instruction": "p"}]
    path = write_rows(tmp_path / "bad.jsonl", rows)
    given = [*arguments, f"model.path={assets / 'bare'}", "dry_run=true"]
    given.append(f"data.train=[{{path: {path}}}]")
    refused(door(*given), 3, "bad.jsonl:3: no response")
    outcome = door(*given, "data.on_bad_row=skip", "data.max_bad_fraction=0.5")
    assert outcome.code == 0, outcome.stderr
    assert cells(outcome.stdout, "bad (train)")[1:3] == ["3", "1"]
