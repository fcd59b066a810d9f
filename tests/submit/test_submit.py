"""Runs as jobs of a cluster on which the project is not installed."""

import contextlib
import os
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from roll_sft import cli
from roll_sft.base.errors import ConfigError
from roll_sft.runtime import jobs
from roll_sft.submit import package
from tests import doors, test_killed
from tests.exact import exact
from tests.outcome import Outcome
from tests.runtime.ray_cluster import Program, wait_until
from tests.runtime.ray_nodes import Nodes, ray_nodes

assets = doors.assets
ROOT = Path(__file__).parents[2]
lines_of = test_killed.lines_of


def written(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def names_of(folder: Path) -> list[str]:
    paths = package.files_to_send(folder)
    return [path.relative_to(folder).as_posix() for path in paths]


def test_secrets_environments_weights_and_outputs_stay(tmp_path: Path) -> None:
    kept = ["conf/mine.yaml", "metric.py", "rows.jsonl"]
    written(tmp_path, *kept, ".env", ".git/config", "outputs/run/steps.jsonl", "key.pem")
    written(tmp_path, "env/pyvenv.cfg", "env/lib/x.py", "m/model.safetensors", "__pycache__/a.pyc")
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert names_of(tmp_path) == kept


def test_what_git_ignores_stays(tmp_path: Path) -> None:
    written(tmp_path, "code.py", "big/rows.jsonl", "new.yaml")
    (tmp_path / ".gitignore").write_text("big/\n")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "add", "code.py"], check=True)
    assert names_of(tmp_path) == ["code.py", "new.yaml"]


def test_a_folder_that_is_too_large_is_refused_by_its_largest_parts(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "rows.jsonl").open("wb") as file:
        file.truncate(package.MOST_BYTES + 1)
    with pytest.raises(ConfigError, match=r"--working-dir: .* most of it in data \(100 MiB\)"):
        package.files_to_send(tmp_path)


@pytest.mark.parametrize("folder", ["empty", "checkout"])
def test_the_package_and_its_configurations_travel(folder: str, tmp_path: Path) -> None:
    source, staged = tmp_path / "source", tmp_path / "staged"
    source.mkdir()
    staged.mkdir()
    package.stage(ROOT if folder == "checkout" else source, staged)
    code = "import roll_sft, roll_sft.run as run; print(roll_sft.__file__)\n"
    code += "print(run.shipped_configurations() / 'base.yaml')"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=staged, capture_output=True, text=True, check=True
    )
    for line in shown.stdout.split():
        assert Path(line).is_relative_to(staged)
        assert Path(line).is_file()


def test_the_shell_of_a_job_tells_how_the_run_ended_also_where_it_is_stopped() -> None:
    program = "trap 'exit 75' TERM; echo up; while :; do sleep 0.05; done"
    line = jobs.with_exit_code(f'sh -c "{program}"')
    with subprocess.Popen(line, shell=True, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == "up\n"
        for process in (psutil.Process(shell.pid), *psutil.Process(shell.pid).children()):
            process.terminate()
        assert shell.stdout.read() == f"{jobs.ENDED} 75\n"
        assert shell.wait(timeout=10) == 75


def test_a_log_is_written_once_over_lost_connections() -> None:
    shown: list[str] = []
    log = jobs._Log(shown.append)
    for parts in (["one\ntw"], ["one\n", "two\n", "th"], ["one\ntwo\nth", "ree\n"]):
        log.begin()
        for part in parts:
            log.add(part)
    assert "".join(shown) == "one\ntwo\nthree\n"


def submit(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    capsys.readouterr()
    code = cli.main(["submit", *map(str, arguments)])
    return Outcome(code, *capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--", "output_dir=here"], "output_dir: 'here' is relative"),
        (["--", "output_dir=/o", "trian.max_steps=3"], "trian.max_steps: no such key"),
        (["--env", "ROLL_SFT_NO_SUCH"], "--env: 'ROLL_SFT_NO_SUCH' is not set here"),
        (["--working-dir", "/no/such"], "--working-dir: '/no/such' is no folder"),
        (["status", "--address", "ray://head:10001"], "--address: 'ray://head:10001' is no URL"),
        (["logs", "x", "--address", "127.0.0.1:1"], "--address: no job server answers at http://"),
    ],
)
def test_what_cannot_be_submitted_is_refused_in_one_line(
    arguments: list[str],
    said: str,
    assets: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")  # --address wins over it
    if "--" in arguments:
        rows = f"data.train=[{{path: {assets / 'rows.jsonl'}}}]"
        arguments = [*arguments, f"model.path={assets / 'model'}", rows]
    outcome = submit(capsys, *arguments)
    assert outcome.code in (2, 4)
    assert outcome.stderr.startswith(said), outcome.stderr
    assert outcome.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has what the project needs, and not the project."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    inside = sysconfig.get_path("purelib", vars={"base": str(folder)})
    # Its own .pth files, the project's among them, are not read there.
    Path(inside, "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    ray = folder / "bin" / "ray"
    ray.write_text(f"#!{python}\nimport sys\nfrom ray.scripts.scripts import main\nmain()\n")
    ray.chmod(0o755)
    found = subprocess.run([python, "-c", "import roll_sft"], cwd=folder, capture_output=True)
    assert b"No module named 'roll_sft'" in found.stderr
    return python


@pytest.fixture(scope="module")
def cluster(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Three nodes with a job server, which do not have the project."""
    folder = tmp_path_factory.mktemp("elsewhere")
    path = f"{bare.parent}{os.pathsep}{os.environ['PATH']}"
    with pytest.MonkeyPatch.context() as patch, ray_nodes(python=bare, cwd=folder) as nodes:
        patch.setenv("PATH", path)
        patch.delenv("PYTHONPATH", raising=False)
        nodes.head(cpus=1, dashboard=True)
        nodes.join(cpus=1)
        nodes.join(cpus=1)
        yield nodes


def of_demo(output: Path, *, steps: int) -> list[str]:
    return [
        "--config-name",
        "demo",
        f"output_dir={output}",
        f"data.cache_dir={output.parent / 'cache'}",
        "parallel.tensor_model_parallel_size=1",
        "parallel.sequence_parallel=false",
        "parallel.device=auto",  # as a user leaves it
        f"train.max_steps={steps}",
        "train.global_batch_size=4",
        "train.eval_steps=null",
        "train.logging_steps=1",
        "tracking.backends=[jsonl]",
    ]


class Submission(Program):
    """`roll-sft submit` as a process, in `folder`, as a user of `cluster`."""

    def __init__(self, cluster: Nodes, folder: Path, *arguments: object) -> None:
        words = ["-m", "roll_sft.cli", "submit", *map(str, arguments)]
        variables = {**cluster.token_variables, "RAY_API_SERVER_ADDRESS": cluster.url}
        super().__init__(*words, folder=folder, environment=variables)


def submitted(cluster: Nodes, folder: Path, *arguments: object, timeout_s: float = 240) -> Outcome:
    program = Submission(cluster, folder, *arguments)
    try:
        code = program.wait(timeout_s=timeout_s)
        return Outcome(code, program.output, program.errors)
    finally:
        program.close()


@pytest.mark.long
def test_a_demo_runs_by_either_command_where_the_project_is_not_installed(
    cluster: Nodes, tmp_path: Path
) -> None:
    outcome = submitted(cluster, tmp_path, "--", *of_demo(tmp_path / "ours", steps=3))
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    assert "ended with exit code 0" in outcome.last_line
    command = ["job", "submit", "--address", cluster.url, "--working-dir", str(ROOT), "--"]
    command += ["python", "-m", "roll_sft.run", *of_demo(tmp_path / "rays", steps=3)]
    cluster.ray(*command)
    losses = [
        [line["train_loss"] for line in lines_of(tmp_path / name / "steps.jsonl")]
        for name in ("ours", "rays")
    ]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_stopped_job_saves_and_the_same_submission_goes_on_with_the_same_losses(
    cluster: Nodes, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert submitted(cluster, tmp_path, "--", *of_demo(whole, steps=40)).code == 0
    arguments = ["--", *of_demo(stopped, steps=40)]
    program = Submission(cluster, tmp_path, *arguments)
    try:
        log = stopped / "steps.jsonl"
        program.wait_until(
            lambda: log.exists() and log.read_text().count("\n") >= 3, timeout_s=120, what="steps"
        )
        job_id = program.errors.split()[1]
        asked = submitted(cluster, tmp_path, "stop", job_id)
        assert asked.code == 0, asked.stderr
        assert asked.last_line == f"job {job_id} ended with exit code 75"
        assert program.wait(timeout_s=60) == 75, program.output
        assert "is kept: the same command goes on from it" in program.output
    finally:
        program.close()
    kept = len(lines_of(log))
    assert 3 <= kept < 40
    again = submitted(cluster, tmp_path, *arguments)
    assert again.code == 0, again.stdout
    assert f"step_{kept:08d}, with step {kept + 1}" in again.stdout
    steps = exact(lines_of(log))
    assert steps == exact(lines_of(whole / "steps.jsonl"))


@pytest.mark.long
def test_detached_jobs_are_listed_and_followed_and_a_wrong_token_is_refused(
    cluster: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*of_demo(tmp_path / "out", steps=3), "data.train=[{path: /no/such.jsonl}]"]
    detached = submitted(cluster, tmp_path, "--detach", "--env", "A=1", "--", *arguments)
    assert detached.code == 0, detached.stderr
    job_id = detached.stdout.strip()
    followed = submitted(cluster, tmp_path, "logs", job_id)
    assert followed.code == 3, followed.stdout
    assert "/no/such.jsonl" in followed.stdout
    shown = submitted(cluster, tmp_path, "status").stdout
    assert f"{job_id}  FAILED  exit code 3" in shown.splitlines()
    unknown = submitted(cluster, tmp_path, "status", "nobody")
    doors.refused(unknown, 2, "nobody: http://127.0.0.1", "has no such job")
    monkeypatch.setattr(cluster, "token", "0" * 64)
    doors.refused(submitted(cluster, tmp_path, "status"), 4, "refuses the token")


class Relay:
    """Passes connections on to a port of this machine, until they are cut."""

    def __init__(self, port: int) -> None:
        self._to, self._open = port, list[socket.socket]()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> int:
        """Cut the connections that are open; returns their number."""
        cut, self._open = self._open, []
        for each in cut:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        return len(cut) // 2

    def close(self) -> None:
        self._server.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                self._open += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(1 << 16):
                target.sendall(part)
            target.shutdown(socket.SHUT_WR)


@pytest.mark.long
def test_a_log_is_whole_where_the_connection_is_lost(cluster: Nodes, tmp_path: Path) -> None:
    relay = Relay(cluster.dashboard)
    lines = [f"line {number}" for number in range(60)]
    program = "for i in range(60): print('line', i, flush=True); time.sleep(0.5)"
    job = ["--", "python", "-c", f"import time\n{program}\nraise SystemExit(3)"]
    options = ["--no-wait", "--submission-id", "counting", "--address", cluster.url]
    cluster.ray("job", "submit", *options, *job)
    follower = Submission(cluster, tmp_path, "logs", "counting", "--address", relay.url)
    try:
        for aim in (10, 30):
            follower.wait_until(
                lambda aim=aim: f"line {aim}\n" in follower.output, timeout_s=60, what="lines"
            )
            wait_until(relay.cut, timeout_s=20, what="a connection to cut")  # cuts it once
        assert follower.wait(timeout_s=60) == 3, follower.errors
    finally:
        follower.close()
        relay.close()
    shown = [line for line in follower.output.splitlines() if line.startswith("line ")]
    assert shown == lines
