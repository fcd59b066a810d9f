"""The rows of a micro-batch; micro-batches built ahead: those asked for, or an error."""

import threading

import pytest
import torch

from roll_sft.engine.micro_batch import BuildAhead, supervised_rows

FIRST, SECOND = ((1, 2), (3,)), ((4,),)


def test_a_step_is_built_once_in_a_thread_of_its_own():
    threads = []

    def build(indices):
        threads.append(threading.current_thread())
        return [indices]

    ahead = BuildAhead(build)
    ahead.begin(FIRST)
    assert ahead.take(FIRST) == [FIRST]
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


def test_another_step_than_was_begun_is_built_on_the_spot():
    ahead = BuildAhead(lambda indices: [indices])
    assert ahead.take(FIRST) == [FIRST]  # the first step of a run
    ahead.begin(FIRST)
    assert ahead.take(SECOND) == [SECOND]
    ahead.begin(SECOND)
    assert ahead.take(SECOND) == [SECOND]


def test_an_error_of_building_is_raised_where_the_step_is_taken():
    def build(indices):
        raise OSError("the disk is gone")

    ahead = BuildAhead(build)
    ahead.begin(FIRST)
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.take(FIRST)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_each_row_reaches_the_head_once_with_its_label(shards: int) -> None:
    rows, labels = torch.tensor([1, 2, 3, 9, 14]), torch.tensor([11, 12, 13, 19, 24])
    parts = [
        supervised_rows(
            rows,
            labels,
            num_tokens=16,
            vocab_size=30,
            num_shards=shards,
            shard=rank,
        )
        for rank in range(shards)
    ]
    # The gather puts the shards' rows in order of the tensor rank.
    width = 16 // shards
    gathered = torch.cat([part.index + rank * width for rank, part in enumerate(parts)])
    kept = parts[0].kept
    assert (gathered if kept is None else gathered[kept]).tolist() == rows.tolist()
    assert all(torch.equal(part.labels, labels) for part in parts)
    assert len({len(part.index) for part in parts}) == 1


def test_a_micro_batch_without_labels_still_enters_a_row() -> None:
    none = torch.empty(0, dtype=torch.int64)
    for shards in (1, 2):
        rows = supervised_rows(none, none, num_tokens=8, vocab_size=30, num_shards=shards, shard=0)
        assert len(rows.index) == 1
        assert rows.kept is not None
        assert len(rows.kept) == len(rows.labels) == 0
