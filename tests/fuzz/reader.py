"""What a file of rows says, read in the plainest way: the oracle beside which the program is put.

Nothing of the program is used, but for the names of the columns that its documentation lists. A row
is `Wanted`, or `Malformed` (it must not be kept), or `NothingLearnt` (it must be dropped, without
harm), or `Unjudged`: of a form that this reader does not know.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

_ROLES = {"user": "user", "assistant": "assistant", "system": "system"}
_FROM = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "chatgpt": "assistant", "system": "system"}  # fmt: skip
_PROMPTS, _QUERIES = ("instruction", "prompt"), ("input", "query")
_RESPONSES = ("output", "response", "completion")
_UNJUDGED = {"tools", "functions", "tool_calls", "function_call", "reasoning_content", "reasoning",
             "thinking", "refusal", "images", "image"}  # fmt: skip
_PLAIN_MESSAGE = {"role", "content", "from", "value", "train", "weight", "name", "id"}
_SURROGATES = range(0xD800, 0xE000)


class MalformedError(Exception):
    """The row cannot be used."""


class NothingLearntError(Exception):
    """The row is well formed and has no answer."""


class UnjudgedError(Exception):
    """The row is of a form that this reader does not know."""


@dataclass(frozen=True)
class Wanted:
    """A document, or messages and which of them are supervised."""

    text: str | None
    messages: list[dict[str, str]]
    supervised: list[bool]


def rows_of(path: Path) -> list[Any]:
    """The value of each row of a file, or an exception in its place. Raises for a broken file."""
    data = path.read_bytes()
    if path.name.endswith(".gz"):
        data = gzip.decompress(data)
    if path.name.endswith(".zst"):
        data = pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()
    if path.suffix == ".parquet":
        return _values(pq.read_table(pa.BufferReader(data)))
    if path.suffix == ".arrow":
        is_file = data.startswith(b"ARROW1")
        source = pa.BufferReader(data)
        return _values((pa.ipc.open_file if is_file else pa.ipc.open_stream)(source).read_all())
    data = data.removeprefix(b"\xef\xbb\xbf")
    if data.lstrip(b" \t\r\n").startswith(b"["):
        values = _parsed(data.decode("utf-8"))
        return values if isinstance(values, list) else [values]
    return [_line(line) for line in data.split(b"\n") if line.strip(b" \t\r\n")]


def wanted_of(row: Any) -> Wanted:
    """What `row` says. Raises one of the three errors above."""
    if isinstance(row, Exception):
        raise MalformedError(str(row))
    if not isinstance(row, dict):
        raise MalformedError("no object")
    columns = {name: value for name, value in row.items() if value is not None}
    if _UNJUDGED & columns.keys():
        raise UnjudgedError
    for names, reader in (
        (("messages", "conversations"), _listed),
        ((*_PROMPTS, *_RESPONSES), _asked),
        (("text",), _document),
    ):
        if any(name in columns for name in names):
            return reader(columns)
    raise MalformedError("no known column")


def ids_of(wanted: Wanted, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a row, by transformers alone.

    A prompt comes as tokens of its own at inference: a token that holds the end of a prompt and the
    beginning of the answer that is supervised is two, one on each side.
    """
    if wanted.text is not None:
        end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        return [*tokenizer(wanted.text, add_special_tokens=False).input_ids, end]
    messages = wanted.messages
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    prompts = (
        tokenizer.apply_chat_template(messages[:at], tokenize=False, add_generation_prompt=True)
        for at, is_supervised in enumerate(wanted.supervised)
        if is_supervised
    )
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    cuts = [
        place
        for place in map(len, prompts)
        if any(start < place < end for start, end in whole.offset_mapping)
    ]
    parts = (text[start:end] for start, end in pairwise([0, *cuts, len(text)]))
    return [i for part in parts for i in tokenizer(part, add_special_tokens=False).input_ids]


def _document(columns: Mapping[str, Any]) -> Wanted:
    text = _text(columns["text"])
    if not text.strip():
        raise NothingLearntError
    return Wanted(text, [], [])


def _asked(columns: Mapping[str, Any]) -> Wanted:
    prompt, query, response = (_one(columns, names) for names in (_PROMPTS, _QUERIES, _RESPONSES))
    if any(_is_listed(each) for each in (prompt, response)):
        if query is not None:
            raise UnjudgedError
        asked, _ = _messages(prompt)
        answered, supervised = _messages(response)
        return _with_answer([*asked, *answered], [*(False for _ in asked), *supervised], columns)
    prompt, query, response = (_text("" if x is None else x) for x in (prompt, query, response))
    if "history" in columns and columns["history"] != []:
        turns = columns["history"]
        if not isinstance(turns, list) or not all(
            isinstance(t, list) and len(t) == 2 for t in turns
        ):
            raise MalformedError("history")
    history = [(_text(q), _text(a)) for q, a in columns.get("history") or []]
    if not response.strip():
        raise NothingLearntError
    if not (prompt or query):
        raise MalformedError("no prompt")
    said = [part for turn in history for part in turn]
    said += [f"{prompt}\n{query}" if query else prompt, response]
    roles = ["user", "assistant"] * (len(said) // 2)
    messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
    return _with_answer(messages, [m["role"] == "assistant" for m in messages], columns)


def _listed(columns: Mapping[str, Any]) -> Wanted:
    value = _one(columns, ("messages", "conversations"))
    messages, supervised = _messages(value)
    return _with_answer(messages, supervised, columns)


def _messages(value: Any) -> tuple[list[dict[str, str]], list[bool]]:
    if isinstance(value, str):
        raise UnjudgedError  # JSON text of messages
    if not isinstance(value, list):
        raise MalformedError("no list")
    read = [_message(entry) for entry in value]
    return [message for message, _ in read], [supervised for _, supervised in read]


def _message(entry: Any) -> tuple[dict[str, str], bool]:
    if not isinstance(entry, dict):
        raise MalformedError("no message")
    fields = {name: value for name, value in entry.items() if value is not None}
    if fields.keys() - _PLAIN_MESSAGE or isinstance(
        fields.get("content", fields.get("value")), list
    ):
        raise UnjudgedError
    is_sharegpt = "from" in fields and "role" not in fields
    speaker, name, roles = ("from", "value", _FROM) if is_sharegpt else ("role", "content", _ROLES)
    said = fields.get(speaker)
    if said in ("tool", "function", "observation", "function_response", "developer"):
        raise UnjudgedError
    if not isinstance(said, str) or said not in roles:
        raise MalformedError(f"role {said!r}")
    if name not in fields:
        raise MalformedError(f"no {name}")
    flags = {bool(fields[key]) for key in ("train", "weight") if fields.get(key) in (0, 1)}
    if len(flags) > 1 or any(fields.get(key, 1) not in (0, 1) for key in ("train", "weight")):
        raise MalformedError("flags")
    supervised = roles[said] == "assistant" and flags != {False}
    return {"role": roles[said], "content": _text(fields[name])}, supervised


def _with_answer(
    messages: list[dict[str, str]], supervised: list[bool], columns: Mapping[str, Any]
) -> Wanted:
    system = _text(columns.get("system", ""))
    present = [m["content"] for m in messages if m["role"] == "system"]
    if system and not present:
        messages, supervised = (
            [{"role": "system", "content": system}, *messages],
            [False, *supervised],
        )
    elif system and present[0] != system:
        raise MalformedError("two systems")
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise NothingLearntError
    if not any(supervised):
        raise NothingLearntError
    return Wanted(None, messages, supervised)


def _one(columns: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    found = [columns[name] for name in names if name in columns]
    if any(other != found[0] for other in found[1:]):
        raise MalformedError(f"several of {names}")
    return found[0] if found else None


def _text(value: Any) -> str:
    if not isinstance(value, str) or any(ord(c) in _SURROGATES for c in value):
        raise MalformedError("no text")
    return value


def _is_listed(value: Any) -> bool:
    return isinstance(value, list)


def _line(line: bytes) -> Any:
    try:
        return _parsed(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return error


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _values(table: pa.Table) -> list[Any]:
    used = [n for n in table.column_names if n in _KNOWN]
    return list(map(_without_nulls, _rows(table.select(used) if used else table)))


_KNOWN = {*_PROMPTS, *_QUERIES, *_RESPONSES, *_UNJUDGED, "messages", "conversations", "text",
          "system",
          "history"}  # fmt: skip


def _rows(table: pa.Table) -> Iterator[Any]:
    for index in range(table.num_rows):
        try:
            yield table.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
