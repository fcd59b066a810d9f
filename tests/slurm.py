"""Stand-ins for SLURM's commands, which start real processes on nodes that are namespaces.

A node has a network, process numbers, a host name and a /tmp/ray of its own. `srun` starts one task
on each; the batch script runs on the first; `scontrol requeue` is noted.
"""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.runtime.ray_cluster import end

NAMESPACES = ("--net", "--pid", "--mount", "--uts")
# The first process of a node: it ends nobody, and takes in those whose parents have ended.
INIT = """
mount --bind "$1" /etc/hosts; mkdir -p /tmp/ray; mount -t tmpfs none /tmp/ray; hostname "$0"
ip link set lo up; echo up
while :; do sleep 1000 & wait; done
"""
SRUN = """
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(os.environ["SLURM_STAND_IN"])
stream = server.makefile("rw")
# Passed on to the tasks, which srun waits for.
signal.signal(signal.SIGTERM, lambda *_: server.shutdown(socket.SHUT_WR))
words = sys.argv[1:]
command = words[next(i for i, word in enumerate(words) if not word.startswith("--")):]
print(json.dumps({"command": command, "environment": dict(os.environ)}), file=stream, flush=True)
for line in stream:
    told = json.loads(line)
    if "code" in told:
        sys.exit(told["code"])
    print(told["line"], end="", flush=True)
sys.exit(1)
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print(os.environ["SLURM_STAND_IN_NODES"].replace(",", "\\n"))
elif sys.argv[1] == "requeue":
    open(os.environ["SLURM_STAND_IN"] + ".requeued", "a").write(sys.argv[2] + "\\n")
else:
    sys.exit(f"scontrol: {sys.argv[1:]}")
"""


def may_make_nodes() -> bool:
    """Whether namespaces may be made here."""
    command = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "sh", "-c"]
    probe = "mount -t tmpfs none /mnt && ip link add one type veth peer name other"
    return subprocess.run([*command, probe], capture_output=True).returncode == 0


class Slurm:
    """Nodes, and what runs on them."""

    def __init__(self, folder: Path, *, num_nodes: int) -> None:
        self.folder, self.names = folder, [f"node{number}" for number in range(1, num_nodes + 1)]
        self._holders: list[subprocess.Popen[bytes]] = []
        self._inits: list[int] = []
        hosts = folder / "hosts"
        lines = ["127.0.0.1 localhost"]
        lines += [f"10.77.0.{number} {name}" for number, name in enumerate(self.names, 1)]
        hosts.write_text("".join(f"{line}\n" for line in lines))
        for name in (*self.names, "switch"):
            self._hold(name, hosts)
        self._connect()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(f"#!{sys.executable}{text}")
            (folder / name).chmod(0o755)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(folder / "s"))
        self._server.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _hold(self, name: str, hosts: Path) -> None:
        command = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "bash", "-c", INIT]
        holder = subprocess.Popen([*command, name, str(hosts)], stdout=subprocess.PIPE)
        self._holders.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"up\n", f"{name} is made"
        (init,) = psutil.Process(holder.pid).children()
        self._inits.append(init.pid)

    def _connect(self) -> None:
        """A bridge with a cable to each node."""
        *nodes, switch = self._inits
        on = {pid: ["nsenter", "-t", str(pid), "-n", "ip"] for pid in self._inits}

        def ip(pid: int, words: str) -> None:
            subprocess.run([*on[pid], *words.split()], check=True)

        ip(switch, "link add bridge type bridge")
        ip(switch, "link set bridge up")
        for number, node in enumerate(nodes, 1):
            ip(switch, f"link add p{number} type veth peer name eth0 netns {node}")
            ip(switch, f"link set p{number} master bridge up")
            ip(node, f"addr add 10.77.0.{number}/24 dev eth0")
            ip(node, "link set eth0 up")
            ip(node, "route add default dev eth0")

    def sbatch(self, script: Path, *arguments: str, **variables: str) -> "Batch":
        """Start `script` on the first node."""
        environment = {name: value for name, value in os.environ.items() if "RAY" not in name}
        environment |= {
            "PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}",
            "SLURM_STAND_IN": str(self.folder / "s"),
            "SLURM_STAND_IN_NODES": ",".join(self.names),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": f"node[1-{len(self.names)}]",
            "SLURM_JOB_NUM_NODES": str(len(self.names)),
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            **variables,
        }
        command = [*self._on(0), "bash", str(script), *arguments]
        log = self.folder / f"log_{secrets.token_hex(4)}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        return Batch(process, log)

    def requeued(self) -> list[str]:
        path = self.folder / "s.requeued"
        return path.read_text().split() if path.exists() else []

    def left(self, *names: str) -> list[str]:
        """What runs on the nodes whose command has one of `names`."""
        found = []
        for init in self._inits[:-1]:
            for process in psutil.Process(init).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    words = " ".join(process.cmdline())
                    found += [words] if any(name in words for name in names) else []
        return found

    def close(self) -> None:
        self._server.close()
        for pid in self._inits:  # the kernel ends all others of the node
            end([psutil.Process(pid)])
        for holder in self._holders:
            holder.wait(timeout=20)

    def _on(self, node: int) -> list[str]:
        namespaces = ["-n", "-p", "-m", "-u"]
        return ["nsenter", "-t", str(self._inits[node]), *namespaces, "-w/", "--"]

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=self._step, args=(connection,), daemon=True).start()

    def _step(self, connection: socket.socket) -> None:
        """Run the tasks of an `srun`; its end ends them."""
        stream = connection.makefile("rw")
        order = json.loads(stream.readline())
        lock = threading.Lock()

        def tell(**told: object) -> None:
            with lock, contextlib.suppress(OSError, ValueError):
                print(json.dumps(told), file=stream, flush=True)

        tasks = []
        for node, name in enumerate(self.names):
            environment = {**order["environment"], "SLURMD_NODENAME": name}
            tasks.append(
                subprocess.Popen(
                    [*self._on(node), *order["command"]],
                    env={**environment, "SLURM_PROCID": str(node)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )

        def relay(node: int) -> None:
            output = tasks[node].stdout
            assert output is not None
            for line in output:
                tell(line=f"{node}: {line}")

        def end_with_srun() -> None:
            with contextlib.suppress(OSError, ValueError):
                stream.read()
            for task in tasks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    for process in psutil.Process(task.pid).children(recursive=True):
                        process.terminate()

        relays = [threading.Thread(target=relay, args=(node,)) for node in range(len(tasks))]
        for thread in (*relays, threading.Thread(target=end_with_srun, daemon=True)):
            thread.start()
        codes = [task.wait() for task in tasks]
        for thread in relays:
            thread.join(timeout=5)
        tell(code=max(code if code >= 0 else 128 - code for code in codes))
        connection.close()


class Batch:
    """A batch script that runs."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self._process, self._log = process, log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def signal(self, number: int) -> None:
        """As `--signal=B:` does: to the script alone."""
        (script,) = psutil.Process(self._process.pid).children()
        script.send_signal(number)

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def wait(self, *, timeout_s: float) -> int:
        return self._process.wait(timeout=timeout_s)


@contextlib.contextmanager
def slurm(folder: Path, *, num_nodes: int) -> Iterator[Slurm]:
    """Nodes that end with the block."""
    cluster = Slurm(folder, num_nodes=num_nodes)
    try:
        yield cluster
    finally:
        cluster.close()
