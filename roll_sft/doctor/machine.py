"""This machine: memory, shared memory, files, disks, the hub's token."""

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from roll_sft.doctor.finding import Finding

_GIB = 1024**3
_LEAST_SHARED_GIB, _LEAST_DISK_GIB, _LEAST_FILES = 1.0, 20.0, 4096
_LEAST_WRITE_MIB_S = 50.0
_WRITTEN_BYTES = 64 * 1024**2


def look_at_machine(places: Mapping[str, Path]) -> Iterator[Finding]:
    """What a run finds on this machine that writes to `places`, by their keys."""
    memory = psutil.virtual_memory()
    text = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB are free"
    yield Finding("memory", "ok", f"{text}, {os.cpu_count()} CPUs")
    yield _shared_memory(Path("/dev/shm"))
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{files} open files at most"
    if max(files, most) < _LEAST_FILES:
        yield Finding("open files", "warn", text, f"ulimit -n {_LEAST_FILES} before `ray start`")
    else:
        yield Finding("open files", "ok", text)
    for name, place in places.items():
        yield from _storage(name, place)
    yield _token()


def _shared_memory(place: Path) -> Finding:
    """Ray's object store lies there; containers often have 64 MiB."""
    if not place.is_dir():
        return Finding("shared memory", "warn", f"no {place}", "mount a tmpfs there")
    total = shutil.disk_usage(place).total / _GIB
    text = f"{place} has {total:.1f} GiB"
    if total < _LEAST_SHARED_GIB:
        remedy = "start the container with --shm-size=8g, or the pod with a memory volume"
        return Finding("shared memory", "warn", text, remedy)
    return Finding("shared memory", "ok", text)


def _storage(name: str, place: Path) -> Iterator[Finding]:
    """Room, and the speed of a write that is on disk when it ends."""
    existing = next(each for each in (place, *place.parents) if each.exists())
    if not os.access(existing, os.W_OK):
        yield Finding(
            name, "fail", f"{existing} cannot be written", f"set {name} to another folder"
        )
        return
    free = shutil.disk_usage(existing).free / _GIB
    speed = write_speed_mib_s(existing)
    text = f"{existing}: {free:.0f} GiB free, {speed:.0f} MiB/s written"
    if free < _LEAST_DISK_GIB:
        remedy = f"a checkpoint takes 16 bytes for each parameter; set {name} to a larger disk"
        yield Finding(name, "warn", text, remedy)
    elif speed < _LEAST_WRITE_MIB_S:
        yield Finding(name, "warn", text, "checkpoint.async_save=true trains while it is written")
    else:
        yield Finding(name, "ok", text)


def write_speed_mib_s(folder: Path) -> float:
    """MiB per second of a file of 64 MiB in `folder`, on disk when it ends."""
    block = os.urandom(1024**2)
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(_WRITTEN_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _WRITTEN_BYTES / 1024**2 / (time.perf_counter() - started)


def _token() -> Finding:
    from huggingface_hub import get_token

    if get_token():
        return Finding("hub token", "ok", "present")
    remedy = "only gated models and uploads need one: HF_TOKEN, or `hf auth login`"
    return Finding("hub token", "ok", f"none; {remedy}")
