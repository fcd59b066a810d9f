"""Micro-batches that are built ahead: what is taken is what was asked for, or an error."""

import threading

import pytest

from roll_sft.engine.micro_batch import BuildAhead

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
