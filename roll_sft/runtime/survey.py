"""What each node of a cluster has and sees: for `roll-sft doctor`."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from roll_sft.base.errors import first_line
from roll_sft.config.schema import RunConfig
from roll_sft.runtime.cluster import connected

_ANSWER_TIMEOUT_S = 60.0


def survey(
    config: RunConfig, places: Mapping[str, Path], *, seconds: float
) -> list[dict[str, Any]]:
    """One report for each live node of the cluster that `config` joins.

    Keys: host, devices, all_reduce, driver, nccl (see `roll_sft.doctor.devices`), skew_s, and
    sees: which of `places` the node shares with this machine; or host and error. Raises
    `ResourceError` where the cluster cannot be joined.
    """
    with connected(config), tempfile.TemporaryDirectory(prefix=".doctor_") as fallback:
        nonces = {key: _nonce(place, Path(fallback)) for key, place in places.items()}
        try:
            return _ask(nonces, seconds)
        finally:
            for nonce in nonces.values():
                nonce.unlink(missing_ok=True)


def _nonce(place: Path, fallback: Path) -> Path:
    """A new file in `place`, or in its first parent that exists; another node sees it or not."""
    existing = next(each for each in (place, *place.parents) if each.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".doctor_", delete=False) as file:
            return Path(file.name)
    except OSError:  # told by the check of this machine
        return fallback / "none"


def _ask(nonces: Mapping[str, Path], seconds: float) -> list[dict[str, Any]]:
    probe: Any = ray.remote(_look)
    asked, skews = {}, {}
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        host = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        skews[host] = _skew_s(place)
        options = probe.options(
            num_cpus=0, num_gpus=node["Resources"].get("GPU", 0), scheduling_strategy=place
        )
        asked[options.remote(dict(nonces), seconds)] = host
    ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_TIMEOUT_S + seconds)
    return [
        {"host": host, **_answer(reference), "skew_s": skews[host]}
        for reference, host in asked.items()
    ]


def _skew_s(place: NodeAffinitySchedulingStrategy) -> float:
    """A node's clock less this machine's, known to half of the time that an answer takes."""
    clock: Any = ray.remote(_clock).options(num_cpus=0, scheduling_strategy=place)
    skew = 0.0
    for _ in range(2):  # the first one starts a process
        sent = time.time()
        try:
            told = ray.get(clock.remote(), timeout=_ANSWER_TIMEOUT_S)
        except RayError:  # told by the report of the node
            return 0.0
        skew = told - (sent + time.time()) / 2
    return skew


def _clock() -> float:
    return time.time()


def _answer(reference: Any) -> dict[str, Any]:
    try:
        report: dict[str, Any] = ray.get(reference, timeout=0.1)
    except RayError as error:
        ray.cancel(reference, force=True)
        return {"error": f"no answer: {first_line(error)}"}
    return report


def _look(nonces: Mapping[str, Path], seconds: float) -> dict[str, Any]:
    """Runs on the node."""
    command = [sys.executable, "-m", "roll_sft.doctor.devices", "--seconds", str(seconds)]
    command += ["--cpu-ranks", "1"]  # on CPUs the sum would say nothing of the cluster
    sees = {key: nonce.exists() for key, nonce in nonces.items()}
    try:
        shown = subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_TIMEOUT_S, check=True
        )
    except subprocess.SubprocessError as error:
        return {"error": str(error), "sees": sees}
    return {"sees": sees, **json.loads(shown.stdout)}
