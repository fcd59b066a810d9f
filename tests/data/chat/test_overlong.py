"""Samples longer than the sequence length, and samples that teach nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roll_sft.base.errors import DataError
from roll_sft.data.chat.chat import ChatTokenizer, TokenizedSample
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.rows.conversation import Document
from roll_sft.data.tokens.build_shard import SourceOptions
from roll_sft.data.tokens.cache import SourceReport, TokenSet
from roll_sft.data.tokens.prepare import CachePlace, Source, prepare_sources
from roll_sft.data.tokens.truncate import cut_sample
from tests.tiny import tiny_tokenizer


def run(path: Path, length: int, overlong: Any) -> tuple[TokenSet, SourceReport]:
    options = SourceOptions(
        ColumnKeys(),
        sequence_length=length,
        on_bad_row="error",
        max_bad_fraction=0.0,
        overlong=overlong,
    )
    ((tokens, report),) = prepare_sources(
        [Source(str(path), "demo")],
        tokenizer=ChatTokenizer(tiny_tokenizer()),
        options=options,
        place=CachePlace(path.parent / "cache"),
    )
    return TokenSet([tokens]), report


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A short row, one whose answer is too long for 60 tokens, and one whose prompt is."""
    path = tmp_path / "rows.jsonl"
    pairs = [("p", "a"), ("p", "word " * 90), ("word " * 90, "a")]
    lines = [json.dumps({"instruction": prompt, "output": answer}) for prompt, answer in pairs]
    path.write_text("\n".join(lines))
    return path


def test_drop_leaves_out_and_counts(rows: Path) -> None:
    tokens, report = run(rows, 60, "drop")
    assert (len(tokens), report.kept, report.truncated) == (1, 1, 0)
    assert report.dropped == {"overlong": 2}


def test_truncate_cuts_counts_and_keeps_only_what_still_teaches(rows: Path) -> None:
    whole, _ = run(rows, 1000, "drop")
    tokens, report = run(rows, 60, "truncate")
    assert (len(tokens), report.kept, report.samples, report.truncated) == (2, 2, 2, 1)
    assert report.dropped == {"overlong": 1}  # of its answer nothing was left
    assert report.dropped_places == {"overlong": [f"{rows}:3"]}
    cut, mask = tokens.sample(1)
    assert cut.size == 60
    assert cut.tolist() == whole.sample(1)[0][:60].tolist()  # a beginning, and no end of turn added
    assert mask[:-1].tolist() == whole.sample(1)[1][:59].tolist()
    assert mask[-1] == 0
    assert 0 < mask.sum() == tokens.supervised[1]


def test_error_names_the_place_and_the_length_each_time(rows: Path) -> None:
    length = int(run(rows, 1000, "drop")[0].lengths[1])
    for _ in range(2):
        with pytest.raises(DataError, match=rf"rows.jsonl:2: the sample has {length} tokens, more"):
            run(rows, 60, "error")
    run(rows, 60, "drop")
    with pytest.raises(DataError, match=rf"rows.jsonl:2: the sample has {length} tokens, more"):
        run(rows, 60, "error")  # where the tokens are in the cache
    assert run(rows, 1000, "error")[1].dropped == {}


@settings(deadline=None, max_examples=80)
@given(
    st.integers(2, 60),
    st.integers(1, 59),
    st.lists(st.tuples(st.integers(0, 59), st.integers(1, 9))),
)
def test_no_cut_goes_through_a_span_that_is_whole_or_nothing(
    size: int, limit: int, spans: list[tuple[int, int]]
) -> None:
    limit = min(limit, size - 1)
    atomic = tuple((start, min(start + length, size)) for start, length in spans if start < size)
    label_mask = np.ones(size, np.uint8)
    label_mask[-1] = 0
    cut = cut_sample(TokenizedSample(np.arange(size, dtype=np.int32), label_mask, atomic), limit)
    stop = cut.token_ids.size
    assert stop <= limit
    assert cut.token_ids.tolist() == list(range(stop))
    assert not any(start < stop < end for start, end in atomic)
    assert cut.label_mask.size == stop
    assert not cut.label_mask[-1:].any()
    if not atomic:
        assert stop == limit


class ManySamples(ChatTokenizer):
    """A tokenizer that gives each row three samples: a short one, a long one, and one of no use."""

    def tokenize_many(self, rows: Any) -> Any:
        def sample(size: int, supervised: int) -> TokenizedSample:
            mask = np.zeros(size, np.uint8)
            mask[:supervised] = 1
            return TokenizedSample(np.zeros(size, np.int32), mask)

        useless = [sample(5, 0)]
        several = [sample(5, 2), sample(50, 2), *useless]
        return [useless if isinstance(row, Document) else several for row in rows]


def test_samples_left_out_of_a_kept_row_are_counted_apart(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.mkdir()
    (path / "a.jsonl").write_text('{"instruction": "p", "output": "a"}\n' * 2)
    (path / "b.jsonl").write_text('{"text": "t"}\n')
    options = SourceOptions(
        ColumnKeys(), sequence_length=10, on_bad_row="error", max_bad_fraction=0.0
    )
    ((tokens, report),) = prepare_sources(
        [Source(str(path), "demo")],
        tokenizer=ManySamples(tiny_tokenizer()),
        options=options,
        place=CachePlace(tmp_path / "cache"),
    )
    assert (report.rows, report.kept, report.samples) == (3, 2, 2)
    assert report.dropped == {"no_supervised_tokens": 1}
    assert report.dropped_samples == {"overlong": 2, "no_supervised_tokens": 2}
    assert TokenSet([tokens]).supervised.tolist() == [2, 2]
