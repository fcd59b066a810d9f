"""Ways to read rows that several tests share."""

from collections.abc import Iterator

from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.rows.conversation import BadRow, Conversation, Document
from roll_sft.data.rows.files import find_files
from roll_sft.data.rows.shards import SHARD_BYTES, Shard, shards_of_file
from roll_sft.data.rows.sources import read_rows


def find_shards(path: str, *, shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """The shards of all files of `path`, which tests cut small."""
    files = find_files(path)
    return [shard for file in files for shard in shards_of_file(file, shard_bytes=shard_bytes)]


def read_conversations(
    path: str, keys: ColumnKeys, *, split: str | None = None
) -> Iterator[Conversation | Document | BadRow]:
    """The rows of `path`, without their places."""
    return (row for _, row in read_rows(path, keys, split=split, left_aside=set()))
