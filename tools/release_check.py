"""`make release-check`: whether the tree can be released as the version that it names.

    python -m tools.release_check [--skip clean|audit|... ...]

Each part prints what is wrong, one a line, and a last line with the count. Nothing is published.
"""

import datetime
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import roll_sft
from tools.parts import run_parts

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")
# Files of the tree that a user of the wheel needs, and where the wheel has them.
RESOURCES = {
    "roll_sft": ("**/*.py", "**/*.jinja"),
    "conf": ("**/*.yaml", "__init__.py"),
    "cluster": ("*",),
    "constraints": ("py*.txt",),
}


def main() -> int:
    """Run the parts; 1 if any finds something."""
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "clean": uncommitted,
        "version": version,
        "changelog": changelog,
        "build": built,
        "wheel": wheel_contents,
        "metadata": metadata,
        "reference": reference,
        "docs": docs,
        "audit": audit,
    }
    return run_parts(parts, description=(__doc__ or "").splitlines()[0])


def uncommitted() -> Iterator[str]:
    """Changes that are not committed, and files that git does not know."""
    status = _run("git", "status", "--porcelain").stdout
    yield from (f"{line}; commit or remove it" for line in status.splitlines())


def version() -> Iterator[str]:
    """Whether the version is one, is the citation's, and has no tag yet."""
    named = roll_sft.__version__
    if not VERSION.fullmatch(named):
        yield f"{named} is no version such as 1.2.0 or 1.2.0rc1; correct roll_sft/__init__.py"
    if f"\nversion: {named}\n" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8"):
        yield f"CITATION.cff does not name {named}; correct it"
    if _run("git", "tag", "--list", f"v{named}").stdout.strip():
        yield f"the tag v{named} is there already; raise the version"


def changelog() -> Iterator[str]:
    """Whether the changelog has a dated section of the version, and nothing unreleased."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    named = roll_sft.__version__
    sections = dict(re.findall(r"^## \[([^\]]+)\](.*?)(?=^## |\Z)", text, re.M | re.S))
    date = re.match(r" - (\d{4}-\d\d-\d\d)\n", sections.get(named, ""))
    if date is None:
        yield f"no section `## [{named}] - {datetime.date.today()}`; name the unreleased one so"
    if re.search(r"^- ", sections.get("Unreleased", ""), re.M):
        yield "lines stand under Unreleased; move them under the version"


@cache
def _distributions() -> tuple[subprocess.CompletedProcess[str], tuple[Path, ...]]:
    """What the build said, and the wheel and the source archive that it made."""
    folder = tempfile.mkdtemp(prefix="roll_sft_release_")
    done = _python("-m", "build", "--no-isolation", "--outdir", folder, str(ROOT))
    return done, tuple(sorted(Path(folder).iterdir()))


def built() -> Iterator[str]:
    """Whether wheel and source archive are built, and the archive builds the wheel."""
    done, files = _distributions()
    if done.returncode:
        yield (done.stderr or done.stdout).strip().splitlines()[-1]
    for path in files:
        if path.name.endswith(".tar.gz"):
            with tarfile.open(path) as archive:
                names = {name.partition("/")[2] for name in archive.getnames()}
            lacking = {"pyproject.toml", "README.md", "LICENSE"} - names
            yield from (f"{path.name}: has no {name}" for name in sorted(lacking))


def wheel_contents() -> Iterator[str]:
    """Files of the tree that the wheel lacks, and files in it that do not belong there."""
    wheels = [path for path in _distributions()[1] if path.suffix == ".whl"]
    if not wheels:
        yield "no wheel was built"
        return
    with zipfile.ZipFile(wheels[0]) as archive:
        packed = set(archive.namelist())
    wanted = set(resources())
    yield from (f"{name} is missing; see pyproject.toml" for name in sorted(wanted - packed))
    strange = (name for name in packed - wanted if ".dist-info/" not in name)
    yield from (f"{name} does not belong there" for name in sorted(strange))


def resources() -> Iterator[str]:
    """Names in the wheel of all that it must hold."""
    for folder, patterns in RESOURCES.items():
        for path in (found for pattern in patterns for found in (ROOT / folder).glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                name = path.relative_to(ROOT).as_posix()
                yield name if folder == "roll_sft" else f"roll_sft/{name}"


def metadata() -> Iterator[str]:
    """What an index would refuse of the distributions."""
    done = _python("-m", "twine", "check", "--strict", *map(str, _distributions()[1]))
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        yield from (line.strip() for line in lines if "ERROR" in line or "WARN" in line)


def reference() -> Iterator[str]:
    """Generated pages that are not what the code gives."""
    commands = {
        "docs/configuration.md": ("-m", "roll_sft.config.reference"),
        "docs/cli.md": ("tools/cli_reference.py",),
    }
    for page, command in commands.items():
        if _python(*command).stdout != (ROOT / page).read_text(encoding="utf-8"):
            yield f"{page} is stale; run make docs-reference"


def docs() -> Iterator[str]:
    """What the strict build of the site objects to."""
    with tempfile.TemporaryDirectory() as folder:
        done = _python("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder)
    if done.returncode:
        yield from (done.stdout + done.stderr).strip().splitlines()


def audit() -> Iterator[str]:
    """What `make audit` finds."""
    done = _python("-m", "tools.audit")
    if done.returncode:
        yield from (line for line in done.stdout.splitlines() if not line.endswith(" 0 found"))


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return _run(sys.executable, *arguments)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
