"""Shards are prepared by the nodes that see the cache, and by the driver's machine otherwise."""

import copy
import json
from collections import Counter
from pathlib import Path

import pytest

from roll_sft.base.errors import DataError
from roll_sft.config.schema import RunConfig
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.tokens.build_shard import SourceOptions
from roll_sft.data.tokens.cache import TokenSet
from roll_sft.data.tokens.prepare import CachePlace, Source, prepare_sources
from roll_sft.runtime import preparation
from roll_sft.runtime.preparation import spread_over_cluster
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.slow
OPTIONS = SourceOptions(ColumnKeys(), sequence_length=512, on_bad_row="error", max_bad_fraction=0.5)
FILES = 6


def write(folder: Path) -> Path:
    folder.mkdir()
    for number in range(FILES):
        row = {"instruction": f"p{number}", "output": f"a{number}"}
        (folder / f"part_{number}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def run(path: Path, cache: Path, spread=None) -> list[list[int]]:
    ((tokens, _report),) = prepare_sources(
        [Source(str(path), "demo")],
        tokenizer=ChatTokenizer(copy.deepcopy(tiny_tokenizer())),
        options=OPTIONS,
        place=CachePlace(cache, num_proc=1, spread=spread),
    )
    samples = TokenSet([tokens])
    return [samples.sample(index)[0].tolist() for index in range(len(samples))]


def test_nodes_prepare_what_one_machine_would(joined, tmp_path, monkeypatch):
    path, tried = write(tmp_path / "rows"), Counter()
    original = preparation._result

    def counted(reference, task):
        filled = original(reference, task)
        tried[filled is not None] += 1
        return filled

    monkeypatch.setattr(preparation, "_result", counted)
    ours = run(path, tmp_path / "cache", spread_over_cluster(joined()))
    assert tried == {True: FILES}
    assert ours == run(path, tmp_path / "again")
    assert not list((tmp_path / "cache").glob(".visible_*"))


def test_a_node_that_does_not_see_the_cache_is_given_nothing(
    joined, cluster, tmp_path, monkeypatch
):
    if cluster.apart is None:
        pytest.skip("this system does not let a process have a mount of its own")
    path, met = write(tmp_path / "rows"), Counter()
    original = preparation._result

    def counted(reference, task):
        filled = original(reference, task)
        met[filled is not None] += 1
        return filled

    monkeypatch.setattr(preparation, "_result", counted)
    ours = run(path, cluster.apart / "cache_of_spread", spread_over_cluster(joined()))
    assert met == {True: FILES}  # by the node that sees it; the other one would answer at once
    assert ours == run(path, tmp_path / "again")


def test_what_no_node_can_prepare_is_prepared_here(joined, tmp_path, monkeypatch):
    path, left = write(tmp_path / "rows"), []
    original = preparation.spread_for

    def here(tasks, *, num_proc):
        left.extend(tasks)
        return original(tasks, num_proc=num_proc)

    monkeypatch.setattr(preparation, "spread_for", here)
    monkeypatch.setattr(preparation, "_sees", lambda _nonce: False)
    ours = run(path, tmp_path / "cache", spread_over_cluster(joined()))
    assert len(left) == FILES
    assert ours == run(path, tmp_path / "again")


def test_a_bad_row_is_told_by_file_and_line_from_wherever_it_is_found(joined, tmp_path):
    path = write(tmp_path / "rows")
    (path / "part_3.jsonl").write_text('{"instruction": "p", "output": 3}\n')
    with pytest.raises(DataError, match=r"part_3\.jsonl:1: "):
        run(path, tmp_path / "cache", spread_over_cluster(joined()))


def test_a_run_that_joins_no_cluster_prepares_on_its_machine(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert spread_over_cluster(RunConfig()) is None
