"""Reads all tokens of a cache once, beside the start of a run, so that no step meets damage."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from roll_sft.base.errors import DataError
from roll_sft.data.tokens.cache import ARRAYS, PER_SAMPLE, REPORT_FILE, check_arrays, read_report

_PER_TOKEN = [array for array in ARRAYS if array not in PER_SAMPLE]
_VERIFIERS = 4  # the checksum leaves the interpreter's lock alone; more would only wait for a disk


@contextlib.contextmanager
def verifying(folders: Iterable[Path]) -> Iterator[Callable[[], None]]:
    """Read the tokens of `folders` while the block runs.

    The block is given a function that waits for the end, and raises `DataError` for a folder that
    is damaged. What has not been read when the block ends is left.
    """
    with ThreadPoolExecutor(_VERIFIERS, thread_name_prefix="token-verifier") as pool:
        checks = [pool.submit(_check, folder) for folder in folders]

        def finish() -> None:
            for check in checks:
                check.result()

        try:
            yield finish
        finally:
            for check in checks:
                check.cancel()


def _check(folder: Path) -> None:
    report = read_report(folder)
    try:
        check_arrays(folder, report, _PER_TOKEN)
    except DataError as damage:
        with contextlib.suppress(OSError):  # a cache that may only be read: whoever may must do it
            (folder / REPORT_FILE).unlink()
        raise DataError(f"{damage}; run the same command again, which prepares it anew") from damage
