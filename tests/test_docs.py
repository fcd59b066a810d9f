"""The documentation: built strictly, generated pages up to date."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from tools import cli_reference

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_site_builds_strictly_and_asks_no_other_host_for_anything(tmp_path: Path) -> None:
    """`--strict` refuses a link or an anchor that leads nowhere, and a page that no menu has."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*build, "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'src="http' not in page
    assert 'rel="stylesheet" href="http' not in page


def test_the_commands_are_those_of_the_parsers() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert page == cli_reference.page(), "stale: run `make docs-reference`"


def _text(node: ast.AST) -> str | None:
    """The text that an expression gives, with NUL where a value stands; None if it gives none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(each) or "\0" for each in node.values)
    return None


@cache
def _messages() -> list[list[str]]:
    """Every text of the program that may be a message, in the parts between its values."""
    found = []
    for path in sorted((ROOT / "roll_sft").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in alone:  # a docstring
                continue
            parts = (_text(node) or "").split("\0")
            if sum(map(len, parts)) >= 12 and any(" " in each.strip() for each in parts):
                found.append(parts)
    return found


def test_every_message_of_the_troubleshooting_page_is_in_the_source() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    entries = re.findall(r"^### (.*)\n\n```text\n(.*)\n```$", page, flags=re.MULTILINE)
    assert len(entries) == page.count("\n### ") > 40
    messages = _messages()
    for title, line in entries:
        assert any(title in part for parts in messages for part in parts), f"no message: {title}"
        assert title in line
        printed: set[int] = set()  # places in the line that a message of the source prints
        for parts in messages:
            if all(part in line for part in parts):
                pattern = ".+?".join(map(re.escape, parts))
                printed.update(*(range(*match.span()) for match in re.finditer(pattern, line)))
        assert len(printed) > 0.6 * len(line), f"no message of the source prints: {line}"


def test_no_message_names_a_page_that_an_installed_copy_does_not_have() -> None:
    named = [parts for parts in _messages() if any("docs/" in each for each in parts)]
    assert named == []
