"""TensorBoard event files of one run: a `Tracker`, in the folder `tensorboard` of the run.

TensorBoard keeps scalars as 32-bit floats. Promises: events are whole or absent; a run that goes on
hides what an earlier process wrote of steps that it repeats; a curve that begins anew sets the
earlier files aside.
"""

import io
import os
import socket
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from roll_sft.base.files import set_aside
from roll_sft.tracking.journal import Record
from roll_sft.tracking.run_facts import RunFacts
from roll_sft.tracking.run_record import Note, read_note
from roll_sft.tracking.sample_table import table_of
from roll_sft.tracking.trackers import FINISHED, RecordedRun, Request, Status

EVENTS = "tensorboard"
NOTE = ".tensorboard_run"


class TensorboardRun:
    """The event files of a run."""

    name = "tensorboard"

    def __init__(self, run: RecordedRun) -> None:
        self._run, self._events = run, run.folder / EVENTS
        self.title = f"TensorBoard files in {self._events}"
        self._recorded = -1  # all up to this step is in the files
        self._step = -1  # the last that was written, to which more may come
        self._path = self._events

    def open(self) -> None:
        """Begin an event file."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        note = read_note(self._run.folder / NOTE) if self._run.continues else None
        if note is None and self._events.exists():
            set_aside(self._events)
        self._events.mkdir(exist_ok=True)
        now = time.time()
        place = f"{socket.gethostname()}.{os.getpid()}.{time.time_ns() % 10**9}"
        self._path = self._events / f"events.out.tfevents.{int(now):010d}.{place}"
        events = [Event(wall_time=now, file_version="brain.Event:2")]
        if note is not None:
            self._recorded = min(note.step, self._run.start_step)
            # TensorBoard then hides earlier events from this step on.
            begun = SessionLog(status=SessionLog.START)
            events.append(Event(wall_time=now, step=self._recorded + 1, session_log=begun))
        self._append(events)
        self._note(self._recorded)

    def describe(self, facts: RunFacts) -> Iterator[Request]:
        """Parameters and tags, as texts of step 0."""
        for title, values in (("parameters", facts.params), ("tags", facts.tags)):
            rows = [["name", "value"], *(list(each) for each in values.items())]
            yield Request(title, partial(self._write, [(0, [_text(title, rows)])]))

    def send(self, records: Sequence[Record]) -> Iterator[Request]:
        """Scalars of each step, and its samples as a table."""
        lacking = [record for record in records if record.step > self._recorded]
        if lacking:
            yield Request("metrics", partial(self._send, lacking))

    def finish(self, status: Status) -> Iterator[Request]:
        """The note of what the files hold."""
        self._note(max(self._step, self._recorded), is_finished=status == FINISHED)
        yield from ()

    def is_refused(self, error: Exception) -> bool:
        """A full disk may have room again."""
        return not isinstance(error, OSError)

    def was_finished(self) -> bool:
        """Whether the note says so."""
        note = read_note(self._run.folder / NOTE)
        return note is not None and note.is_finished

    def _send(self, records: list[Record]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        events = list[tuple[int, list[Any]]]()
        for record in records:
            values = [
                Summary.Value(tag=each.name, simple_value=each.value) for each in record.points
            ]
            if record.samples:
                values.append(_text("generations", table_of(record.samples)))
            events.append((record.step, values))
        self._write(events)
        self._step = records[-1].step
        self._note(self._step - 1)

    def _write(self, events: list[tuple[int, list[Any]]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        now = time.time()
        self._append(
            [
                Event(wall_time=now, step=step, summary=Summary(value=values))
                for step, values in events
            ]
        )

    def _append(self, events: list[Any]) -> None:
        """Add `events` to the file, all or none."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        records = io.BytesIO()
        for event in events:
            RecordWriter(records).write(event.SerializeToString())
        rest = records.getbuffer()
        with self._path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(size)
                raise

    def _note(self, step: int, *, is_finished: bool = False) -> None:
        Note(self._path.name, step, is_finished).write(self._run.folder / NOTE)


def _text(tag: str, rows: list[list[str]]) -> Any:
    """A table of texts for TensorBoard's text page; the first row is its head."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    cells = [cell.encode("utf-8", "replace") for row in rows for cell in row]
    sizes = [TensorShapeProto.Dim(size=size) for size in (len(rows), len(rows[0]))]
    shape = TensorShapeProto(dim=sizes)
    tensor = TensorProto(dtype=DT_STRING, string_val=cells, tensor_shape=shape)
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    return Summary.Value(tag=tag, tensor=tensor, metadata=SummaryMetadata(plugin_data=plugin))
