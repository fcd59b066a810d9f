"""Every name that one of our files takes from another is there: also in tests that run rarely."""

import ast
import functools
import symtable

import pytest

from tests.test_floors import ROOT, absolute_base, module_path

FOLDERS = ("roll_sft", "conf", "tests", "tools", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def names(path: str) -> frozenset[str]:
    """The names that a module binds; `__getattr__` if it answers for any."""
    table = symtable.symtable((ROOT / path).read_text(encoding="utf-8"), path, "exec")
    bound = (each for each in table.get_symbols() if each.is_assigned() or each.is_imported())
    return frozenset(each.get_name() for each in bound)


def missing(source: str, path: str) -> list[str]:
    """`line: module.name` for each name that `source`, were it the file `path`, would not find."""
    found = []
    for node in ast.walk(ast.parse(source, path)):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = absolute_base(node, path)
        target = module_path(base)
        if target is None or "__getattr__" in names(target):
            continue
        for alias in node.names:
            if alias.name not in names(target) and module_path(f"{base}.{alias.name}") is None:
                found.append(f"{node.lineno}: {base}.{alias.name}")
    return found


def test_imported_names_exist():
    found = {
        (path.relative_to(ROOT).as_posix(), each)
        for path in SOURCES
        for each in missing(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    }
    assert not found


@pytest.mark.parametrize("name", ["from tests.exact import SAME", "from .exact import gone"])
def test_missing_name_is_found(name):
    assert missing(name, "tests/test_x.py")


def test_kept_name_is_not_reported():
    source = "from tests.exact import EXACT\nfrom tests import exact\nfrom roll_sft import train"
    assert missing(source, "tests/test_x.py") == []
