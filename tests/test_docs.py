"""The documentation: built strictly, generated pages up to date."""

import os
import subprocess
import sys
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
