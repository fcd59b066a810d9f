"""Every command of the README and of the pages, run as it stands; see `tests.fences` for marks."""

import re
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from roll_sft import cli
from roll_sft.config.fields import all_names
from roll_sft.config.schema import RunConfig
from tests import fences
from tests.fences import blocks

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"bash", "jinja", "python", "text", "yaml"}


def _runs(page: Path) -> bool:
    return any(each.language == "bash" and each.mark != "notest" for each in blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_what_it_is(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(blocks(page)) == len(re.findall(r"^```", text, flags=re.MULTILINE)) / 2
    for block in blocks(page):
        assert block.language in LANGUAGES
        assert block.mark in (None, "notest", "plan")
        assert block.mark is None or block.reason


def _is_key(name: str) -> bool:
    """Whether `name` is a key, a key of a mapping, or what several keys begin with."""
    return any(f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for key in KEYS)


KEYS = frozenset(all_names(RunConfig))
# Options that Hydra reads in any command that takes the arguments of a run.
OF_A_RUN = {"--config-name", "--config-dir", "--cfg", "--resolve"}
RUNS = ("train", "plan", "prepare", "preview", "parity", "doctor")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_option_and_key_exists(page: Path) -> None:
    reference = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    for name, *words in fences.commands(page):
        assert name in cli.COMMANDS
        (own,) = re.findall(rf"^## roll-sft {name}$(.*?)(?=^## |\Z)", reference, re.M | re.S)
        options = {word.partition("=")[0] for word in words if re.match("--.", word)}
        assert options <= OF_A_RUN | set(re.findall(r"--[a-z-]+", own))
        if name in RUNS:
            keys = {word.partition("=")[0] for word in words if re.match(r"[\w.]+=", word)}
            assert [key for key in keys - groups if not _is_key(key)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    sections = {field.name for field in fields(RunConfig) if is_dataclass(field.default_factory)}
    named = re.findall(rf"`((?:{'|'.join(sections)})\.\w+)[=`]", page.read_text(encoding="utf-8"))
    assert [name for name in named if not _is_key(name)] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fences.make_folder(tmp_path_factory.mktemp("user"))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", filter(_runs, PAGES), ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, folder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "place"))
    fences.run(fences.script(page, place), place)
