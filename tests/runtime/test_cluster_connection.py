import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from roll_sft.base.errors import ConfigError, ResourceError
from roll_sft.config.build import build_config
from roll_sft.config.schema import token_cache_folder
from roll_sft.runtime import reaper
from roll_sft.runtime.cluster import LONGEST_FOLDER, connected
from roll_sft.runtime.short_folder import short_folder
from tests.runtime.ray_cluster import free_port

# Prints what an own cluster is, then waits to be ended.
OWN_CLUSTER = """
import json, logging, os, signal, sys, time
import psutil
from pathlib import Path
handler = lambda number, frame: sys.exit(99)
signal.signal(signal.SIGTERM, handler)
logging.basicConfig(format="%(levelname)s %(message)s")
from roll_sft.config.build import build_config
from roll_sft.runtime.cluster import connected
cores = len(os.sched_getaffinity(0))
with connected(build_config({"parallel": {"num_workers": cores + 2, "device": "cpu"}})):
    import ray
    facts = {
        "cores": cores,
        "cpus": ray.cluster_resources()["CPU"],
        "address": ray.get_runtime_context().gcs_address,
        "mode": oct((Path.home() / ".ray" / "auth_token").stat().st_mode),
        "auth": os.environ["RAY_AUTH_MODE"],
        "handler": signal.getsignal(signal.SIGTERM) is handler,
        "shared": [
            each.name() for each in psutil.Process().children(recursive=True)
            if os.getsid(each.pid) == os.getsid(0)
        ],
    }
    print(json.dumps(facts), flush=True)
    time.sleep(60)
"""

# Begins to start an own cluster, and leaves it in the middle.
LEFT_IN_THE_MIDDLE = """
import sys, psutil
from roll_sft.config.build import build_config
from roll_sft.runtime.cluster import starting
with starting(build_config({"parallel": {"num_workers": 2, "device": "cpu"}})):
    while not any("gcs_server" in each.name() for each in psutil.Process().children()):
        pass
sys.exit("the cause")
"""

# Begins to start an own cluster, needs none after all, and goes on for longer than Ray lets a
# process that has lost its cluster, which here is two seconds.
NOT_NEEDED = """
import psutil, time
from roll_sft.config.build import build_config
from roll_sft.runtime.cluster import starting
with starting(build_config({"parallel": {"num_workers": 2, "device": "cpu"}})):
    while not any("gcs_server" in each.name() for each in psutil.Process().children()):
        pass
time.sleep(5)
"""

# Tries for a second to join a cluster, and ends as the doors do.
JOIN = """
import sys
from roll_sft.base.errors import RollSftError, report
from roll_sft.config.build import build_config
from roll_sft.runtime import cluster, joining
joining.JOIN_TIMEOUT_S = 1.0
try:
    with cluster.connected(build_config({"cluster": {"address": sys.argv[1]}})):
        pass
except RollSftError as error:
    sys.exit(report(error))
"""


def test_workers_that_no_machine_can_hold_are_refused_before_ray_starts():
    config = build_config({"parallel": {"num_workers": 100_000, "device": "cpu"}})
    with pytest.raises(ResourceError, match=r"parallel\.num_workers: 100000\b"), connected(config):
        pass
    assert not ray.is_initialized()


def test_a_long_folder_for_ray_is_refused_before_ray_starts(monkeypatch):
    folder = f"/tmp/{'x' * (LONGEST_FOLDER - len('/tmp//ray') + 1)}"
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = build_config({"parallel": {"num_workers": 1, "device": "cpu"}})
    told = f"RAY_TMPDIR: '{folder}' has 40 bytes.*for 39; set"
    with pytest.raises(ResourceError, match=told), connected(config):
        pass
    assert not ray.is_initialized()


def test_a_long_folder_for_temporary_files_is_left_to_others(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * LONGEST_FOLDER)))
    assert short_folder() == "/tmp/ray"


def test_tokens_lie_where_every_node_of_the_run_sees_them(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def folder(**keys):
        return str(token_cache_folder(build_config({"output_dir": "/shared/runs/a", **keys})))

    own = str(Path.home() / ".cache" / "roll_sft")
    assert folder() == own
    assert folder(cluster={"address": "head:6379"}) == "/shared/runs/.token_cache"
    assert folder(cluster={"address": "head:6379"}, data={"cache_dir": "/c"}) == "/c"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert folder() == "/shared/runs/.token_cache"


def refusal(address):
    with (
        pytest.raises((ResourceError, ConfigError)) as caught,
        connected(build_config({"cluster": {"address": address}})),
    ):
        pass
    assert not ray.is_initialized()
    return caught.value


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (f"127.0.0.1:{free_port()}", "Connection refused"),
        ("head", "invalid literal for int"),
    ],
    ids=["port", "name"],
)
def test_address_where_nothing_listens_is_refused_before_ray_tries(address, reason, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray tries for minutes"))
    error = refusal(address)
    assert isinstance(error, ResourceError)
    message = str(error)
    assert message.startswith(f"cluster.address: cannot join '{address}': ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("address", ["ray://head:10001", "http://127.0.0.1:8265"])
def test_url_in_place_of_an_address_is_a_mistake_in_the_configuration(address):
    error = refusal(address)
    assert isinstance(error, ConfigError)
    assert f"cluster.address: '{address}'" in str(error)


def join_of_another_process(program, address, **environment):
    """What a process says on stderr that tries for a second to join `address`."""
    joining = program("-c", JOIN, address, **environment)
    assert joining.wait(timeout_s=60) == ResourceError.exit_code
    return joining.errors


@pytest.mark.slow
def test_address_of_something_else_than_ray_is_refused_after_a_bounded_wait(program):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        line = join_of_another_process(program, address).splitlines()[-1]
    assert line.startswith(f"cluster.address: cannot join '{address}': no Ray cluster answers")
    assert "within 1 s" in line


def test_start_time_tells_a_process_from_its_successor():
    mine = reaper.start_time(os.getpid())
    assert mine is not None
    assert mine.isdigit()
    assert reaper.start_time(2**22 + 1) is None


def test_the_reaper_ends_what_runs_files_of_ray_and_removes_its_folders(tmp_path):
    site, sessions, day = tmp_path / "site", tmp_path / "ray", "session_2026-11-05"
    first, second = f"{day}_08-00-00_000007_12", f"{day}_08-00-01_000000_12"
    kept = {f"{day}_07-59-59_999999_12", f"{day}_08-00-00_000007_112", "session_latest"}
    for name in (*kept, first, second):
        (sessions / name / "logs").mkdir(parents=True)
    with contextlib.ExitStack() as stack:

        def start(*words, **options):
            command = [sys.executable, "-c", "import time; time.sleep(60)", *words]
            program = stack.enter_context(subprocess.Popen(command, **options))
            stack.callback(program.kill)
            return program

        named, unnamed = start(site / "raylet"), start(site / "gcs", f"--dir={sessions / second}")
        log = stack.enter_context((sessions / second / "logs" / "agent.log").open("w"))
        titled = start("ray::Agent", stderr=log)
        reading = start("less", stderr=log)
        service, reader = start(), start(sessions / second / "logs")
        command = [sys.executable, reaper.__file__, site, sessions / first]
        told = f"{named.pid}\n{service.pid}\n".encode()
        subprocess.run(command, input=told, timeout=30, check=True)
        assert {each.wait(timeout=30) for each in (named, unnamed, titled)} == {-signal.SIGKILL}
        assert (service.poll(), reader.poll(), reading.poll()) == (None, None, None)
    assert {path.name for path in sessions.iterdir()} == kept


@pytest.mark.slow
def test_cluster_that_asks_for_a_token_is_joined_with_it_and_refused_without(cluster, program):
    with connected(build_config({"cluster": {"address": cluster.address}})):
        assert ray.cluster_resources()["CPU"] == 4
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another"}
    remedy = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or the file ~/.ray/auth_token to"
    for environment, does in (({}, "asks for a token"), (wrong, "refuses the token")):
        told = join_of_another_process(program, cluster.address, **environment)
        assert told.startswith(f"cluster.address: {cluster.address} {does}; {remedy}")
        assert told.count("\n") == 1, "Ray's own warnings"


@pytest.mark.slow
def test_sigterm_keeps_its_handler_where_a_cluster_is_joined_and_left(cluster):
    ctypes.pythonapi.PyOS_getsig.restype = ctypes.c_void_p
    earlier = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        mine = ctypes.pythonapi.PyOS_getsig(signal.SIGTERM)
        assert mine is not None
        with connected(build_config({"cluster": {"address": cluster.address}})):
            assert ctypes.pythonapi.PyOS_getsig(signal.SIGTERM) == mine
        assert ctypes.pythonapi.PyOS_getsig(signal.SIGTERM) == mine, "the default"
    finally:
        signal.signal(signal.SIGTERM, earlier)


@pytest.mark.slow
def test_cluster_that_the_caller_joined_is_used_and_stays(cluster):
    config = build_config({"cluster": {"address": cluster.address}})
    with connected(config):
        with connected(build_config({})):
            assert ray.cluster_resources()["CPU"] == 4
        assert ray.is_initialized()
    assert not ray.is_initialized()


@pytest.mark.slow
def test_address_in_the_environment_is_joined_and_one_in_the_configuration_wins(
    cluster, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    with connected(build_config({})):
        assert ray.cluster_resources()["CPU"] == 4
    dead = f"127.0.0.1:{free_port()}"
    assert dead in str(refusal(dead))


@pytest.mark.slow
def test_own_cluster_joins_nobody_is_private_and_is_gone_when_its_driver_is_killed(
    cluster, program, tmp_path
):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch(mode=0o644)
    own = program("-c", OWN_CLUSTER, HOME=str(tmp_path), TMPDIR=str(tmp_path / ("x" * 40)))
    facts = own.json_line(timeout_s=60)
    assert facts["cpus"] == facts["cores"] + 2
    assert facts["address"].rpartition(":")[2] != cluster.address.rpartition(":")[2]
    assert (facts["mode"], facts["auth"]) == ("0o100600", "token")
    assert facts["handler"], "SIGTERM is Ray's after all"
    assert facts["shared"] == [], "a signal to the driver's group reaches Ray"
    warning = f"WARNING {facts['cores'] + 2} workers share {facts['cores']} cores of this machine\n"
    assert own.errors == warning
    assert len(own.left) > 5
    stopped = next(each for each in own.left if each.name().startswith("ray::"))
    stopped.suspend()  # a worker that does not see that its raylet is gone
    own.signal(9)
    assert own.wait(timeout_s=30) == -9


@pytest.mark.slow
def test_own_cluster_that_is_left_while_it_starts_is_gone_and_silent(program, tmp_path):
    leaving = program("-c", LEFT_IN_THE_MIDDLE, HOME=str(tmp_path))
    assert leaving.wait(timeout_s=60) == 1
    assert leaving.errors == "the cause\n"


@pytest.mark.slow
def test_a_process_goes_on_after_an_own_cluster_that_it_began_to_start_for_nothing(
    program, tmp_path
):
    waits = {"RAY_gcs_rpc_server_reconnect_timeout_s": "2"}
    going_on = program("-c", NOT_NEEDED, HOME=str(tmp_path), **waits)
    assert going_on.wait(timeout_s=60) == 0, "Ray has ended it"
    assert going_on.errors == ""
