"""The rows of a source, over all its files, without a token cache: for previews and estimates."""

import dataclasses
from collections.abc import Iterator

from roll_sft.data.rows.columns import ColumnKeys, RowFormat, warn_of_unused
from roll_sft.data.rows.conversation import BadRow, Conversation, Document
from roll_sft.data.rows.files import find_files
from roll_sft.data.rows.shards import ShardRows, shards_of_file


def read_rows(
    path: str,
    keys: ColumnKeys,
    *,
    split: str | None = None,
    left_aside: set[str],
    reader: type[ShardRows] = ShardRows,
) -> Iterator[tuple[str, Conversation | Document | BadRow]]:
    """Yield the place of each row, as in messages, and the row, numbered from 0 over all files.

    Reads no further than it is asked to. `reader` reads shards. The columns that samples are not
    made of go into `left_aside`. Raises `DataError` for a file that cannot be used as a whole.
    """
    number, used = 0, set[str]()
    for file in find_files(path, split=split):
        row_format: RowFormat | None = None
        for shard in shards_of_file(file):
            rows = reader(shard, keys, row_format=row_format)
            for row in rows:
                yield shard.place_of(row.line, row.row), dataclasses.replace(row, row=number)
                number += 1
            row_format = rows.row_format
            used |= rows.used
            left_aside |= rows.left_aside
    warn_of_unused(keys, used, path=path)
