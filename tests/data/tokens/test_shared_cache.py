"""Many shards: one more file costs one more file, processes share the work, and may die of it."""

import copy
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from roll_sft.base.errors import DataError, ResourceError
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.tokens import build_shard as build_module
from roll_sft.data.tokens import file_index
from roll_sft.data.tokens.build_shard import BuiltShard, ShardTask, SourceOptions
from roll_sft.data.tokens.cache import SourceReport, TokenSet
from roll_sft.data.tokens.prepare import CachePlace, Source, prepare_sources
from tests.tiny import tiny_tokenizer

OPTIONS = SourceOptions(ColumnKeys(), sequence_length=512, on_bad_row="skip", max_bad_fraction=0.5)


def write(folder: Path, number: int, num_rows: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"part_{number:02d}.jsonl"
    rows = [{"instruction": f"p{number}", "output": f"a{number} {row}"} for row in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(
    path: Path, options: SourceOptions = OPTIONS, **place: Any
) -> tuple[TokenSet, SourceReport]:
    ((tokens, report),) = prepare_sources(
        [Source(str(path), "demo")],
        tokenizer=ChatTokenizer(copy.deepcopy(tiny_tokenizer())),
        options=options,
        place=CachePlace(path.parent / "cache", **place),
    )
    return TokenSet([tokens]), report


class Counting:
    """A spread that remembers which files it prepared."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def __call__(self, tokenizer: ChatTokenizer, tasks: Any) -> Iterator[BuiltShard]:
        for task in tasks:
            self.files.append(Path(task.shard.file).name)
            yield build_module.build_shard(tokenizer, task)


def test_one_more_file_costs_one_more_file(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "rows", number)
    tokens, report = run(tmp_path / "rows")
    assert (report.rows, report.samples, report.cached) == (9, 9, False)
    write(tmp_path / "rows", 3)
    counting = Counting()
    more, again = run(tmp_path / "rows", spread=counting)
    assert counting.files == ["part_03.jsonl"]
    assert (again.rows, again.cached) == (12, False)
    assert [more.sample_name(index) for index in range(12)] == [f"demo:{row}" for row in range(12)]
    for index in range(9):
        assert more.sample(index)[0].tolist() == tokens.sample(index)[0].tolist()
    assert run(tmp_path / "rows", spread=counting)[1].cached
    assert counting.files == ["part_03.jsonl"]


def test_equal_shards_are_prepared_once_and_have_places_of_their_own(tmp_path: Path) -> None:
    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_text('{"instruction": "p", "output": "a"}\n{"instruction": "p", "output": ""}\n')
    other.write_bytes(one.read_bytes())
    counting = Counting()
    (_, first), (_, second) = prepare_sources(
        [Source(str(one), "a"), Source(str(other), "b")],
        tokenizer=ChatTokenizer(tiny_tokenizer()),
        options=OPTIONS,
        place=CachePlace(tmp_path / "cache", spread=counting),
    )
    assert counting.files == ["a.jsonl"]
    assert first.dropped_places == {"empty_response": [f"{one}:2"]}
    assert second.dropped_places == {"empty_response": [f"{other}:2"]}


def test_places_and_counts_join_over_shards(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    for number in range(3):
        path = write(folder, number)
        path.write_text(path.read_text() + '{"instruction": "p", "output": ""}\n' * 2)
    _, report = run(folder)
    assert report.dropped == {"empty_response": 6}
    first, second = folder / "part_00.jsonl", folder / "part_01.jsonl"
    assert report.dropped_places["empty_response"] == [f"{first}:4", f"{first}:5", f"{second}:4"]
    assert (report.rows, report.kept) == (15, 9)


def test_processes_prepare_what_this_process_would(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / "rows", number, num_rows=20)
    shared, report = run(tmp_path / "rows", num_proc=2)
    assert (report.samples, report.cached) == (80, False)
    (tmp_path / "other").mkdir()
    alone, _ = run((tmp_path / "rows").rename(tmp_path / "other" / "rows"), num_proc=1)
    assert len(alone) == 80
    for index in range(80):
        assert shared.sample(index)[0].tolist() == alone.sample(index)[0].tolist()
        assert shared.sample_name(index) == alone.sample_name(index)


def test_an_error_in_a_process_is_the_error_of_the_run(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "rows", number)
    (tmp_path / "rows" / "part_01.jsonl").write_text('{"instruction": "p"}\n')
    with pytest.raises(DataError, match=r"part_01\.jsonl:1: .*\bresponse\b"):
        run(tmp_path / "rows", replace(OPTIONS, on_bad_row="error"), num_proc=2)


class DiesAtWork(ChatTokenizer):
    """As where memory runs out."""

    def tokenize_many(self, rows: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class DiesAtStart(ChatTokenizer):
    """Its helper dies before it has read the rest, more than a pipe holds."""

    def __reduce__(self) -> Any:
        return (os._exit, (3,), bytes(1 << 20))


@pytest.mark.parametrize("tokenizer", [DiesAtWork, DiesAtStart])
def test_a_process_that_dies_ends_the_run_and_nothing_hangs(
    tmp_path: Path, tokenizer: type[ChatTokenizer]
) -> None:
    for number in range(3):
        write(tmp_path / "rows", number)
    with pytest.raises(ResourceError, match=r"\b2\b"):
        prepare_sources(
            [Source(str(tmp_path / "rows"), "demo")],
            tokenizer=tokenizer(tiny_tokenizer()),
            options=OPTIONS,
            place=CachePlace(tmp_path / "cache", num_proc=2),
        )


def slow_run(path: Path) -> None:
    """Prepare with two processes, whose folders can be watched as they come."""
    run(path, num_proc=2)


def test_a_preparation_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    folder, cache = tmp_path / "rows", tmp_path / "cache"
    for number in range(12):
        write(folder, number, num_rows=400)
    process = multiprocessing.get_context("spawn").Process(target=slow_run, args=(folder,))
    process.start()
    deadline = time.monotonic() + 60
    while len(list(cache.glob("[0-9a-f]*/report.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    wait_for_silence(cache)
    done = {path.parent.name for path in cache.glob("[0-9a-f]*/report.json")}
    assert 3 <= len(done) < 12
    counting = Counting()
    tokens, report = run(folder, spread=counting)
    # What was published is kept, so at most the shard in hand of each process is done again.
    assert len(counting.files) == 12 - len(done)
    assert (len(tokens), report.rows) == (4800, 4800)
    assert not list(cache.glob(".*.tmp"))


class WaitsForEver(ChatTokenizer):
    """Says in a file of its own that work has begun, and which process does it."""

    def tokenize_many(self, rows: Any) -> Any:
        (Path(os.environ["STARTED"]) / str(os.getpid())).touch()
        time.sleep(600)


def interrupted_run(folder: Path) -> None:
    """Prepare with two processes until Ctrl-C, as a terminal sends it: to all of them."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["STARTED"] = str(folder / "started")
    prepare_sources(
        [Source(str(folder / "rows"), "demo")],
        tokenizer=WaitsForEver(tiny_tokenizer()),
        options=OPTIONS,
        place=CachePlace(folder / "cache", num_proc=2),
    )


def test_ctrl_c_ends_the_processes_with_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "started").mkdir()
    for number in range(3):
        write(tmp_path / "rows", number)
    process = multiprocessing.get_context("spawn").Process(target=interrupted_run, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "started").iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    helpers = [int(each.name) for each in (tmp_path / "started").iterdir()]
    assert len(helpers) == 2
    os.killpg(process.pid or 0, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 1  # a traceback of KeyboardInterrupt, this process's alone
    assert capfd.readouterr().err.count("KeyboardInterrupt") == 1
    while any(map(is_running, helpers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, helpers))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_silence(cache: Path) -> None:
    """Until the processes of a killed run have ended, which they do by themselves."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
        time.sleep(0.5)
        if before == {path: path.stat().st_mtime_ns for path in cache.rglob("*")}:
            return
    raise AssertionError("the processes of a killed run go on")


def test_two_runs_share_the_shards_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "rows"
    for number in range(4):
        write(folder, number)
    original, seen = build_module._build, []
    both = threading.Barrier(2)

    def build(place: Path, tokenizer: ChatTokenizer, task: ShardTask) -> Any:
        if len(seen) < 2:
            seen.append(task.shard.file)
            both.wait(30)  # each run has a shard in hand, so the other must take the next one
        else:
            seen.append(task.shard.file)
        return original(place, tokenizer, task)

    monkeypatch.setattr(build_module, "_build", build)
    results: list[tuple[TokenSet, SourceReport]] = []
    runs = [threading.Thread(target=lambda: results.append(run(folder))) for _ in range(2)]
    for each in runs:
        each.start()
    for each in runs:
        each.join(60)
    assert len(results) == 2
    assert sorted(seen) == sorted(set(seen))
    assert [len(tokens) for tokens, _ in results] == [12, 12]


# Files that are remembered


def test_a_file_that_is_known_is_not_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows", 0)
    monkeypatch.setattr(file_index, "_SETTLED_S", 0.0)
    run(path)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("hashed again")

    with monkeypatch.context() as patch:
        patch.setattr(file_index, "shards_of_file", refuse)
        assert run(path)[1].cached
        monkeypatch.chdir(path.parent.parent)
        report = run(Path("rows/part_00.jsonl"))[1]  # the same file under another name
        assert (report.cached, report.path) == (True, "rows/part_00.jsonl")
        with pytest.raises(AssertionError, match="hashed again"):
            run(write(path.parent, 0, num_rows=4))


def test_a_change_that_keeps_size_and_time_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows", 0)
    monkeypatch.setattr(file_index, "_SETTLED_S", 0.0)
    before, first = path.stat(), run(path)[0]
    path.write_text(path.read_text().replace("a0 0", "b0 0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert run(path)[0].sample(0)[0].tolist() != first.sample(0)[0].tolist()


def test_a_file_that_just_changed_is_not_remembered(tmp_path: Path) -> None:
    run(write(tmp_path / "rows", 0))
    assert not list((tmp_path / "rows" / "cache").glob("files/*.json"))


def test_a_damaged_note_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows", 0)
    monkeypatch.setattr(file_index, "_SETTLED_S", 0.0)
    run(path)
    (note,) = (tmp_path / "rows" / "cache").glob("files/*.json")
    whole = note.read_bytes()
    note.write_bytes(whole[:-5])
    assert run(path)[1].cached
    assert note.read_bytes() == whole


def test_progress_is_said_where_it_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        write(tmp_path / "rows", number)
    monkeypatch.setattr("roll_sft.data.tokens.prepare._NOTICE_S", 0.0)
    with caplog.at_level(logging.INFO):
        run(tmp_path / "rows")
    assert "preparing data: 1 of 3 shards" in caplog.text
    assert caplog.messages[-1].startswith("prepared ")
