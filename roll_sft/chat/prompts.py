"""Prompts from a file, or from Python -> what a model answers, with the answer that was expected.

A line of JSON is a text (what the user says), messages, or a row as training takes it: `messages`,
or `prompt` or `instruction` with `input`, `system` and an answer. The answer of a row, or the last
messages of the assistant, becomes the reference. Any other file has one text a line.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_sft.base.errors import DataError
from roll_sft.base.text import shown
from roll_sft.data.rows.columns import KNOWN_COLUMNS

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt: the messages, or the text where it is to be continued; what the row expects."""

    prompt: Any  # as it was given, without the answer
    messages: tuple[Mapping[str, Any], ...]
    reference: str | None
    where: str


def read_prompts(path: Path) -> list[Asked]:
    """The prompts of the file `path`; raises `DataError` where there are none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise DataError(f"--prompts: {path} cannot be read ({reason}); give a text file") from error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    is_json = path.suffix in (".jsonl", ".ndjson")
    if path.suffix == ".json":
        entries = _json(text, where=str(path))
        if not isinstance(entries, list):
            raise DataError(f"{path}: holds {shown(entries)}, not a list of prompts; make it one")
        rows = [(f"{path}[{index}]", entry) for index, entry in enumerate(entries)]
    else:
        places = [(f"{path}:{number}", line) for number, line in lines]
        rows = [
            (at, _json(line, where=at) if is_json else line.rstrip("\r")) for at, line in places
        ]
    if not rows:
        raise DataError(f"--prompts: {path} has no prompt; write one a line")
    return [asked(row, where=where) for where, row in rows]


def asked(row: Any, *, where: str) -> Asked:
    """What `row` asks. Raises `DataError` that names `where` for a row without a question."""
    if isinstance(row, str):
        return Asked(row, ({"role": "user", "content": row},), None, where)
    if isinstance(row, Mapping):
        messages, reference = _of_columns(row, where=where)
    else:
        messages, reference = _of_messages(row, where=where), None
    while messages and messages[-1]["role"] == "assistant":
        reference = str(messages.pop().get("content") or "")
    if not messages:
        raise DataError(f"{where}: has no message before the answer; give a question")
    return Asked(list(messages), tuple(messages), reference, where)


def _of_columns(
    row: Mapping[str, Any], *, where: str
) -> tuple[list[Mapping[str, Any]], str | None]:
    for name in KNOWN_COLUMNS["messages"]:
        if row.get(name) is not None:
            return [*_with_system(row, where), *_of_messages(row[name], where=where)], None
    prompt = _first(row, "prompt")
    if prompt is None:
        names = " or ".join((*KNOWN_COLUMNS["prompt"], "messages"))
        raise DataError(f"{where}: has the columns {shown(list(row))}; a prompt needs {names}")
    reference = _first(row, "response")
    answer = reference if isinstance(reference, str) else None
    if not isinstance(prompt, str):
        messages = [*_of_messages(prompt, where=where)]
        if isinstance(reference, list):
            messages += _of_messages(reference, where=where)
        return messages, answer
    query = _first(row, "query")
    content = f"{prompt}\n{query}" if query else prompt
    return [*_with_system(row, where), {"role": "user", "content": content}], answer


def _with_system(row: Mapping[str, Any], where: str) -> Iterator[Mapping[str, Any]]:
    if system := _first(row, "system"):
        if not isinstance(system, str):
            raise DataError(f"{where}: the system message {shown(system)} is not text")
        yield {"role": "system", "content": system}


def _first(row: Mapping[str, Any], use: str) -> Any:
    """The value of the first column that is there for `use`."""
    return next((row[name] for name in KNOWN_COLUMNS[use] if row.get(name) is not None), None)


def _of_messages(value: Any, *, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"{where}: {shown(value)} is neither a text nor a list of messages")
    for message in value:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise DataError(
                f"{where}: {shown(message)} is no message; write"
                ' {"role": "user", "content": "..."}'
            )
    return list(value)


def _json(text: str, *, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no JSON ({error}); correct it") from error
