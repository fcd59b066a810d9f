"""Start, join and stop the Ray nodes that a training cluster is made of.

    python cluster/node.py head [--port 6379] [--name main]        on the first machine
    python cluster/node.py join ADDRESS [--name main]              on every other one
    python cluster/node.py stop [--name main]                      on each, when done

Token authentication is on: `head` makes Ray's token file if there is none (mode 0600), and every
machine needs the same file before it joins. The dashboard, which takes jobs, listens on loopback
unless `--dashboard-host` says otherwise. The interpreter that runs this script comes first on PATH,
so jobs find the project. `stop` ends what this script started under that name, and nothing else:
other people's Ray nodes on the machine go on. Options after `--` go to `ray start` as they are.
"""

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

STATE = Path.home() / ".roll_sft" / "nodes"
AGENT_PORT = 52365
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    head, join, stop = (verbs.add_parser(verb) for verb in ("head", "join", "stop"))
    for verb in (head, join, stop):
        verb.add_argument("--name", default="main", help="tells several nodes of one machine apart")
    head.add_argument("--port", type=int, default=6379)
    head.add_argument("--dashboard-host", default="127.0.0.1")
    head.add_argument("--dashboard-port", type=int, default=8265)
    join.add_argument("address", help="HOST:PORT of the head")
    arguments, extra = split_extra(sys.argv[1:])
    options = parser.parse_args(arguments)
    if options.verb == "stop":
        return stop_node(options.name)
    if options.verb == "head":
        command = ["--head", f"--port={options.port}", "--disable-usage-stats"]
        command += [f"--dashboard-host={options.dashboard_host}"]
        command += [f"--dashboard-port={options.dashboard_port}"]
    else:
        command = [f"--address={options.address}", "--disable-usage-stats"]
    command += [f"--dashboard-agent-listen-port={agent_port()}"]
    return start_node(options.name, [*command, *extra], makes_token=options.verb == "head")


def agent_port() -> int:
    """Ray's own port for the agent that starts jobs, or a free one where another node has it.

    An agent that finds its port taken starts without a server, and no job can be submitted.
    """
    for port in (AGENT_PORT, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return int(probe.getsockname()[1])
    raise OSError("no port is free")


def split_extra(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before `--`, and what stands after it."""
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def start_node(name: str, options: list[str], *, makes_token: bool) -> int:
    record = STATE / f"{name}.pid"
    if running(record) is not None:
        print(f"node {name!r} runs already ({record}); stop it or give --name", file=sys.stderr)
        return 2
    environment = node_environment()
    token = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token.exists() and not environment.get("RAY_AUTH_TOKEN"):
        if not makes_token:
            print(f"no token at {token}; copy the head's there, mode 0600", file=sys.stderr)
            return 2
        ray(["get-auth-token", "--generate"], environment)
    if token.exists():
        token.chmod(0o600)
    STATE.mkdir(parents=True, exist_ok=True)
    log = STATE / f"{name}.log"
    # --block keeps all of the node's processes below one of ours, by which `stop` finds them.
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "ray"), "start", *options, "--block"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    record.write_text(f"{process.pid} {psutil.Process(process.pid).create_time()}\n")
    deadline = time.monotonic() + START_TIMEOUT_S
    while b"Ray runtime started" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > deadline:
            print(f"the node did not start; the end of {log}:", file=sys.stderr)
            print("\n".join(log.read_text().splitlines()[-15:]), file=sys.stderr)
            stop_node(name)
            return 4
        time.sleep(0.2)
    print(f"node {name!r} runs; `python {sys.argv[0]} stop --name {name}` ends it; log {log}")
    return 0


def stop_node(name: str) -> int:
    """End the node's processes, gently first. Returns 0 also where none runs."""
    record = STATE / f"{name}.pid"
    process = running(record)
    if process is None:
        print(f"node {name!r} does not run")
    else:
        family = [process, *process.children(recursive=True)]
        daemons = {process.pid, *(child.pid for child in process.children())}
        # Jobs and workers first, who may have something to save; then `ray start`, which ends its
        # daemons in an order in which none waits for another.
        for members in ([each for each in family if each.pid not in daemons], [process]):
            for member in members:
                end(member, gently=True)
            psutil.wait_procs(members, timeout=STOP_TIMEOUT_S)
        for member in psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)[1]:
            end(member, gently=False)
        psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        print(f"node {name!r} stopped, {len(family)} processes")
    record.unlink(missing_ok=True)
    return 0


def running(record: Path) -> psutil.Process | None:
    """The process that `record` names, unless it is gone and another has taken its number."""
    try:
        pid, created = record.read_text().split()
        process = psutil.Process(int(pid))
        return process if abs(process.create_time() - float(created)) < 1.0 else None
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None


def end(process: psutil.Process, *, gently: bool) -> None:
    try:
        process.terminate() if gently else process.kill()
    except psutil.NoSuchProcess:
        return


def node_environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # A stopped job gets the time to save what it has: Ray's default is three seconds.
    waits = {"RAY_JOB_STOP_WAIT_TIME_S": os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "120")}
    return {**os.environ, "PATH": path, "RAY_AUTH_MODE": "token", **waits}


def ray(arguments: list[str], environment: dict[str, str]) -> None:
    command = [str(Path(sys.executable).parent / "ray"), *arguments]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
