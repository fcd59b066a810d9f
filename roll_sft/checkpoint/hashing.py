"""SHA-256 of the files of a checkpoint: compared before they are used, or while they are read.

Hashing leaves the interpreter's lock alone, so threads read several files at once, and what one
thread has brought from the disk is in memory for the others.
"""

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from roll_sft.base.errors import CheckpointError, RollSftError
from roll_sft.checkpoint.manifest import StoredFile

NUM_HASHERS = 8
_BLOCK_BYTES = 1 << 20


def sha256_of(path: Path, *, stop: threading.Event | None = None) -> str:
    """The SHA-256 of a file; of its beginning, where `stop` is set on the way."""
    digest, room = hashlib.sha256(), bytearray(_BLOCK_BYTES)
    memory = memoryview(room)
    with path.open("rb", buffering=0) as file:
        while (count := file.readinto(room)) and not (stop and stop.is_set()):
            digest.update(memory[:count])
    return digest.hexdigest()


def verify_hashes(folder: Path, files: Mapping[str, StoredFile]) -> None:
    """Compare the SHA-256 of every one of `files` in `folder`. Raises `CheckpointError`."""
    with verified_beside(folder, files):
        pass


@contextlib.contextmanager
def verified_beside(folder: Path, files: Mapping[str, StoredFile]) -> Iterator[None]:
    """`verify_hashes` beside the block, which reads the same files; its verdict comes at the end.

    Where the block fails on what a damaged file holds, the error is the damage.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(NUM_HASHERS, thread_name_prefix="checkpoint-hash") as pool:
        found = {name: pool.submit(sha256_of, folder / name, stop=stop) for name in files}
        try:
            yield
        except RollSftError as error:
            _compare(folder, files, found, cause=error)
            raise
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        _compare(folder, files, found)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch's arithmetic on this thread within the block, beside threads that hash.

    Its own would wait for each other by spinning, which takes the time of those.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compare(
    folder: Path,
    files: Mapping[str, StoredFile],
    found: Mapping[str, Future[str]],
    *,
    cause: RollSftError | None = None,
) -> None:
    for name, future in found.items():
        try:
            digest = future.result()
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read ({error.strerror})") from error
        if digest != files[name].sha256:
            raise CheckpointError(
                f"{folder / name}: its SHA-256 is {digest[:12]}..., and the manifest says"
                f" {files[name].sha256[:12]}...; the checkpoint is damaged, take another"
            ) from cause
