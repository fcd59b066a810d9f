"""Samples from Python become rows of a file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from roll_sft.base.errors import ConfigError, DataError
from roll_sft.python_api.samples import source_path

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def rows(samples: Iterable[Any], folder: Path) -> list[dict[str, Any]]:
    text = Path(source_path(samples, folder, name="samples")).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_each_shape_is_a_row_that_files_have_too(tmp_path: Path) -> None:
    given = ["a text", ("q", "a"), ["q", "a"], TURNS, (TURNS[:1], TURNS[1:]), {"instruction": "q"}]
    assert rows(iter(given), tmp_path) == [
        {"text": "a text"},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": "a"},
        {"messages": TURNS},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"instruction": "q"},
    ]


def test_a_dataset_is_its_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    dataset = Dataset.from_dict({"messages": [TURNS, TURNS], "id": [1, 2]})
    assert rows(dataset, tmp_path) == [{"messages": TURNS, "id": each} for each in (1, 2)]


def test_equal_samples_are_one_file_and_others_another(tmp_path: Path) -> None:
    paths = {source_path(each, tmp_path, name="samples") for each in (["a"], ("a",), iter(["a"]))}
    assert len(paths) == 1
    assert source_path(["b"], tmp_path, name="samples") not in paths
    assert len(list(tmp_path.iterdir())) == 2


def test_a_path_stays_a_path(tmp_path: Path) -> None:
    assert source_path("my.jsonl", tmp_path, name="samples") == "my.jsonl"
    assert source_path(tmp_path / "my.jsonl", tmp_path, name="samples") == f"{tmp_path}/my.jsonl"


@pytest.mark.parametrize(
    ("samples", "kind", "line"),
    [
        ([], DataError, r"samples: is empty; give at least one of: a text"),
        (["a", 3], DataError, r"samples\[1\]: 3 is not a text, a \(prompt, completion\) pair"),
        ([("a", "b", "c")], DataError, r"samples\[0\]: \('a', 'b', 'c'\) is not a text"),
        ([{"a": {1}}], DataError, r"samples\[0\]: \{'a': \{1\}\} cannot be written as JSON"),
        ({"train": []}, ConfigError, r"samples: is a dict of train; give one of these"),
        (3, ConfigError, r"samples: 3 is neither a path nor a list of samples"),
        ([__file__], ConfigError, r"samples: its texts are names of files"),
    ],
)
def test_what_is_no_sample_is_named(
    samples: Any, kind: type[Exception], line: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=line):
        source_path(samples, tmp_path, name="samples")
    assert not list(tmp_path.iterdir())


def test_a_table_is_given_by_its_rows(tmp_path: Path) -> None:
    import pandas

    table = pandas.DataFrame({"prompt": ["q"], "completion": ["a"]})
    with pytest.raises(ConfigError, match=r"samples: is a DataFrame; give its rows, \.to_dict"):
        source_path(table, tmp_path, name="samples")
    assert rows(table.to_dict("records"), tmp_path) == [{"prompt": "q", "completion": "a"}]
