"""What W&B's offline files and TensorBoard's event files hold, read with their own packages."""

import json
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

BLOCK, HEADER, RECORD_HEADER = 32768, 7, 7  # bytes, of the log format that W&B took from LevelDB


def wandb_records(path: Path) -> list[Any]:
    """The records of a `.wandb` file, as W&B's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts, found = path.read_bytes(), HEADER, b"", []
    assert data[:4] == b":W&B"
    while position + RECORD_HEADER <= len(data):
        if BLOCK - position % BLOCK < RECORD_HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + RECORD_HEADER])
        position += RECORD_HEADER
        parts += data[position : position + length]
        position += length
        if kind in (1, 4):  # the whole record, or its last part
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def wandb_history(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Metric -> (step, value) of each row, of all W&B files in the folder of a run, in order."""
    found = defaultdict(list)
    for path in sorted(folder.glob("wandb/*run-*/run-*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "history":
                step = record.history.step.num
                for item in record.history.item:
                    name = item.key or "/".join(item.nested_key)
                    if not name.startswith("_"):
                        found[name].append((step, json.loads(item.value_json)))
    return dict(found)


def wandb_exits(folder: Path) -> list[int]:
    """The exit codes in the W&B files of a run."""
    paths = sorted(folder.glob("wandb/*run-*/run-*.wandb"))
    records = [record for path in paths for record in wandb_records(path)]
    return [each.exit.exit_code for each in records if each.WhichOneof("record_type") == "exit"]


def tensorboard(folder: Path) -> Any:
    """TensorBoard's own view of the event files of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    view = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "tensors": 0})
    view.Reload()
    return view


def tensorboard_history(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric -> (step, value) of each scalar event."""
    view = tensorboard(folder)
    tags = view.Tags()["scalars"]
    return {tag: [(each.step, each.value) for each in view.Scalars(tag)] for tag in tags}
