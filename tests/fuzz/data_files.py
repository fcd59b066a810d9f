"""Data files through `prepare_only`: every accepted shape and form, with values and bytes changed.

What is kept must be what a plain reader and transformers' own chat template give, token by token,
and supervised where an assistant speaks. A row that cannot be used is never kept.
"""

import contextlib
import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from roll_sft.config.build import build_config
from roll_sft.config.schema import RunConfig
from roll_sft.data.tokens.cache import TokenSet
from roll_sft.job.in_process import prepare_job
from roll_sft.job.job import verifying
from tests.fuzz import reader
from tests.fuzz.case import Case, run_config
from tests.fuzz.mutate import ODD_TEXTS, changed, damaged, odd_value
from tests.outcome import Outcome
from tests.parity import write_model

CODES = frozenset({0, 2, 3})  # 2: a name that no path may have
LENGTH = 400
WORDS = ["the", "sum", "of", "two", "numbers", "is", "five", "list", "value", "return", "item"]
FORMS = (".jsonl", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".parquet", ".arrow",
         "stream.arrow", "folder", "datasets.parquet", "datasets.jsonl")  # fmt: skip


def build(home: Path) -> None:
    """A model with the plain ChatML template."""
    write_model(home / "model", kind="qwen2-tied", num_layers=2)


def case(rng: random.Random, home: Path) -> Case:
    """One data file; the current folder is the case's own."""
    maker = rng.choice((_of_rows, _of_rows, _of_bytes, _of_bytes, _of_text, _of_cache, _special))
    return maker(rng, home)


def rows_in(rng: random.Random, shape: str, *, odd: bool) -> list[dict[str, Any]]:
    """A few rows of `shape`; `odd` ones hold texts that are rare."""
    return [_row(rng, shape, lambda: _said(rng, odd=odd)) for _ in range(rng.randrange(1, 6))]


def _said(rng: random.Random, *, odd: bool) -> str:
    text = " ".join(rng.choices(WORDS, k=rng.randrange(1, 12)))
    if odd and rng.random() < 0.4:
        extra = rng.choice(ODD_TEXTS[:-2])  # halves of pairs: not in every form of a file
        return rng.choice((extra, text + extra, extra + text, text + extra + text))
    return text


def _row(rng: random.Random, shape: str, said: Callable[[], str]) -> dict[str, Any]:
    if shape == "alpaca":
        row: dict[str, Any] = {
            "instruction": said(),
            "input": rng.choice(("", said())),
            "output": said(),
        }
        if rng.random() < 0.2:
            row["system"] = said()
        if rng.random() < 0.2:
            row["history"] = [[said(), said()]]
        return row
    if shape == "text":
        return {"text": said()}
    pairs = [("user", said()), ("assistant", said())] * rng.randrange(1, 3)
    if rng.random() < 0.3:
        pairs.insert(0, ("system", said()))
    if shape == "sharegpt":
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        return {"conversations": [{"from": names[r], "value": t} for r, t in pairs]}
    messages: list[dict[str, Any]] = [{"role": r, "content": t} for r, t in pairs]
    if shape == "pairs":
        return {"prompt": messages[:-1], "completion": messages[-1:]}
    if rng.random() < 0.2:
        rng.choice(messages)["train"] = rng.random() < 0.5
    return {"messages": messages, "id": rng.randrange(100)}


def write(rows: list[Any], form: str) -> Path:
    """The rows as a file of `form`, or as a folder. Raises what cannot hold them."""
    Path("data").mkdir()
    path = Path("data", "rows" + form.removeprefix("stream").removeprefix("datasets"))
    if "folder" in form or form.startswith("datasets"):
        assert _depth(rows) < 12, "datasets takes twice as long for each level"
    if form == "folder":
        from datasets import Dataset

        Dataset.from_list(rows).save_to_disk("data/rows")
        return Path("data/rows")
    if form.startswith("datasets"):
        from datasets import Dataset

        made = Dataset.from_list(rows)
        (made.to_parquet if form.endswith("parquet") else made.to_json)(str(path))
    elif form.endswith((".parquet", ".arrow")):
        table = pa.Table.from_pylist(rows)
        if form == ".parquet":
            pq.write_table(table, path, row_group_size=2)
        else:
            maker = pa.ipc.new_stream if form.startswith("stream") else pa.ipc.new_file
            with maker(str(path), table.schema) as writer:
                writer.write_table(table)
    else:
        path.write_bytes(_packed(_as_json(rows, form), form))
    return path


def _depth(value: Any) -> int:
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, held), default=0)


def _as_json(rows: list[Any], form: str) -> bytes:
    if ".jsonl" in form:
        return "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    return json.dumps(rows, indent=1).encode()


def _packed(text: bytes, form: str) -> bytes:
    if form.endswith(".gz"):
        return gzip.compress(text)
    return pa.compress(text, "zstd", asbytes=True) if form.endswith(".zst") else text


def _of_rows(rng: random.Random, home: Path) -> Case:
    """Rows that are changed before they are written."""
    shape = rng.choice(("alpaca", "messages", "sharegpt", "pairs", "text"))
    rows: list[Any] = list(rows_in(rng, shape, odd=rng.random() < 0.7))
    what = [shape]
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        rows, change = changed(rng, rows) if rows else (rows, "none")
        what.append(change)
    if rng.random() < 0.1:
        rows.insert(rng.randrange(len(rows) + 1), _row(rng, "text", lambda: "other"))
    if rng.random() < 0.1:
        rows.insert(rng.randrange(len(rows) + 1), odd_value(rng))
    form = rng.choice(FORMS)
    for each in (form, ".jsonl"):
        with contextlib.suppress(Exception):  # a table cannot hold values of mixed kinds
            path = write(rows, each)
            return _prepared(rng, home, path, what=f"{path} ({each}): {'; '.join(what)}")
        _clear()
    raise AssertionError("JSON lines hold every row")


def _clear() -> None:
    shutil.rmtree("data", ignore_errors=True)


def _of_bytes(rng: random.Random, home: Path) -> Case:
    """A good file with some bytes changed."""
    shape = rng.choice(("alpaca", "messages", "sharegpt", "pairs", "text"))
    form = rng.choice(FORMS)
    path = write(list(rows_in(rng, shape, odd=rng.random() < 0.3)), form)
    file = rng.choice(sorted(p for p in path.rglob("*") if p.is_file())) if path.is_dir() else path
    data, how = damaged(rng, file.read_bytes())
    file.write_bytes(data)
    return _prepared(rng, home, path, what=f"{shape} {form} {file.name}: {how}")


def _of_text(rng: random.Random, home: Path) -> Case:
    """JSON as people and programs spoil it."""
    good = b'{"instruction": "Say it.", "output": "It is said."}'
    text = rng.choice(
        (
            b"", b"\n\n", b"[]", b"{}", b"null", b"[[]]", b"[null]", b"5\n", b'"x"\n',
            b"[" * 100_000,
            b'{"a":' * 100_000, good + good, good + b",\n" + good, b"[" + good + b",]", b"[" + good,
            b"[" + good + b"]\n" + good, b"[" + good + b"] x", good.replace(b'"', b"'"),
            good + b"\r" + good, good + b"\r\n" + good + b"\r\n", b"\xef\xbb\xbf" + good,
            good + b"\n\xef\xbb\xbf" + good, good.decode().encode("utf-16"), good + b"\x00",
            good.replace(b"Say", b"S\x00y"), good.replace(b"Say", b"S\xffy"),
            good.replace(b"Say", b"\\u0000 \\ud83d\\ude00 \\ud83d"), good.replace(b"it.", b"it.\t"),
            good.replace(b"}", b', "x": NaN}'), good.replace(b"}", b', "x": 1e999}'),
            good.replace(b"}", b', "x": ' + b"9" * 5000 + b"}"), b"// a\n" + good,
            good.replace(b"}", b', "output": "Two."}'), b"%PDF-1.4", b"PK\x03\x04", b"\x1f\x8b",
            b"<html></html>", good.replace(b"Say it.", b"x" * 2_000_000), b" " * 100_000 + good,
            good.replace(b"}", b', "output ": "Two."}'), b"\n".join([good] * 300),
        )
    )  # fmt: skip
    name = rng.choice(("rows.jsonl", "rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.json.zst"))
    Path("data").mkdir()
    path = Path("data", name)
    path.write_bytes(_packed(text, name) if rng.random() < 0.9 else text)
    return _prepared(rng, home, path, what=f"{name}: {text[:60]!r} ({len(text)} bytes)")


def _special(rng: random.Random, home: Path) -> Case:
    """Things that have the name of a file and are none, and names that are odd."""
    good = [{"instruction": "Say it.", "output": "It is said."}]
    kind = rng.choice(
        ("pipe", "loop", "folder", "dangling", "empty folder", "name", "name", "suffix")
    )
    path = Path("data/rows.jsonl")
    if kind in ("name", "suffix"):
        written = write(good, ".jsonl")
        names = ("a b", "\x1b[31m", "é", "a'b", 'a"b', "a,b", "{a}", "[a]", "*", "a" * 240,
                 "\u202ea",
                 "-x", "%d", "$a", "\udcff", "a\nb", "x:1", "~")  # fmt: skip
        suffix = rng.choice((".txt", ".csv", "", ".parquet", ".jsonl.gz", ".JSONL", ".jsonl.bz2"))
        name = rng.choice(names) + ".jsonl" if kind == "name" else "rows" + suffix
        path = written.rename(Path("data", name))
    else:
        Path("data").mkdir()
        makers: dict[str, Callable[[], Any]] = {
            "pipe": lambda: os.mkfifo(path),
            "loop": lambda: path.symlink_to("rows.jsonl"),
            "folder": path.mkdir,
            "dangling": lambda: path.symlink_to("/no/such/file.jsonl"),
            "empty folder": lambda: None,
        }
        makers[kind]()
    given = Path("data") if kind == "empty folder" or rng.random() < 0.3 else path
    return _prepared(rng, home, given, what=f"{kind}: {str(path)!r} given as {str(given)!r}")


def _of_cache(rng: random.Random, home: Path) -> Case:
    """A token cache that is damaged after it was made, and used again."""
    path = write(list(rows_in(rng, "alpaca", odd=False)), ".jsonl")
    values = _values(rng, home, path)
    before = _samples(prepare_job(build_config(values)).data.train)
    files = sorted(p for p in Path("cache").rglob("*") if p.is_file() and p.stat().st_size)
    file = rng.choice(files)
    how = "gone"
    if rng.random() < 0.15:
        file.unlink()
    else:
        data, how = damaged(rng, file.read_bytes())
        file.write_bytes(data)

    def action(config: RunConfig, _text: str) -> None:
        """What a start does before it trains."""
        job = prepare_job(config)
        with verifying(job.data.folders) as verified:
            verified()

    def check(outcome: Outcome) -> list[str]:
        # A start that found damage has left it for the next, which this one is then.
        if _samples(prepare_job(build_config(values)).data.train) != before:
            return [f"after exit {outcome.code} other tokens are trained on"]
        return []

    what = f"cache {file.name}: {how}"
    return Case(what=what, values=values, action=action, codes=CODES, check=check)


def _samples(tokens: TokenSet) -> list[tuple[list[int], list[int]]]:
    return [tuple(part.tolist() for part in tokens.sample(i)) for i in range(len(tokens))]  # type: ignore[misc]


def _values(rng: random.Random, home: Path, path: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(home / "model"), "random_init": True},
        "data": {
            "train": [{"path": str(path)}],
            "cache_dir": "cache",
            "sequence_length": LENGTH,
            "on_bad_row": rng.choice(("error", "error", "skip")),
            "max_bad_fraction": 1.0,
        },
        "tracking": {"backends": ["jsonl"]},
        "parallel": {"device": "cpu"},
        "prepare_only": True,
    }


def _prepared(rng: random.Random, home: Path, path: Path, *, what: str) -> Case:
    values = _values(rng, home, path)
    is_strict = values["data"]["on_bad_row"] == "error"

    def check(outcome: Outcome) -> list[str]:
        if outcome.code != 0:
            return []
        tokens = prepare_job(build_config(values)).data.train
        found = _differences(tokens, path, home, is_strict=is_strict)
        return found

    return Case(
        what=f"{what}{'' if is_strict else ' (skip)'}",
        values=values,
        action=run_config,
        codes=CODES,
        names=("data/", "rows", path.name),
        check=check,
    )


def _differences(tokens: TokenSet, path: Path, home: Path, *, is_strict: bool) -> list[str]:
    """What of the kept samples is not what the file says."""
    try:
        rows = _all_rows(path)
    except Exception as error:  # noqa: BLE001 -- whatever the plain reader makes of a broken file
        return [f"accepted what cannot be read: {type(error).__name__}: {error}"]
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    kept: dict[int, list[int]] = {}
    for index in range(len(tokens)):
        kept.setdefault(int(tokens.sample_name(index).rpartition(":")[2]), []).append(index)
    found = [f"row {row} of {len(rows)} was kept" for row in kept if row >= len(rows)]
    for number, row in enumerate(rows):
        try:
            wanted = reader.wanted_of(row)
        except reader.UnjudgedError:
            continue
        except (reader.MalformedError, reader.NothingLearntError) as error:
            if number in kept:
                found.append(f"row {number} was kept, which is {error!r}: {row!r:.200}")
            elif is_strict and isinstance(error, reader.MalformedError):
                found.append(f"row {number} was dropped under on_bad_row=error: {row!r:.200}")
            continue
        samples = [tokens.sample(index) for index in kept.get(number, [])]
        found += _compared(wanted, samples, tokenizer, number=number, is_strict=is_strict)
    return found


def _all_rows(path: Path) -> list[Any]:
    if path.is_dir() and (path / "state.json").exists():
        state = json.loads((path / "state.json").read_text())
        files = [path / entry["filename"] for entry in state["_data_files"]]
    else:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [row for file in files for row in reader.rows_of(file)]


def _compared(
    wanted: reader.Wanted,
    samples: list[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    number: int,
    is_strict: bool,
) -> list[str]:
    """What is wrong with the samples of one row."""
    ids = reader.ids_of(wanted, tokenizer)
    if not samples:
        if not is_strict or len(ids) > LENGTH or not _is_plain(wanted, tokenizer):
            return []
        return [f"row {number} is good, and was dropped under on_bad_row=error: {wanted!r:.300}"]
    if len(samples) > 1:
        return [f"row {number} gave {len(samples)} samples"]
    found = samples[0][0].tolist()
    same = found == ids
    if not _is_plain(wanted, tokenizer):  # a control token that is spelt stays text in ours
        same = tokenizer.decode(found) == tokenizer.decode(ids)
    if not same:
        return [f"row {number}: not apply_chat_template's tokens: {tokenizer.decode(found)!r:.300}"]
    supervised = [at + 1 for at, flag in enumerate(samples[0][1].tolist()) if flag]
    if supervised != _places_supervised(wanted, found, tokenizer):
        return [
            f"row {number}: supervised is {tokenizer.decode([found[t] for t in supervised])!r:.300}"
        ]
    return []


def _is_plain(wanted: reader.Wanted, tokenizer: PreTrainedTokenizerBase) -> bool:
    texts = [wanted.text or "", *(message["content"] for message in wanted.messages)]
    spelt = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return not any(token in text for token in spelt for text in texts)


def _places_supervised(
    wanted: reader.Wanted, ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Where a sample must be supervised, found by its control tokens alone."""
    if wanted.text is not None:
        return list(range(1, len(ids)))
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    starts = [place for place, token in enumerate(ids) if token == start]
    # The template puts a system message of its own before a conversation without one.
    flags = [*[False] * (len(starts) - len(wanted.supervised)), *wanted.supervised]
    header = len(tokenizer("assistant\n", add_special_tokens=False).input_ids)
    places: list[int] = []
    for first, is_supervised in zip(starts, flags, strict=True):
        if is_supervised:
            places += range(first + 1 + header, ids.index(end, first) + 1)
    return places
