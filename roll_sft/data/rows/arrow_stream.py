"""Record batches of an Arrow stream, each read without those before it.

A stream has no index. Its messages say their own lengths, so the place of each batch is found by
reading their heads alone. Dictionaries that a batch may need come before it and are read with it.

Format: https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format. The head of a
message is a flatbuffer: https://flatbuffers.dev/internals.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa

_CONTINUES = 0xFFFFFFFF  # before the length of a head, since version 0.15
# Numbers of fields in the flatbuffer `Message`, and in the `RecordBatch` that it may hold.
_HEAD_TYPE, _HEAD, _BODY_LENGTH = 1, 2, 3
_NUM_ROWS = 0
_RECORD_BATCH = 3  # a value of `_HEAD_TYPE`; others are the schema and dictionaries


@dataclass(frozen=True, slots=True)
class StreamMessage:
    """Bytes `start:stop` of a stream. `num_rows` is None where they are no record batch."""

    start: int
    stop: int
    num_rows: int | None


def stream_messages(file: BinaryIO, *, start: int = 0) -> Iterator[StreamMessage]:
    """Yield the place of each message from `start` on, which is the first byte of one.

    Raises `pa.ArrowInvalid` for what is no stream, or is cut off.
    """
    size = file.seek(0, os.SEEK_END)
    if not size:
        raise pa.ArrowInvalid("it has 0 bytes")
    while start < size:
        try:
            head, body = _head(file, start)
            if not head:  # the end of the stream
                return
            message = _message(head, start=start, body=body)
        except (struct.error, IndexError):
            raise pa.ArrowInvalid(f"it is no Arrow stream from byte {start} on") from None
        if not body <= message.stop <= size:
            raise pa.ArrowInvalid(f"it is cut off: byte {start} of {size} begins a longer message")
        yield message
        start = message.stop


def stream_batches(file: BinaryIO, part: range) -> Iterator[pa.RecordBatch]:
    """Read the batches in bytes `part` of the file; both ends are the borders of messages."""
    schema = next(stream_messages(file))
    before = [_bytes(file, schema)]
    if any(_has_dictionary(field.type) for field in pa.ipc.read_schema(pa.py_buffer(before[0]))):
        for message in stream_messages(file, start=schema.stop):
            if message.start >= part.start:
                break
            if message.num_rows is None:
                before.append(_bytes(file, message))
    for message in stream_messages(file, start=part.start):
        if message.start >= part.stop:
            return
        if message.num_rows is None:
            before.append(_bytes(file, message))
        else:
            content = b"".join((*before, _bytes(file, message)))
            yield from pa.ipc.open_stream(pa.py_buffer(content))


def _head(file: BinaryIO, start: int) -> tuple[bytes, int]:
    """The flatbuffer of the message at `start`, and where its body begins."""
    file.seek(start)
    (length,) = struct.unpack("<I", file.read(4))
    body = start + 4
    if length == _CONTINUES:
        (length,) = struct.unpack("<I", file.read(4))
        body += 4
    return file.read(length), body + length


def _message(head: bytes, *, start: int, body: int) -> StreamMessage:
    (root,) = struct.unpack_from("<I", head)
    at = _field(head, root, _BODY_LENGTH)
    (body_length,) = (0,) if at is None else struct.unpack_from("<q", head, at)
    num_rows = None
    if (at := _field(head, root, _HEAD_TYPE)) is not None and head[at] == _RECORD_BATCH:
        at = _field(head, root, _HEAD)
        batch = 0 if at is None else at + struct.unpack_from("<I", head, at)[0]
        at = _field(head, batch, _NUM_ROWS)
        num_rows = 0 if at is None else struct.unpack_from("<q", head, at)[0]
    return StreamMessage(start, body + max(0, body_length), num_rows)


def _field(head: bytes, table: int, number: int) -> int | None:
    """Where field `number` of a flatbuffer's table lies; None where it has its default."""
    vtable = table - struct.unpack_from("<i", head, table)[0]
    (size,) = struct.unpack_from("<H", head, vtable)
    entry = 4 + 2 * number
    offset = struct.unpack_from("<H", head, vtable + entry)[0] if entry < size else 0
    return table + offset if offset else None


def _bytes(file: BinaryIO, message: StreamMessage) -> bytes:
    file.seek(message.start)
    return file.read(message.stop - message.start)


def _has_dictionary(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return _has_dictionary(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return True
    return any(_has_dictionary(kind.field(index).type) for index in range(kind.num_fields))
