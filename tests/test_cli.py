"""The console script: what there is, and what is said of what there is not."""

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import roll_sft
from roll_sft import cli
from roll_sft.demo import demo
from tests import doors
from tests.doors import Door, cells, contents, process, refused
from tests.outcome import Outcome

door, assets, arguments = doors.door, doors.assets, doors.arguments
ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(door: Door, capsys: pytest.CaptureFixture[str]) -> Iterator[Door]:
    """`roll-sft` in this process, as `door` is the main job."""

    def call(*given: str) -> Outcome:
        capsys.readouterr()
        code = cli.main([*given])
        return Outcome(code, *capsys.readouterr())

    return call


def test_the_script_is_installed_under_its_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"roll-sft": "roll_sft.cli:main"}


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_what_exists_without_the_heavy_libraries(flag: str, tmp_path: Path) -> None:
    code = (
        "import sys; from roll_sft import cli\n"
        f"code = cli.main([{flag!r}])\n"
        "heavy = {'torch', 'transformers', 'ray', 'hydra'} & set(sys.modules)\n"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    usage, commands, examples = shown.stdout.split("\n\n")
    assert usage.startswith("usage: roll-sft COMMAND")
    names = [line.split()[0] for line in commands.splitlines()]
    assert names == list(cli.COMMANDS)
    assert "roll-sft train --config-name demo" in examples


def test_the_version_is_the_package_s(script: Door) -> None:
    assert script("--version") == Outcome(0, f"roll-sft {roll_sft.__version__}\n", "")


def test_train_is_the_main_job(script: Door, arguments: list[str], tmp_path: Path) -> None:
    by_name, by_module = (
        script("train", *arguments, "--cfg", "job"),
        process(tmp_path, "--cfg", "job", *arguments),
    )
    assert (by_name.code, by_name.stdout) == (0, by_module.stdout)
    refused(script("train", "modle.path=x"), 2, "modle.path: no such key")


@pytest.mark.slow
def test_the_demo_needs_nothing_that_a_fresh_checkout_lacks(script: Door, tmp_path: Path) -> None:
    outcome = script("train", "--config-name", "demo", "dry_run=true")
    assert outcome.code == 0, outcome.stderr
    assert cells(outcome.stdout, "optimizer steps (estimate)")[1].startswith("450 ")
    assert (tmp_path / demo.ASSETS / "train.jsonl").is_file()


@pytest.mark.parametrize("settings", ["conf", "roll_sft/conf"])
@pytest.mark.parametrize("command", ["roll_sft.run", "roll_sft.cli train"])
def test_a_tree_that_is_not_installed_finds_its_settings(
    tmp_path: Path, settings: str, command: str
) -> None:
    """In a checkout they lie beside the package, in a wheel within it."""
    tree, folder = tmp_path / "tree", tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copytree(ROOT / "roll_sft", tree / "roll_sft")
    shutil.copytree(ROOT / "conf", tree / settings)
    demo_yaml = tree / settings / "demo.yaml"
    demo_yaml.write_text(demo_yaml.read_text().replace("run_name: demo", "run_name: of_this_tree"))
    shown = subprocess.run(
        [sys.executable, "-m", *command.split(), "--config-name", "demo", "--cfg", "job"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(tree)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "run_name: of_this_tree" in shown.stdout


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("plan", ["usage: roll-sft plan", "--config-name NAME"]),
        ("prepare", ["usage: roll-sft prepare", "--config-name NAME"]),
        ("preview", ["usage: roll-sft preview", "--index N,...", "--longest N", "--html FILE"]),
        ("parity", ["usage: roll-sft parity", "--samples N", "1: what is computed differs"]),
        ("convert", ["usage: roll-sft convert", "--checkpoint", "--output", "--replace"]),
    ],
)
def test_each_command_says_what_it_takes(script: Door, command: str, parts: list[str]) -> None:
    outcome = script(command, "--help")
    assert (outcome.code, outcome.stderr) == (0, "")
    for part in parts:
        assert part in " ".join(outcome.stdout.split())


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ([], ["roll-sft: no command; there are train, plan, prepare, preview"]),
        (["parety"], ["there is no command 'parety'; did you mean 'parity'? there are train,"]),
        (["--config-name", "demo"], ["no command '--config-name'; did you mean 'train'?"]),
        (["model.path=m"], ["no command 'model.path=m'; did you mean 'train'?"]),
        (["parity", "--samples", "few"], ["argument --samples: invalid int value: 'few'"]),
        (["parity", "modle.path=x"], ["modle.path: no such key; did you mean `model.path`?"]),
        (["plan", "--config-name", "dmeo"], ["did you mean 'demo'?"]),
        (
            ["convert", "--output", "x"],
            ["one of the arguments input --checkpoint --model is required"],
        ),
    ],
)
def test_what_there_is_not_is_refused_with_code_2(
    script: Door, tmp_path: Path, given: list[str], parts: list[str]
) -> None:
    refused(script(*given), 2, *parts)
    assert contents(tmp_path) == {}


def test_plan_is_a_dry_run(script: Door, arguments: list[str], tmp_path: Path) -> None:
    outcome = script("plan", *arguments, "train.global_batch_size=10")
    assert outcome.code == 0, outcome.stderr
    assert cells(outcome.stdout, "optimizer steps (estimate)")[1].startswith("7 ")
    assert contents(tmp_path) == {}


def test_convert_ends_with_the_codes_of_an_export(script: Door, tmp_path: Path) -> None:
    outcome = script("convert", "--checkpoint", "nowhere", "--output", "model")
    refused(outcome, 6, "nowhere")


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["--samples", "0"], "--samples: 0 is not from 1 to train.global_batch_size 128"),
        (["--samples", "129"], "--samples: 129 is not from 1 to train.global_batch_size 128"),
        (["dry_run=true"], "dry_run: true leaves nothing to compare"),
        (["prepare_only=true"], "prepare_only: true leaves nothing to compare"),
    ],
)
def test_parity_refuses_what_leaves_nothing_to_compare(
    script: Door, arguments: list[str], tmp_path: Path, given: list[str], part: str
) -> None:
    refused(script("parity", *arguments, *given), 2, part)
    assert contents(tmp_path) == {}


def test_parity_passes_what_is_hydras_to_hydra(script: Door) -> None:
    outcome = script("parity", "--config-name", "demo", "--samples", "3", "--cfg", "job")
    assert outcome.code == 0
    assert "run_name: demo" in outcome.stdout
