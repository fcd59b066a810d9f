"""What the README and CONTRIBUTING tell people to type exists and is accepted."""

import re
import shlex
from pathlib import Path

import pytest

from roll_sft import cli
from tests import doors
from tests.doors import Door

door = doors.door
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The lines of all code blocks, as a shell takes them apart; an ellipsis is left out."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, flags=re.M | re.S))
    lines = blocks.replace("\\\n", " ").splitlines()
    taken = [line.strip() for line in lines if re.match(r" *(roll-sft|make|python|RAY_)\b", line)]
    return [
        [
            word
            for word in shlex.split(line.partition(" > ")[0], comments=True)
            if not word.endswith("...")
        ]
        for line in taken
    ]


def words_after(program: str) -> list[list[str]]:
    found = [line[line.index(program) + 1 :] for line in commands(README) if program in line]
    assert found, f"the README has no {program}"
    return found


@pytest.mark.parametrize("words", words_after("roll-sft"), ids=" ".join)
def test_a_command_of_the_readme_is_accepted(door: Door, words: list[str]) -> None:
    name, *arguments = words
    assert name in cli.COMMANDS
    if name in ("train", "plan", "preview", "parity"):
        shows = [] if "--cfg" in arguments else ["--cfg", "job"]
        assert cli.main([name, *arguments, *shows]) == 0


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_every_verb_and_every_linked_file_exists(text: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = set(re.findall(r"^([a-z-]+):", makefile, flags=re.M))
    named = set(re.findall(r"(?:^|`)(?:\w+=\S+ )*make ([a-z-]+)", text, flags=re.M))
    assert named
    assert named <= verbs
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert missing == []
