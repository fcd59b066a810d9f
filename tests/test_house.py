"""What pyproject.toml and constraints/ say, against what is in the tree."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = sorted((ROOT / "constraints").glob("py3*.txt"))


def pins(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_every_requirement_is_pinned_inside_its_range(path):
    pinned = pins(path)
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    for requirement in map(Requirement, wanted):
        version = pinned.get(canonicalize_name(requirement.name), "no pin")
        assert version != "no pin", f"{path.name}: {requirement.name} has no pin"
        assert version in requirement.specifier, f"{path.name}: {version} is not in {requirement}"


def test_pins_of_every_python_differ_in_megatron_core_only():
    first, *others = [set(pins(path).items()) for path in CONSTRAINTS]
    for other in others:
        assert {name for name, _ in first ^ other} == {"megatron-core"}


def test_every_package_folder_is_declared():
    folders = [path.parent for path in (ROOT / "roll_sft").rglob("__init__.py")]
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {
        "roll_sft.cluster",
        "roll_sft.conf",
        "roll_sft.constraints",
    }


def test_every_name_of_the_architecture_is_in_the_file_beside_it():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = re.findall(r"`([\w/]+\.py)`:\s+`(\w+)`", page)
    assert len(names) > 25
    for path, name in names:
        source = (ROOT / "roll_sft" / path).read_text(encoding="utf-8")
        assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), f"{path} has no {name}"


def test_the_citation_names_the_version() -> None:
    import roll_sft

    assert f"\nversion: {roll_sft.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
