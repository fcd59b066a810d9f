"""The files that make a cluster, each checked by what reads it: shells, Docker, KubeRay and Ray."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from roll_sft import cli
from roll_sft.submit.cluster_files import NAMES
from tests.doors import refused
from tests.outcome import Outcome

ROOT = Path(__file__).parents[1]
FILES = ROOT / "cluster"
BIN = Path(sys.executable).parent
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")


def rayjob() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((FILES / "rayjob.yaml").read_text())
    return job


def test_the_command_copies_every_file_and_overwrites_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {*NAMES} == {path.name for path in FILES.iterdir() if path.is_file()}
    assert cli.main(["cluster-files", str(tmp_path / "mine")]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {path.name: path.read_bytes() for path in printed} == {
        name: (FILES / name).read_bytes() for name in NAMES
    }
    code = cli.main(["cluster-files", str(tmp_path / "mine")])
    refused(Outcome(code, *capsys.readouterr()), 2, "has Dockerfile, Dockerfile.cpu")


def test_the_slurm_script_has_no_fault_that_shellcheck_finds() -> None:
    subprocess.run([BIN / "shellcheck", FILES / "slurm.sh"], check=True)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_has_no_fault_that_hadolint_finds(name: str) -> None:
    subprocess.run([BIN / "hadolint", FILES / name], check=True)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_each_stage_of_a_dockerfile_takes_what_is_there(name: str) -> None:
    text = (FILES / name).read_text().replace("\\\n", " ")
    stages = re.findall(r"^FROM \S+ AS (\w+)$", text, flags=re.M)
    assert stages == ["build", "run"]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, flags=re.M)
    sources = {word for line in copied for word in line.split()}
    for source in sources:
        assert (ROOT / source).exists(), source
    built = {"pyproject.toml", "README.md", "LICENSE", "conf", "cluster", "roll_sft"}
    assert built <= sources, "what the wheel is made of"
    for stage, _ in re.findall(r"^COPY --from=(\w+) (\S+) ", text, flags=re.M):
        assert stage in stages


def test_the_rayjob_is_one_of_kuberay() -> None:
    schema = json.loads((ROOT / "tests" / "kuberay_rayjob.json").read_text())
    check = jsonschema.Draft202012Validator(schema)
    job = rayjob()
    check.validate(job)
    cluster = job["spec"]["rayClusterSpec"]
    for place in (job["spec"], cluster, cluster["workerGroupSpecs"][0]):
        place["noSuchField"] = "x"
        assert not check.is_valid(job), "a key that is not KubeRay's is found"
        del place["noSuchField"]


def test_the_rayjob_asks_for_its_token_and_gives_a_stop_the_grace_of_the_run() -> None:
    spec = rayjob()["spec"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    grace_s = float(re.findall(r"cluster\.grace_s=(\d+)", spec["entrypoint"])[0])
    variables = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert 0.9 * float(variables["RAY_JOB_STOP_WAIT_TIME_S"]) >= grace_s
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        assert pod["terminationGracePeriodSeconds"] > grace_s
        (container,) = pod["containers"]
        assert container["readinessProbe"]["exec"]["command"] == ["ray", "health-check"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert {each["name"]: each for each in pod["volumes"]}["shm"]["emptyDir"]["medium"] == (
            "Memory"
        )


def test_the_configuration_of_the_launcher_is_one_of_rays() -> None:
    config = yaml.safe_load((FILES / "launcher.yaml").read_text())
    validate_config(prepare_config(config))
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)


def test_versions_of_the_files_are_those_that_are_tested() -> None:
    pins = (ROOT / "constraints" / "py312.txt").read_text()
    (version,) = re.findall(r"^ray(?:\[\w+\])?==(\S+)$", pins, flags=re.M)
    assert rayjob()["spec"]["rayClusterSpec"]["rayVersion"] == version
