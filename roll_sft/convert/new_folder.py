"""An output folder that gets its name when it is complete, or not at all.

It is filled as `.<name>.partial`, and renamed when its bytes are on disk. Promise: a process killed
at any point leaves at most the partial folder, which the next attempt deletes.
"""

import contextlib
import ctypes
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from roll_sft.base.errors import CheckpointError
from roll_sft.base.files import sync

_WRITE_BACK_EVERY_S = 0.02
_BEGIN_TO_WRITE = 2  # SYNC_FILE_RANGE_WRITE


@contextlib.contextmanager
def new_folder(output: Path, *, kind: str, marker: str, replace: bool) -> Iterator[Path]:
    """An empty folder to fill, which becomes `output` when the block ends without an error.

    `kind` says in messages what is made: `model`. `replace` takes the place of an earlier one,
    known by its file `marker`. Raises `CheckpointError` for a folder in the way, before the block,
    and where the disk refuses.
    """
    target = output.resolve()  # a rename onto a symbolic link would fail, or replace the link
    _check_room(output, kind=kind, marker=marker, replace=replace)
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir()
        with _written_back(partial):
            yield partial
        _publish(partial, target=target)
    except OSError as error:
        raise CheckpointError(
            f"{output}: the {kind} cannot be written ({error}); free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _written_back(folder: Path) -> Iterator[None]:
    """Let the kernel write what grows in `folder` to disk meanwhile: a sync then finds little."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(_WRITE_BACK_EVERY_S):
            for path in folder.iterdir():
                with contextlib.suppress(OSError), path.open("rb") as file:
                    # sync_file_range(2), which Python has no function for: the whole file, without
                    # waiting. Where it fails, the sync writes all.
                    whole = (ctypes.c_int64(0), ctypes.c_int64(0))
                    ctypes.CDLL(None).sync_file_range(file.fileno(), *whole, _BEGIN_TO_WRITE)

    thread = threading.Thread(target=work, name="write-back", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _check_room(output: Path, *, kind: str, marker: str, replace: bool) -> None:
    """Refuse to write over anything that is not an empty folder or what is to be replaced."""
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is a file; choose another folder for the {kind}")
    files = {path.name for path in output.iterdir()} if output.exists() else set()
    if files and not replace:
        raise CheckpointError(f"{output} is not empty; remove it or choose another folder")
    if files and marker not in files:
        raise CheckpointError(f"{output} holds no {kind} to replace; choose another folder")


def _publish(partial: Path, *, target: Path) -> None:
    """Rename a complete folder, after its bytes are on disk."""
    for path in (*partial.rglob("*"), partial):
        sync(path)
    if target.is_dir() and any(target.iterdir()):
        # Two renames: a crash between them leaves the earlier folder under the other name.
        earlier = target.with_name(f".{target.name}.replaced")
        shutil.rmtree(earlier, ignore_errors=True)
        target.rename(earlier)
        partial.rename(target)
        shutil.rmtree(earlier, ignore_errors=True)
    else:
        partial.rename(target)
    sync(target.parent)
