"""Installed packages beside what the project needs, and the pins that it was tested with."""

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from roll_sft.doctor.finding import Finding

_PROJECT = "roll_sft"
_PACKAGE = Path(__file__).resolve().parents[1]
_WATCHED = ("torch", "megatron-core", "ray", "transformers", "safetensors", "tokenizers", "mlflow")
_TESTED_PYTHONS = ((3, 11), (3, 12))


def look_at_packages() -> Iterator[Finding]:
    """Python, the packages that a run needs, and where they differ from the tested pins."""
    version = sys.version_info[:2]
    text = f"Python {sys.version.split()[0]}"
    if version in _TESTED_PYTHONS:
        yield Finding("python", "ok", text)
    else:
        tested = ", ".join(f"{major}.{minor}" for major, minor in _TESTED_PYTHONS)
        yield Finding("python", "warn", text, f"tested with Python {tested}")
    problems = list(_unmet())
    for name, found, wanted in problems:
        yield Finding(name, "fail", found, f"pip install '{name}{wanted}'")
    if not problems:
        shown = ", ".join(f"{name} {_version(name)}" for name in _WATCHED if _version(name))
        yield Finding("packages", "ok", shown)
    yield from _pins()


def _unmet() -> Iterator[tuple[str, str, str]]:
    """(package, what is installed, range) of each requirement that does not hold."""
    for requirement in _requirements():
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        if installed is None:
            yield requirement.name, "not installed", str(requirement.specifier)
        elif not requirement.specifier.contains(installed, prereleases=True):
            yield requirement.name, installed, str(requirement.specifier)


def _requirements() -> list[Requirement]:
    """What the project asks for; of a checkout that is not installed, from pyproject.toml."""
    try:
        return [Requirement(text) for text in importlib.metadata.requires(_PROJECT) or ()]
    except importlib.metadata.PackageNotFoundError:
        import tomllib

        text = (_PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
        return [Requirement(each) for each in tomllib.loads(text)["project"]["dependencies"]]


def _pins() -> Iterator[Finding]:
    """Packages of other versions than the tested ones."""
    name = f"py{sys.version_info[0]}{sys.version_info[1]}.txt"
    places = (_PACKAGE / "constraints", _PACKAGE.parent / "constraints")  # installed, a checkout
    file = next((folder / name for folder in places if (folder / name).is_file()), None)
    if file is None:
        return
    lines = file.read_text(encoding="utf-8").splitlines()
    pinned = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;+]+)", "\n".join(lines), re.MULTILINE))
    watched = {canonicalize_name(name) for name in _WATCHED}
    other = {
        name: version
        for name, version in pinned.items()
        if canonicalize_name(name) in watched
        and _version(name) is not None
        and str(_version(name)).partition("+")[0] != version
    }
    if other:
        found = (f"{name} {_version(name)} (tested {pin})" for name, pin in other.items())
        wanted = " ".join(f"{name}=={pin}" for name, pin in other.items())
        yield Finding("pins", "warn", ", ".join(found), f"pip install {wanted}")
    else:
        yield Finding("pins", "ok", f"as in {file.name}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
