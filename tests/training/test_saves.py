"""Saves in the background: what is written, when it counts, and what becomes of errors."""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from roll_sft.base.errors import CheckpointError
from roll_sft.checkpoint import tensors
from roll_sft.checkpoint.background import BackgroundWriter
from roll_sft.checkpoint.index import read_index
from roll_sft.checkpoint.publish import write_descriptions
from roll_sft.checkpoint.tensors import Piece, Writer, take_parts
from roll_sft.config.build import build_config
from roll_sft.training import saves as saves_module
from roll_sft.training.saves import Saves


def pieces() -> list[Piece]:
    whole = torch.arange(24.0).view(4, 6)
    half = torch.arange(6.0).to(torch.bfloat16)
    return [
        Piece("weight", (4, 6), (0, 0), whole[:2]),
        Piece("weight", (4, 6), (2, 0), whole[2:]),
        Piece("half", (2, 6), (1, 0), half.view(1, 6)),
        Piece("half", (2, 6), (0, 0), half.view(1, 6)),
    ]


def write(folder: Path, parts: Sequence[Piece]) -> None:
    tensors.write(folder, parts, objects={}, writer=Writer(0, 1, optimizer_step=None))


def test_what_is_written_is_the_state_when_the_save_began(tmp_path: Path) -> None:
    saved, may_write = pieces(), threading.Event()

    def late(copies: Sequence[Piece]) -> None:
        assert may_write.wait(10)
        write(tmp_path, copies)

    writer = BackgroundWriter()
    writer.begin(saved, late)
    for piece in saved:
        piece.tensor.fill_(-1.0)
    assert not writer.is_done()
    may_write.set()
    writer.finish()
    assert writer.is_done()
    write_descriptions(tmp_path, take_parts(tmp_path))
    index = read_index(tmp_path)
    for wanted in pieces():
        found = Piece(wanted.key, wanted.shape, wanted.offset, torch.zeros_like(wanted.tensor))
        index.fill(found)
        assert torch.equal(found.tensor, wanted.tensor)
    assert index.bytes_read == sum(piece.tensor.nbytes for piece in pieces())
    corner = Piece("weight", (4, 6), (1, 2), torch.zeros(2, 3))
    index.fill(corner)
    assert torch.equal(corner.tensor, torch.arange(24.0).view(4, 6)[1:3, 2:5])
    with pytest.raises(CheckpointError, match=r"weight\b.*\(4, 6\)"):
        index.fill(Piece("weight", (4, 8), (0, 0), torch.zeros(4, 8)))
    with pytest.raises(CheckpointError, match=r"\bbias\b"):
        index.fill(Piece("bias", (4,), (0,), torch.zeros(4)))


def test_a_save_waits_for_the_one_before_and_an_error_is_raised_once(tmp_path: Path) -> None:
    order: list[str] = []

    def failing(_copies: Sequence[Piece]) -> None:
        order.append("first")
        raise CheckpointError("the disk is full")

    writer = BackgroundWriter()
    writer.begin(pieces(), failing)
    with pytest.raises(CheckpointError, match="the disk is full"):
        writer.begin(pieces(), lambda _copies: order.append("second"))
    writer.begin(pieces(), lambda _copies: order.append("third"))
    writer.finish()
    assert order == ["first", "third"]


class Workers:
    """A group of one worker that writes when it is told to."""

    def __init__(self, events: list[str]) -> None:
        self.events, self.is_written = events, False
        self.staging = Path()

    def begin_save(self, folder: Path) -> None:
        self.events.append(f"begin {folder.name}")
        self.is_written, self.staging = False, folder

    def is_saved(self) -> str:
        return "question"

    def answers_of(self, _question: str) -> list[bool]:
        return [self.is_written]

    def finish_save(self) -> None:
        self.events.append("finish")


def test_a_checkpoint_is_published_once_written_and_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    events: list[str] = []
    config = build_config({"checkpoint": {"async_save": True, "keep_last": 2}})
    job, workers = (
        cast(Any, SimpleNamespace(config=config, state=None, save_assets=None)),
        Workers(events),
    )
    records = cast(Any, SimpleNamespace(sync=lambda: events.append("logs on disk")))

    def publish_step(_run: Any, plan: Any, *, staging: Path, **_: Any) -> Path:
        events.append(f"publish {plan.step}")
        return staging.rename(staging.with_name(f"step_{plan.step:08d}"))

    monkeypatch.setattr(saves_module, "publish_step", publish_step)
    saves = Saves(job, cast(Any, workers), records, folder=tmp_path)
    saves.look()
    saves.begin(cast(Any, SimpleNamespace(step=2)))
    for _ in range(4):
        saves.look()
    assert events == ["begin .staging_00000002"], "published before it is written"
    workers.is_written = True
    saves.look()
    saves.look()
    assert events[1:] == ["logs on disk", "publish 2"]
    saves.begin(cast(Any, SimpleNamespace(step=4)))
    saves.begin(cast(Any, SimpleNamespace(step=6)))
    saves.finish()
    assert events[3:] == [
        "begin .staging_00000004",
        "finish",
        "logs on disk",
        "publish 4",
        "begin .staging_00000006",
        "finish",
        "logs on disk",
        "publish 6",
    ]


def test_the_clock_asks_for_a_checkpoint_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, now = build_config({"train": {"save_minutes": 10}}), [0.0]
    shape = SimpleNamespace(num_parameters=1000)
    job = cast(Any, SimpleNamespace(config=config, source=SimpleNamespace(shape=shape)))
    monkeypatch.setattr(saves_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    saves = Saves(job, cast(Any, None), cast(Any, None), folder=tmp_path)
    now[0] = 599.0
    assert not saves.is_overdue()
    now[0] = 600.0
    assert saves.is_overdue()
    monkeypatch.setattr(saves_module, "free_bytes", lambda _folder: 11_999)
    assert not saves.is_overdue()
    assert f"no checkpoint after 10 minutes: {tmp_path} has no room" in caplog.text
    caplog.clear()
    assert not saves.is_overdue()
    assert caplog.text == "", "said again before the next is due"
    by_steps = Saves(
        cast(Any, SimpleNamespace(config=build_config({"train": {"save_minutes": None}}))),
        cast(Any, None),
        cast(Any, None),
        folder=tmp_path,
    )
    now[0] = 1e9
    assert not by_steps.is_overdue()
