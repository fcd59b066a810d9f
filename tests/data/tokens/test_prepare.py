"""Filling token caches: counts, hits and misses, two runs at once, damage and sudden death."""

import copy
import json
import logging
import multiprocessing
import os
import shutil
import signal
from dataclasses import asdict, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from roll_sft.base.errors import DataError, ResourceError
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.tokens import build_shard
from roll_sft.data.tokens.build_shard import SourceOptions
from roll_sft.data.tokens.cache import SourceReport, TokenCache
from roll_sft.data.tokens.prepare import CachePlace, Source, prepare_sources
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

STRICT = SourceOptions(ColumnKeys(), sequence_length=512, on_bad_row="error", max_bad_fraction=0.01)
LENIENT = replace(STRICT, on_bad_row="skip", max_bad_fraction=0.5)


def row(answer: Any, prompt: str = "p") -> dict[str, Any]:
    return {"instruction": prompt, "output": answer}


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def run(
    path: Path, options: SourceOptions = STRICT, template: str = CHATML_TEMPLATE
) -> tuple[Path, SourceReport]:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    ((tokens, report),) = prepare_sources(
        [Source(str(path), "demo")],
        tokenizer=ChatTokenizer(tokenizer),
        options=options,
        place=CachePlace(path.parent / "cache"),
    )
    (cache,) = tokens.caches
    return cache.folder, report


def lines(*answers: str) -> list[dict[str, Any]]:
    return [row(answer) for answer in answers]


# Counts


def test_the_report_accounts_for_every_row(tmp_path: Path) -> None:
    long = row("word " * 600)
    first = [row("a"), row(5), long, row("b " * 9), long, [1], long, row(""), long]
    path = write(tmp_path, *first, row("c"))
    folder, report = run(path, LENIENT)
    assert report.rows == 10
    assert report.kept == 3
    assert report.dropped == {"malformed": 2, "overlong": 4, "empty_response": 1}
    assert report.kept + sum(report.dropped.values()) == report.rows
    assert report.dropped_places == {
        "malformed": [f"{path}:2", f"{path}:6"],
        "overlong": [f"{path}:3", f"{path}:5", f"{path}:7"],
        "empty_response": [f"{path}:8"],
    }
    cache = TokenCache(folder)
    assert cache.rows.tolist() == [0, 3, 9]
    assert report.tokens == cache.lengths.sum()
    assert report.supervised_tokens == cache.supervised.sum()
    assert report.supervised_share == pytest.approx(cache.supervised.sum() / cache.lengths.sum())
    ordered = sorted(cache.lengths.tolist())
    assert report.length == {
        "min": ordered[0],
        "p50": ordered[1],
        "p90": ordered[2],
        "p99": ordered[2],
        "max": ordered[2],
    }
    assert (report.name, report.path, report.truncated) == ("demo", str(path), 0)
    assert json.loads(json.dumps(report.to_dict())) == asdict(report)


def test_many_rows_left_out_are_a_warning_with_counts_and_a_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = write(tmp_path, *lines(*"abcdefghijklmnopqrs"), row("word " * 600))
    run(few, LENIENT)
    assert not [each for each in caplog.records if each.levelname == "WARNING"]
    many = write(tmp_path, *lines(*"abcdefghijklmnopq"), row("word " * 600), row(""))
    run(many, LENIENT)
    (warning,) = (each.getMessage() for each in caplog.records if each.levelname == "WARNING")
    told = "demo: 10.5 % of its rows are left out (2 of 19: 1 empty_response, 1 overlong); data.seq"
    assert warning.startswith(told)
    longest = int(warning.partition("data.sequence_length=")[2].split()[0])
    assert run(many, replace(LENIENT, sequence_length=longest))[1].dropped == {"empty_response": 1}


def test_columns_left_aside_are_said_once_for_each_source(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, {**row("a"), "id": 1}, {**row("b"), "topic": "x"})
    with caplog.at_level("INFO"):
        for _ in range(2):  # prepared, and from the cache
            caplog.clear()
            assert run(path)[1].columns_left_aside == ["id", "topic"]
            assert [each.getMessage() for each in caplog.records if "aside" in each.message] == [
                "demo: columns left aside: id, topic"
            ]


def test_places_in_an_array_count_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row("a"), row(""), row("b"), {"output": "r"}, row("")]))
    with pytest.raises(DataError, match=r"rows\.json:1 \(row 4\): .*\bprompt\b"):
        run(path)
    assert run(path, LENIENT)[1].dropped_places == {
        "empty_response": [f"{path}:1 (row 2)", f"{path}:1 (row 5)"],
        "malformed": [f"{path}:1 (row 4)"],
    }


def test_a_sample_of_exactly_the_sequence_length_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, *lines("a", "a b c d"))
    _, report = run(path)
    longest = report.length["max"]
    assert run(path, replace(STRICT, sequence_length=longest))[1].dropped == {}
    assert run(path, replace(STRICT, sequence_length=longest - 1))[1].dropped == {"overlong": 1}


def test_rows_past_one_batch_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row("x" * (index % 7) or "y", prompt=f"{index}") for index in range(25)]
    rows[11] = row("")
    whole, _ = run(write(tmp_path, *rows), LENIENT)
    expected = TokenCache(whole)
    monkeypatch.setattr(build_shard, "_ROWS_PER_BATCH", 4)
    other = tmp_path / "other"
    other.mkdir()
    found = TokenCache(run(write(other, *rows), LENIENT)[0])
    assert found.rows.tolist() == [index for index in range(25) if index != 11]
    for index in range(24):
        assert found.sample(index)[0].tolist() == expected.sample(index)[0].tolist()


def test_the_first_bad_row_ends_a_strict_run_and_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, row("a"), {"instruction": "p"}, row("b"))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*\bresponse\b"):
        run(path)
    refused = write(tmp_path, row("a"), row("<|im_end|>\ufdd0"), name="refused.jsonl")
    with pytest.raises(DataError, match=r"refused\.jsonl:2: .*U\+"):
        run(refused)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock", ".lock"]


def test_too_many_bad_rows_end_a_lenient_run_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, row("a"), row(5), row("b"), row("<|im_end|>\ufdd0"))
    for _ in range(2):
        with pytest.raises(DataError, match=r"2 of 4 .* data.max_bad_fraction=0.4; .*jsonl:2: "):
            run(path, replace(LENIENT, max_bad_fraction=0.4))
    with caplog.at_level(logging.WARNING):
        assert run(path, LENIENT)[1].kept == 2  # exactly half is not more than half
    assert caplog.text.count("skipped 2 of 4 rows as malformed") == 1


def test_nothing_kept_says_why(tmp_path: Path) -> None:
    path = write(tmp_path, *lines("a b c", "a", "a b"))
    shortest = run(path)[1].length["min"]
    with pytest.raises(DataError, match=rf"data.sequence_length=9 .* to at least {shortest}$"):
        run(path, replace(STRICT, sequence_length=9))
    with pytest.raises(DataError, match=r"\b1 malformed\b.*number"):
        run(write(tmp_path, row(5)), LENIENT)


EMPTY_ROWS = [
    row(""),
    row(" \n\t"),
    {"prompt": "p", "query": "q", "response": ""},
    {"messages": []},
    {"messages": [{"role": "user", "content": "p"}]},
    {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": " "}]},
]


@pytest.mark.parametrize("empty", EMPTY_ROWS, ids=json.dumps)
def test_an_empty_response_is_dropped_and_counted_and_never_an_error(
    tmp_path: Path, empty: dict[str, Any]
) -> None:
    messages = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    full = {"messages": messages} if "messages" in empty else row("a")
    path = write(tmp_path, full, empty, empty, full, empty, empty)
    strict = replace(STRICT, max_bad_fraction=0.0)
    for options in (strict, replace(strict, on_bad_row="skip")):
        folder, report = run(path, options)
        assert report.dropped == {"empty_response": 4}
        assert report.dropped_places == {"empty_response": [f"{path}:{line}" for line in (2, 3, 5)]}
        assert (report.rows, report.kept) == (6, 2)
        assert TokenCache(folder).rows.tolist() == [0, 3]


def test_a_source_of_empty_responses_alone_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, row(""), row(" "), row("\n"))
    for options in (STRICT, LENIENT):
        with pytest.raises(DataError, match=r"\b3 empty_response\b"):
            run(path, options)


# Hits and misses


def test_the_second_call_tokenises_nothing_and_reports_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, row("a"), row(""), row("b"))
    folder, first = run(path, LENIENT)
    assert not first.cached
    again, second = run(path, LENIENT)
    assert again == folder
    assert second == replace(first, cached=True)


def test_the_same_rows_elsewhere_are_a_hit_under_their_own_name(tmp_path: Path) -> None:
    path = write(tmp_path, row("a"), row(5), row(""))
    folder, _ = run(path, LENIENT)
    moved = path.rename(tmp_path / "moved.json")
    again, report = run(moved, LENIENT)
    assert (again, report.cached, report.path) == (folder, True, str(moved))
    assert report.dropped_places == {
        "malformed": [f"{moved}:2"],
        "empty_response": [f"{moved}:3"],
    }


def test_whatever_changes_the_samples_is_a_miss(tmp_path: Path) -> None:
    path = write(tmp_path, *lines("a", "b"))
    folders = {run(path)[0]}
    folders.add(run(path, replace(STRICT, sequence_length=511))[0])
    folders.add(run(path, replace(STRICT, overlong="truncate"))[0])
    folders.add(run(path, replace(STRICT, keys=ColumnKeys(prompt="instruction")))[0])
    folders.add(run(path, template=CHATML_TEMPLATE.replace("helpful", "terse"))[0])
    write(tmp_path, *lines("a", "c"))
    folders.add(run(path)[0])
    assert len(folders) == 6
    for same in ({"max_bad_fraction": 0.5}, {"on_bad_row": "skip"}, {"overlong": "error"}):
        assert run(path, replace(STRICT, **same))[1].cached


# Concurrency, damage, death


def test_two_runs_at_once_prepare_once(tmp_path: Path) -> None:
    path = write(tmp_path, *lines(*(f"answer {index}" for index in range(200))))
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        results = pool.map(run, [path, path], chunksize=1)
    assert results[0][0] == results[1][0]
    assert sorted(report.cached for _, report in results) == [False, True]


def test_waiting_for_another_run_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, row("a"))
    folder, _ = run(path)
    shutil.rmtree(folder)
    monkeypatch.setattr(build_shard, "_LOCK_NOTICE_S", 0.05)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    with ThreadPool(1) as pool, caplog.at_level(logging.WARNING):
        with lock:
            waiting = pool.apply_async(run, [path])
            waiting.wait(0.5)
            assert not waiting.ready()
        assert waiting.get(30)[0] == folder
    assert "waiting for another run" in caplog.text


@pytest.mark.parametrize("file", ["tokens.bin", "offsets.bin", "report.json"])
def test_a_damaged_cache_is_prepared_again_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    path = write(tmp_path, *lines("a", "b"))
    folder, first = run(path)
    whole = {each.name: each.read_bytes() for each in folder.iterdir()}
    (folder / file).write_bytes(whole[file][:-3])
    with caplog.at_level(logging.WARNING):
        again, second = run(path)
    assert (again, second) == (folder, first)
    assert {each.name: each.read_bytes() for each in folder.iterdir()} == whole
    assert len(caplog.records) == 1
    assert str(folder) in caplog.text


def die_while_writing(path: Path) -> None:
    """Kill this process when the samples are on disk and the report is not."""
    build_shard.stamp_of = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,return-value]
    run(path)


def test_a_run_killed_while_writing_leaves_nothing_that_is_taken_for_a_cache(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, *lines("a", "b"))
    process = multiprocessing.get_context("spawn").Process(target=die_while_writing, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").glob(".*.tmp")
    assert (left / "tokens.bin").stat().st_size > 0

    folder, report = run(path)
    assert not report.cached
    assert not left.exists()
    assert len(TokenCache(folder)) == 2


def test_a_source_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, *lines("a", "b"))
    original = ChatTokenizer.tokenize_many

    def grow(self: ChatTokenizer, conversations: Any) -> Any:
        with path.open("a") as file:
            file.write("\n")
        return original(self, conversations)

    monkeypatch.setattr(ChatTokenizer, "tokenize_many", grow)
    with pytest.raises(DataError, match=r"rows\.jsonl: .*changed"):
        run(path)


def test_a_cache_folder_that_cannot_be_made_is_a_resource_error(tmp_path: Path) -> None:
    path = write(tmp_path, row("a"))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ResourceError, match=r"data\.cache_dir"):
        run(path)


def test_a_missing_source_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: "):
        run(tmp_path / "rows.jsonl")
