import contextlib
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray

from roll_sft.base.errors import ConfigError, ResourceError
from roll_sft.config.build import build_config
from roll_sft.config.schema import token_cache_folder
from roll_sft.runtime import cluster, reaper
from roll_sft.runtime.cluster import connected
from tests.runtime.ray_cluster import free_port

# Prints what an own cluster is, then waits to be ended.
OWN_CLUSTER = """
import json, logging, os, signal, sys, time
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
    }
    print(json.dumps(facts), flush=True)
    time.sleep(60)
"""


def test_workers_that_no_machine_can_hold_are_refused_before_ray_starts():
    config = build_config({"parallel": {"num_workers": 100_000, "device": "cpu"}})
    with pytest.raises(ResourceError, match="100000 workers want 100000 CPUs"), connected(config):
        pass
    assert not ray.is_initialized()


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
    started = time.monotonic()
    with (
        pytest.raises((ResourceError, ConfigError)) as caught,
        connected(build_config({"cluster": {"address": address}})),
    ):
        pass
    assert not ray.is_initialized()
    return caught.value, time.monotonic() - started


@contextlib.contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_address_where_nobody_listens_is_refused_at_once():
    address = f"127.0.0.1:{free_port()}"
    error, seconds = refusal(address)
    assert seconds < 2
    assert isinstance(error, ResourceError)
    message = str(error)
    assert message.startswith(f"cluster.address: cannot join '{address}': ")
    assert "Connection refused" in message
    assert message.endswith("leave cluster.address and RAY_ADDRESS empty for a local one")
    assert "\n" not in message


def test_address_of_another_kind_of_server_is_refused_at_once():
    with serving(HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)) as address:
        error, seconds = refusal(address)
    assert seconds < 2
    assert isinstance(error, ResourceError)


def test_address_that_never_answers_is_refused_after_a_bounded_wait(monkeypatch):
    monkeypatch.setattr(cluster, "PROBE_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error, seconds = refusal(f"127.0.0.1:{silent.getsockname()[1]}")
    assert seconds < 2
    assert "Deadline Exceeded" in str(error)


@pytest.mark.parametrize("address", ["ray://head:10001", "http://127.0.0.1:8265"])
def test_url_in_place_of_an_address_is_a_mistake_in_the_configuration(address):
    error, _seconds = refusal(address)
    assert isinstance(error, ConfigError)
    assert "give host:port" in str(error)


def test_user_token_is_looked_for_where_ray_looks(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cluster._user_token() == ""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("at home\n")
    assert cluster._user_token() == "at home"
    (tmp_path / "elsewhere").write_text("elsewhere\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "elsewhere"))
    assert cluster._user_token() == "elsewhere"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "in the environment")
    assert cluster._user_token() == "in the environment"


def test_start_time_tells_a_process_from_its_successor():
    mine = reaper.start_time(os.getpid())
    assert mine is not None
    assert mine.isdigit()
    assert reaper.start_time(2**22 + 1) is None


@pytest.mark.slow
def test_cluster_that_asks_for_a_token_is_joined_with_it_and_refused_without(cluster, monkeypatch):
    with connected(build_config({"cluster": {"address": cluster.address}})):
        assert ray.cluster_resources()["CPU"] == 4
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    error, seconds = refusal(cluster.address)
    assert seconds < 2
    assert "asks for a token" in str(error)
    assert "set RAY_AUTH_TOKEN" in str(error)


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
    assert dead in str(refusal(dead)[0])


@pytest.mark.slow
def test_own_cluster_joins_nobody_is_private_and_is_gone_when_its_driver_is_killed(
    cluster, program, tmp_path
):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch(mode=0o644)
    own = program("-c", OWN_CLUSTER, HOME=str(tmp_path))
    facts = own.json_line(timeout_s=60)
    assert facts["cpus"] == facts["cores"] + 2
    assert facts["address"].rpartition(":")[2] != cluster.address.rpartition(":")[2]
    assert (facts["mode"], facts["auth"]) == ("0o100600", "token")
    assert facts["handler"], "SIGTERM is Ray's after all"
    warning = f"WARNING {facts['cores'] + 2} workers share {facts['cores']} cores of this machine\n"
    assert own.errors == warning
    assert len(own.left) > 5
    own.signal(9)
    assert own.wait(timeout_s=5) == -9
