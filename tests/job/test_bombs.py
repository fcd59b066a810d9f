"""Folders and files that would fill the memory, never end, or show files of others.

Each ends in one line, within 10 s of the processor and 1 GiB of memory. A case runs in a process
that is forked from this one, whose limits the kernel keeps.
"""

import gzip
import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from roll_sft.base.errors import RollSftError
from roll_sft.data.chat.tokenizer import load_tokenizer
from roll_sft.job.in_process import prepare_job
from tests.parity import parity_config, write_model, write_rows

MEMORY_BYTES, PROCESSOR_S = 1 << 30, 10
SECRET = "a text that lies outside"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and rows.jsonl, and outside of these a file; transformers is loaded."""
    home = tmp_path_factory.mktemp("bombs")
    write_model(home / "model", num_layers=1)
    write_rows(home / "rows.jsonl", num_rows=2)
    (home / "outside.txt").write_text(SECRET)
    load_tokenizer(str(home / "model"), trust_remote_code=False, embedding_size=1 << 20)
    return home


def bomb(content: bytes, block: bytes, *, num_blocks: int) -> bytes:
    """A gzip file of `content` and many blocks: of members, as `cat` makes them."""
    return gzip.compress(content) + gzip.compress(block) * num_blocks


def prepared(home: Path, there: Connection) -> None:
    """In a process of its own: prepare, and say how it ended."""
    used = psutil.Process().memory_info().data  # type: ignore[attr-defined]
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_S, PROCESSOR_S))
    (rows,) = home.glob("rows.*")
    data = {"train": [{"path": str(rows)}], "cache_dir": str(home / "cache")}
    model = {"path": str(home / "model"), "random_init": True}
    try:
        prepare_job(parity_config(home, model=model, data=data))
        there.send("prepared")
    except RollSftError as error:
        there.send(str(error))
    except Exception as error:  # noqa: BLE001 -- the test says which
        there.send(f"a fault: {error!r}")


def ending(home: Path) -> str:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=prepared, args=(home, there))
    child.start()
    there.close()
    try:
        return str(here.recv())
    except EOFError:
        child.join()
        return f"ended by {child.exitcode}"
    finally:
        child.kill()
        child.join()


def in_place_of_rows(home: Path, name: str, content: bytes) -> None:
    (home / "rows.jsonl").unlink()
    (home / name).write_bytes(content)


def set_template(home: Path, template: str) -> None:
    (home / "model" / "chat_template.jinja").write_text(template)


def link(home: Path, name: str) -> None:
    (home / "model" / name).unlink(missing_ok=True)
    (home / "model" / name).symlink_to(home / "outside.txt")


def vast(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(300 << 20)


ZEROS, LETTERS = bytes(1 << 24), b"a" * (1 << 24)
CASES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "an array in a bomb": (
        lambda home: in_place_of_rows(home, "rows.json.gz", bomb(b'["', LETTERS, num_blocks=80)),
        ("rows.json.gz", "expands to more than 500 times its size"),
    ),
    "a line in a bomb": (
        lambda home: in_place_of_rows(home, "rows.jsonl.gz", bomb(b'{"', ZEROS, num_blocks=80)),
        ("rows.jsonl.gz", "expands to more than 500 times its size"),
    ),
    "a row that is deep": (
        lambda home: in_place_of_rows(home, "rows.jsonl", b"[" * 10_000_000),
        ("rows.jsonl", "nested too deep"),
    ),
    "millions of empty lists": (
        lambda home: (home / "model" / "config.json").write_text("[" + "[]," * 9_000_000),
        ("config.json", "9,000,001 lists and objects"),
    ),
    "a config.json that is deep": (
        lambda home: (home / "model" / "config.json").write_text("[" * 1_000_000),
        ("config.json", "recursion"),
    ),
    "a vast tokenizer": (
        lambda home: vast(home / "model" / "tokenizer.json"),
        ("tokenizer.json", "more than 128 MiB"),
    ),
    "a vast template": (
        lambda home: set_template(home, "{{ x }}" * 300_000),
        ("chat_template", "2,100,000 characters"),
    ),
    "a template without an end": (
        lambda home: set_template(
            home, "{% for a in messages * 9999 %}" * 4 + "x" + "{% endfor %}" * 4
        ),
        ("writes more than",),
    ),
    "a template that doubles": (
        lambda home: set_template(
            home,
            "{% set n = namespace(t='x' * 99) %}{% for i in range(60) %}"
            "{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
        ),
        ("writes more than",),
    ),
    "a template that indents far": (
        lambda home: set_template(home, "{{ messages | tojson(indent=999999999) }}"),
        ("writes more than",),
    ),
    "a licence that is a link": (
        lambda home: link(home, "LICENSE"),
        ("LICENSE", "a link that leads out of the model's folder"),
    ),
    "a template that is a link": (
        lambda home: link(home, "chat_template.jinja"),
        ("chat_template.jinja", "a link that leads out of the model's folder"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_hostile_ends_in_one_line(folder: Path, tmp_path: Path, case: str) -> None:
    spoil, parts = CASES[case]
    write_rows(tmp_path / "rows.jsonl", num_rows=2)
    (tmp_path / "outside.txt").write_text(SECRET)
    (tmp_path / "model").mkdir()
    for path in (folder / "model").iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path)
    line = ending(tmp_path)
    assert "\n" not in line
    assert SECRET not in line
    for part in parts:
        assert part in line, line


def test_what_is_not_hostile_is_prepared_under_the_same_limits(folder: Path) -> None:
    assert ending(folder) == "prepared"


def test_the_cache_of_the_hub_keeps_its_files_beside_the_folder(tmp_path: Path) -> None:
    from roll_sft.models.files.assets import asset_files

    blobs, snapshot = (tmp_path / "models--org--name" / each for each in ("blobs", "snapshots/1a"))
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "2b").write_text("a licence")
    (snapshot / "LICENSE").symlink_to("../../blobs/2b")
    assert list(asset_files(snapshot)) == ["LICENSE"]
