"""A Ray cluster on this machine whose nodes are started, killed and drained one by one."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.runtime.ray_cluster import MARK, end, free_port, is_alive, marked, wait_until

RAY = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")


@dataclass(frozen=True)
class Node:
    """A node, whose processes carry `mark`."""

    mark: str

    @property
    def processes(self) -> list[psutil.Process]:
        return marked(self.mark)

    @property
    def has_worker(self) -> bool:
        """Whether a rank of a run lives here."""
        titles = (_title(process) for process in self.processes)
        return any(title.startswith("ray::Worker") for title in titles)

    @property
    def node_id(self) -> str:
        """As its raylet was told it, in hexadecimal."""
        words = next(title for title in map(_title, self.processes) if "raylet" in title).split()
        return next(word for word in words if word.startswith("--node_id=")).partition("=")[2]

    def kill(self, *, raylet_alone: bool = False) -> None:
        """Kill the node as a machine that loses its power, or its raylet alone."""
        doomed = [each for each in self.processes if not raylet_alone or each.name() == "raylet"]
        assert doomed, "the node runs"
        end(doomed)
        wait_until(lambda: not any(map(is_alive, doomed)), timeout_s=10, what="the node is dead")


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class Nodes:
    """A head without CPUs unless `cpus` says so, and what joins it. It asks for a token."""

    def __init__(self, *, python: Path = Path(sys.executable), cwd: Path | None = None) -> None:
        self.token = secrets.token_hex(32)
        self.port, self.dashboard = free_port(), free_port()
        self.address, self.url = f"127.0.0.1:{self.port}", f"http://127.0.0.1:{self.dashboard}"
        self.nodes: list[Node] = []
        self._python, self._cwd = python, cwd
        self._folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets have short names

    @property
    def token_variables(self) -> dict[str, str]:
        return {"RAY_AUTH_TOKEN": self.token, "RAY_AUTH_MODE": "token"}

    def environment(self, **variables: str) -> dict[str, str]:
        """Of a process that may use the cluster, and knows nothing of any other."""
        clean = {name: value for name, value in os.environ.items() if name not in RAY}
        return {**clean, **self.token_variables, **variables}

    def ray(self, *arguments: str, before: Sequence[str] = (), **variables: str) -> str:
        """Run the command `ray`; returns its output."""
        done = subprocess.run(
            [*before, str(self._python.with_name("ray")), *arguments],
            env=self.environment(**variables),
            cwd=self._cwd,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def head(self, *, cpus: int = 1, dashboard: bool = False) -> Node:
        options = ["--head", f"--port={self.port}", f"--temp-dir={self._folder}"]
        options += [f"--include-dashboard={str(dashboard).lower()}"]
        options += [f"--dashboard-port={self.dashboard}"] if dashboard else []
        return self._start(cpus, options, ())

    def join(self, *, cpus: int = 1, before: Sequence[str] = ()) -> Node:
        """One more node; `before` runs its command."""
        # In one folder a node would unpack a job's files over those of another, as no machine does.
        folder = self._folder / str(len(self.nodes))
        return self._start(cpus, [f"--address={self.address}", f"--temp-dir={folder}"], before)

    def _start(self, cpus: int, options: list[str], before: Sequence[str]) -> Node:
        node = Node(secrets.token_hex(8))
        common = [f"--num-cpus={cpus}", "--object-store-memory=80000000", "--disable-usage-stats"]
        common += [f"--dashboard-agent-listen-port={free_port()}"]  # a taken one takes no jobs
        self.ray("start", *options, *common, before=before, **{MARK: node.mark})
        self.nodes.append(node)
        return node

    def drain(self, node: Node, *, deadline_s: int) -> None:
        """Tell the cluster that `node` is taken away, as the handler of a notice does."""
        self.ray(
            "drain-node",
            f"--address={self.address}",
            f"--node-id={node.node_id}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=spot",
            f"--deadline-remaining-seconds={deadline_s}",
        )

    def close(self) -> None:
        for node in self.nodes:
            end(node.processes)
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def ray_nodes(*, python: Path = Path(sys.executable), cwd: Path | None = None) -> Iterator[Nodes]:
    """Nodes that end with the block."""
    nodes = Nodes(python=python, cwd=cwd)
    try:
        yield nodes
    finally:
        nodes.close()
