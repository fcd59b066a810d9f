"""Reading token caches: shapes, views, several sources under one index, pickling, damage."""

import json
import pickle
import re
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from roll_sft.base.errors import DataError
from roll_sft.data.chat.chat import ChatTokenizer, TokenizedSample
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.rows.conversation import Conversation, Message
from roll_sft.data.tokens.build_shard import SourceOptions, ready
from roll_sft.data.tokens.cache import (
    ARRAYS,
    FORMAT,
    PER_SAMPLE,
    REPORT_FILE,
    SourceTokens,
    TokenCache,
    TokenSet,
)
from roll_sft.data.tokens.prepare import CachePlace, Source, prepare_sources
from roll_sft.job import job
from roll_sft.job.job import verifying
from tests.tiny import tiny_tokenizer

OPTIONS = SourceOptions(ColumnKeys(), sequence_length=512, on_bad_row="skip", max_bad_fraction=0.5)


def make(folder: Path, answers: list[str], name: str = "demo") -> Path:
    source = folder / f"{name}.jsonl"
    rows = [
        {"instruction": f"{name} {index}", "output": text} for index, text in enumerate(answers)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = ChatTokenizer(tiny_tokenizer())
    place = CachePlace(folder / "cache")
    wanted = [Source(str(source), name)]
    ((tokens, _),) = prepare_sources(wanted, tokenizer=chat, options=OPTIONS, place=place)
    (cache,) = tokens.caches
    return cache.folder


def one_source(*caches: TokenCache) -> TokenSet:
    return TokenSet([SourceTokens("demo", caches)])


def expected(name: str, row: int, answer: str) -> TokenizedSample:
    messages = (Message("user", f"{name} {row}"), Message("assistant", answer))
    row_read = Conversation(messages, row=row, line=row + 1)
    (sample,) = ChatTokenizer(tiny_tokenizer()).tokenize(row_read)
    return sample


def test_weights_of_rows_are_those_of_their_samples_and_0_leaves_a_row_out(tmp_path: Path) -> None:
    plain = TokenCache(make(tmp_path, ["one", "two"], "plain"))
    source, weights = tmp_path / "rows.jsonl", [0.5, None, 0, 3]
    rows = [
        {"instruction": f"row {index}", "output": "yes", "weight": weight}
        for index, weight in enumerate(weights)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = CachePlace(tmp_path / "cache")
    chat = ChatTokenizer(tiny_tokenizer())
    ((tokens, report),) = prepare_sources(
        [Source(str(source), "rows")], tokenizer=chat, options=OPTIONS, place=place
    )
    assert report.dropped == {"empty_response": 1}
    both = TokenSet([SourceTokens("plain", (plain,)), tokens])
    assert both.weights is not None
    assert both.weights.tolist() == [1, 1, 0.5, 1, 3]
    assert one_source(plain).weights is None


def test_samples_are_what_the_tokenizer_gave_row_by_row(tmp_path: Path) -> None:
    answers = ["one", "", "\u4f60 three", "four " * 20]
    cache = TokenCache(make(tmp_path, answers))
    assert len(cache) == 3
    assert cache.rows.tolist() == [0, 2, 3]
    for index, row in enumerate([0, 2, 3]):
        sample = expected("demo", row, answers[row])
        tokens, label_mask = cache.sample(index)
        assert tokens.dtype == np.int32
        assert label_mask.dtype == np.uint8
        assert tokens.tolist() == sample.token_ids.tolist()
        assert label_mask.tolist() == sample.label_mask.tolist()
        assert cache.lengths[index] == len(sample.token_ids)
        assert cache.supervised[index] == sample.label_mask.sum()


def test_samples_are_views_that_cannot_be_written(tmp_path: Path) -> None:
    tokens, _ = TokenCache(make(tmp_path, ["one"])).sample(0)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_several_caches_have_one_index_and_their_own_names(tmp_path: Path) -> None:
    first = TokenCache(make(tmp_path, ["one", "", "two"], name="first"))
    second = TokenCache(make(tmp_path, ["three"], name="second"))
    parts = [("a", first), ("b", second), ("again", first)]
    samples = TokenSet([SourceTokens(name, (cache,)) for name, cache in parts])
    assert len(samples) == 5
    names = [samples.sample_name(index) for index in range(5)]
    assert names == ["a:0", "a:2", "b:0", "again:0", "again:2"]
    assert samples.sample(2)[0].tolist() == expected("second", 0, "three").token_ids.tolist()
    assert samples.sample(4)[0].tolist() == expected("first", 2, "two").token_ids.tolist()
    assert samples.lengths.tolist() == [samples.sample(index)[0].size for index in range(5)]
    assert samples.supervised.tolist() == [samples.sample(index)[1].sum() for index in range(5)]
    assert samples.lengths.dtype == samples.supervised.dtype == np.int32


def test_rows_of_a_source_count_over_its_shards(tmp_path: Path) -> None:
    first = TokenCache(make(tmp_path, ["one", "", "two"], name="first"))
    second = TokenCache(make(tmp_path, ["three"], name="second"))
    empty = TokenCache(make(tmp_path, ["four"], name="third"))
    samples = TokenSet(
        [SourceTokens("a", (first, second, first)), SourceTokens("b", (empty, second))]
    )
    names = [samples.sample_name(index) for index in range(len(samples))]
    assert names == ["a:0", "a:2", "a:3", "a:4", "a:6", "b:0", "b:1"]
    assert samples.ranges == {"a": range(5), "b": range(5, 7)}


@pytest.mark.parametrize("index", [-1, 2, 100])
def test_an_index_out_of_range_is_an_error(tmp_path: Path, index: int) -> None:
    cache = TokenCache(make(tmp_path, ["one", "two"]))
    samples = one_source(cache)
    for read in (cache.sample, samples.sample, samples.sample_name):
        with pytest.raises(IndexError, match=rf" {index} of 2\b"):
            read(index)


def test_a_set_pickles_as_names_and_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path, ["one " * 90] * 50)
    monkeypatch.chdir(tmp_path)
    samples = one_source(TokenCache(folder.relative_to(tmp_path)))
    assert samples.lengths.size == 50  # read before it travels
    packed = pickle.dumps(samples)
    assert len(packed) < 1000
    monkeypatch.chdir("/")
    again: TokenSet = pickle.loads(packed)
    assert again.sample_name(49) == "demo:49"
    assert again.sample(49)[0].tolist() == samples.sample(49)[0].tolist()


def test_a_folder_is_opened_when_it_is_first_needed(tmp_path: Path) -> None:
    samples = one_source(TokenCache(tmp_path / "not yet"))
    with pytest.raises(DataError, match=r"not yet: "):
        len(samples)


@pytest.mark.parametrize("array", list(ARRAYS))
def test_a_file_of_the_wrong_size_is_found_on_opening(tmp_path: Path, array: str) -> None:
    folder = make(tmp_path, ["one", "two"])
    file = folder / f"{array}.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{array}\.bin: .*\d+ bytes"):
        len(TokenCache(folder))
    file.unlink()
    with pytest.raises(DataError, match=re.escape(str(folder))):
        len(TokenCache(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ""),
        ("[]", ""),
        ('{"unknown": 1}', ""),
        ('{"format": 1}', rf".*\b1\b.*\b{FORMAT}\b"),
    ],
)
def test_a_report_that_is_not_ours_is_found_on_opening(
    tmp_path: Path, content: str, message: str
) -> None:
    folder = make(tmp_path, ["one"])
    (folder / REPORT_FILE).write_text(content)
    with pytest.raises(DataError, match=re.escape(str(folder)) + message):
        len(TokenCache(folder))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("array", list(ARRAYS))
def test_a_flipped_bit_is_found_whichever_array_has_it_and_mended_by_the_next_start(
    tmp_path: Path, array: str
) -> None:
    folder = make(tmp_path, ["one", "two"])
    with verifying([folder]) as verified:
        verified()
    assert ready(folder) is not None
    flip_a_bit(folder / f"{array}.bin")
    if array in PER_SAMPLE:  # found where the folder is opened, before anything is planned
        assert ready(folder) is None
        return
    assert ready(folder) is not None, "the larger arrays are read beside the start"
    message = rf"{array}.bin: its bytes are not those .* run the same command again"
    with verifying([folder]) as verified, pytest.raises(DataError, match=message):
        verified()
    assert ready(folder) is None, "the next start would not prepare it again"


def test_a_block_that_ends_early_waits_for_no_tokens(tmp_path: Path) -> None:
    folder = make(tmp_path, ["one"])
    read = []

    def slowly(where: Path, *_: object) -> None:
        read.append(where)
        time.sleep(0.2)

    with patch.object(job, "check_arrays", slowly), verifying([folder] * 50):
        pass
    assert len(read) <= 2 * job._VERIFIERS
