"""A source as a whole: the rows of all its files, in order, as conversations and documents.

The one-pass view of `shards.py`, for who wants rows and no cache. What is promised:
- text is passed on as it stands in the file, to the character;
- every row read is a `Conversation`, a `Document` or a `BadRow`, in the order of the files;
- what concerns a file and not one row (it cannot be read, it mixes shapes, two columns could both
  be meant) is a `DataError`.
"""

import dataclasses
import logging
from collections.abc import Iterable, Iterator

from roll_sft.data.rows.columns import ColumnKeys, Shape
from roll_sft.data.rows.conversation import BadRow, Conversation, Document
from roll_sft.data.rows.files import find_files
from roll_sft.data.rows.shards import read_shard, shards_of_file
from roll_sft.data.rows.values import listed

_log = logging.getLogger(__name__)


def read_conversations(
    path: str, keys: ColumnKeys, *, split: str | None = None
) -> Iterator[Conversation | Document | BadRow]:
    """Read the rows of `path` in order; they count from 0 over all files.

    Raises `DataError` at once if there is no such file, or one of another suffix, and during the
    iteration for what makes a whole file unusable. Reads no further than it is asked to.
    """
    return (row for _, row in read_placed(path, keys, split=split))


def read_placed(
    path: str, keys: ColumnKeys, *, split: str | None = None, left_aside: set[str] | None = None
) -> Iterator[tuple[str, Conversation | Document | BadRow]]:
    """`read_conversations`, with the place of each row, as messages say it.

    The columns that samples are not made of go into `left_aside`.
    """
    aside = set() if left_aside is None else left_aside
    return _placed(find_files(path, split=split), keys=keys, path=path, left_aside=aside)


def tell_left_aside(columns: set[str], *, source: str) -> None:
    """Say which columns of a source, and keys of its messages, samples are not made of."""
    if columns:
        _log.info("%s: columns left aside: %s", source, listed(columns))


def warn_of_unused(keys: ColumnKeys, used: Iterable[str], *, path: str) -> None:
    """Say which optional columns the user named and no row of `path` has."""
    for column in sorted(keys.optional().difference(used)):
        _log.warning("%s: no row uses the configured column '%s'", path, column)


def _placed(
    files: list[str], *, keys: ColumnKeys, path: str, left_aside: set[str]
) -> Iterator[tuple[str, Conversation | Document | BadRow]]:
    row, used = 0, set[str]()
    for file in files:
        shape: Shape | None = None
        for shard in shards_of_file(file):
            rows = read_shard(shard, keys, shape=shape)
            for each in rows:
                yield shard.place_of(each.line, each.row), dataclasses.replace(each, row=row)
                row += 1
            shape = rows.shape
            used |= rows.used
            left_aside |= rows.left_aside
    warn_of_unused(keys, used, path=path)
