"""The report of a source without a tokenizer: rows are counted, tokens estimated from bytes.

For a dry run before the model is on the machine. No row is dropped for its length, which is not
known; the tokens that a template adds are left out.
"""

import json
from collections import Counter

from roll_sft.base.errors import DataError
from roll_sft.data.rows.columns import ColumnKeys, log_left_aside
from roll_sft.data.rows.conversation import BadRow, Conversation, Document
from roll_sft.data.rows.sources import read_rows
from roll_sft.data.tokens.build_shard import EMPTY, MALFORMED
from roll_sft.data.tokens.cache import SourceReport
from roll_sft.data.tokens.prepare import Source

TOKEN_BYTES = 4  # UTF-8 bytes of English prose or code behind one token of a large vocabulary


def estimated_report(source: Source, *, keys: ColumnKeys, is_strict: bool) -> SourceReport:
    """The report of `source`. `is_strict`: raise `DataError` for a malformed row."""
    path, dropped = source.path, Counter[str]()
    kept = num_bytes = num_answer_bytes = 0
    aside: set[str] = set()
    for place, row in read_rows(path, keys, split=source.split, left_aside=aside):
        if isinstance(row, BadRow):
            if is_strict and not row.is_empty:
                raise DataError(f"{place}: {row.reason}")
            dropped[EMPTY if row.is_empty else MALFORMED] += 1
            continue
        kept += 1
        size, answer_size = _sizes(row)
        num_bytes += size
        num_answer_bytes += answer_size
    if kept == 0:
        raise DataError(
            f"{path}: none of its rows can be trained on ({dict(dropped)}); correct them"
        )
    log_left_aside(aside, source=source.name)
    return SourceReport(
        name=source.name,
        path=path,
        rows=kept + dropped.total(),
        kept=kept,
        dropped=dropped,
        dropped_places={},
        truncated=0,
        samples=kept,
        dropped_samples={},
        tokens=num_bytes // TOKEN_BYTES,
        supervised_tokens=num_answer_bytes // TOKEN_BYTES,
        supervised_share=num_answer_bytes / num_bytes,
        length={},
        columns_left_aside=sorted(aside),
        cached=False,
    )


def _sizes(row: Conversation | Document) -> tuple[int, int]:
    """UTF-8 bytes of the text of `row`, and of the part that is trained on."""
    if isinstance(row, Document):
        return (size := len(row.text.encode())), size
    size = len(json.dumps(row.tools).encode()) if row.tools else 0
    answer_size = 0
    for message in row.messages:
        calls = [(call.name, call.arguments) for call in message.tool_calls]
        said = len(f"{message.reasoning}{message.content}".encode())
        said += len(json.dumps(calls, ensure_ascii=False).encode()) if calls else 0
        size += said
        answer_size += said if message.role == "assistant" and message.train else 0
    return size, answer_size
