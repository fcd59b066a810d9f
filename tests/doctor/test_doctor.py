"""What `roll-sft doctor` looks at, says and ends with."""

import json
from pathlib import Path
from typing import Any

import pytest

from roll_sft import cli
from roll_sft.base.errors import ConfigError, ResourceError
from roll_sft.doctor import command, machine, packages
from roll_sft.doctor.finding import Finding, worst
from roll_sft.doctor.nodes import look_at_nodes
from tests import doors

assets, arguments = doors.assets, doors.arguments


def test_a_machine_and_a_configuration_that_are_fit(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["doctor", "--json", "--seconds", "0.2", *arguments])
    told = json.loads(capsys.readouterr().out)
    by_name = {each["name"]: each for each in told["findings"]}
    assert code == 0, told
    assert told["verdict"] in ("ok", "warn")
    assert {"python", "packages", "memory", "output_dir", "hub token", "ports"} <= set(by_name)
    assert by_name["first sample"]["verdict"] == "ok"
    assert "supervised" in by_name["first sample"]["found"]
    assert "TFLOP/s" in by_name["devices"]["found"]
    assert "GB/s over 2 ranks" in by_name["all-reduce"]["found"]
    assert all(each["remedy"] for each in told["findings"] if each["verdict"] != "ok")


def test_what_fails_ends_with_the_code_of_resources_and_a_remedy(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "_version", lambda name: None if name == "ray" else "99")
    monkeypatch.setattr(command, "_devices", lambda _: {"host": "here", "devices": []})
    code = cli.main(["doctor", "--seconds", "0.2", *arguments])
    shown = capsys.readouterr()
    assert code == ResourceError.exit_code
    assert "fail  ray: not installed; pip install 'ray" in shown.out
    assert "ray" in shown.err.splitlines()[-1]


def test_a_configuration_that_is_wrong_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "train.lerning_rate=1"]) == ConfigError.exit_code
    assert "learning_rate" in capsys.readouterr().err


def test_a_disk_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    findings = list(machine.look_at_machine({"output_dir": tmp_path / "a" / "b"}))
    (found,) = [each for each in findings if each.name == "output_dir"]
    assert found.verdict == "fail"
    assert str(tmp_path) in found.found


def test_a_slow_device_a_wrong_clock_and_a_folder_of_one_node_are_named() -> None:
    def node(host: str, speed: float, **more: Any) -> dict[str, Any]:
        device = {"device": "cuda:0", "name": "GPU", "tflops": speed}
        sees = {"output_dir": True, "data.cache_dir": True}
        return {"host": host, "devices": [device], "skew_s": 0.0, "sees": sees, **more}

    blind = {"output_dir": False, "data.cache_dir": True}
    nodes = [node("a", 100), node("b", 101), node("c", 60, skew_s=-7.5, sees=blind)]
    by_name = {each.name: each for each in look_at_nodes(nodes)}
    assert by_name["slow GPU"].found.startswith("c cuda:0: 60 TFLOP/s, 0.60 of the median")
    assert by_name["clocks"].verdict == "warn"
    assert "7.50 s" in by_name["clocks"].found
    assert by_name["output_dir is shared"].verdict == "fail"
    assert by_name["data.cache_dir is shared"].verdict == "ok"
    broken = {"host": "d", "error": "no answer"}
    assert worst(list(look_at_nodes([nodes[0], broken]))) == "fail"


def test_the_worst_verdict_counts() -> None:
    ok, warn = Finding("a", "ok", ""), Finding("b", "warn", "", "mend it")
    assert (worst([ok]), worst([ok, warn])) == ("ok", "warn")
