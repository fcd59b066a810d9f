"""The small form of `make fuzz`: the first cases of each kind, and some as processes."""

from pathlib import Path

import datasets
import huggingface_hub
import pytest

from tests.fuzz import kinds

CASES = {"configurations": 16, "data": 24, "checkpoints": 40, "models": 24, "adapters": 16}
# Each went wrong once: texts that lie outside of an Arrow table, an object among the shards that
# torch cannot read, pipes in place of a tokenizer's file and among data, a factor of 400
# digits, a flag with a value, a wide number in a template, a token across the end of a prompt.
FOUND = (
    "configurations:100244",
    "data:7126",
    "checkpoints:7175",
    "models:7196",
    "data:200096",
    "models:200148",
    "models:300019",
    "data:300330",
)
PROCESSES = ("configurations:1", "checkpoints:0")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name that a case makes up is asked for on the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # of processes
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz").resolve()
    kinds.build(folder, kinds.KINDS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_whatever_is_given_is_refused_in_a_line_or_done_as_it_says(kind: str, home: Path) -> None:
    results = {f"{kind}:{seed}": kinds.run_case(kind, seed, home) for seed in range(CASES[kind])}
    wrong = {name: (each.what, each.faults) for name, each in results.items() if each.faults}
    assert not wrong, "repeat one with: python -m tests.fuzz --only NAME"


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_what_went_wrong_before_is_mended(name: str, home: Path) -> None:
    kind, _, seed = name.partition(":")
    result = kinds.run_case(kind, int(seed), home)
    assert not result.faults, result.what


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_ends_as_the_call_does(name: str, home: Path) -> None:
    kind, _, seed = name.partition(":")
    result = kinds.run_case(kind, int(seed), home, process=True)
    assert not result.faults, result.what
