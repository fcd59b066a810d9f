"""`roll-sft submit [options] -- ARGUMENTS OF A RUN`, and `status`, `logs` and `stop` of its job.

The configuration is composed and checked here, before anything is sent. The job runs
`python -m roll_sft.run` in a copy of the working directory, which holds this package, so that it
need not be installed on the cluster. A stop gives the run the whole of its `cluster.grace_s`.
"""

import argparse
import contextlib
import math
import os
import re
import secrets
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from roll_sft.base.errors import ConfigError, RollSftError, report
from roll_sft.config.schema import RunConfig
from roll_sft.submit.package import stage
from roll_sft.training.run_folder import output_folder

if TYPE_CHECKING:  # Ray takes a second to import
    from roll_sft.runtime.jobs import JobServer

PROGRAM = "roll-sft submit"
ADDRESS = "http://127.0.0.1:8265"
VERBS = {
    "status": "what a job does, or without an ID all jobs",
    "logs": "follow the log of a job, and end as the job does",
    "stop": "ask a job to save and end, and wait for it",
}
GRACE_SHARE = 0.9  # of the time before Ray kills, which is a run's at most; see roll_sft/signals.py
Compose = Callable[[list[str]], tuple[RunConfig, str] | None]


def main(arguments: Sequence[str], *, compose: Compose) -> int:
    """Do what `arguments` say; returns the exit code, of a job that is followed the job's.

    `compose` makes the checked configuration that the arguments of a run ask for.
    """
    given = [*arguments]
    try:
        if given and given[0] in VERBS:
            return _about_job(given[0], given[1:])
        options, words = _parsed(given)
        return _submit(options, words, compose=compose)
    except RollSftError as error:
        return report(error)
    except KeyboardInterrupt:
        return 130


def _parsed(given: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the arguments of the run, which may stand behind `--`."""
    verbs = "".join(f"\n  {PROGRAM} {verb:<6}  {text}" for verb, text in VERBS.items())
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [options] -- ARGUMENTS OF A RUN",
        description="Run `roll-sft train ARGUMENTS` as a job of a Ray cluster.",
        epilog=f"Then:{verbs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_address(parser)
    parser.add_argument(
        "--working-dir",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="is copied to the job, without hidden files, weights, outputs and what git ignores;"
        " the current folder",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable of the job, with its value here or as given; may be repeated",
    )
    parser.add_argument(
        "--python", default="python", metavar="PROGRAM", help="the cluster's interpreter; python"
    )
    parser.add_argument(
        "--detach", action="store_true", help="print the job's ID and do not wait for its end"
    )
    place = given.index("--") if "--" in given else len(given)
    options, words = parser.parse_known_args(given[:place])
    return options, [*words, *given[place + 1 :]]


def _add_address(parser: argparse.ArgumentParser) -> None:
    named = os.environ.get("RAY_API_SERVER_ADDRESS")
    parser.add_argument(
        "--address",
        default=named or ADDRESS,
        metavar="URL",
        help=f"of the cluster's dashboard; RAY_API_SERVER_ADDRESS, or {ADDRESS}",
    )


def _submit(options: argparse.Namespace, words: list[str], *, compose: Compose) -> int:
    folder: Path = options.working_dir.absolute()
    if not folder.is_dir():
        raise ConfigError(f"--working-dir: {str(folder)!r} is no folder; give one that exists")
    variables = _variables(options.env)
    with contextlib.chdir(folder):  # where the job looks for --config-dir
        composed = compose(words)
    if composed is None:
        return 0
    config, _ = composed
    output_folder(config, in_job=True)
    variables.setdefault(
        "RAY_JOB_STOP_WAIT_TIME_S", str(math.ceil(config.cluster.grace_s / GRACE_SHARE))
    )
    server = _server(options.address)
    from roll_sft.runtime.jobs import Order

    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", config.run_name)
    command = shlex.join([options.python, "-m", "roll_sft.run", *words])
    with tempfile.TemporaryDirectory(prefix="roll_sft_job_") as staged:
        stage(folder, Path(staged))
        order = Order(f"{name}-{secrets.token_hex(4)}", command, Path(staged), variables)
        server.submit(order)
    _tell(f"job {order.job_id} is submitted; {_again('status', order.job_id, server)} shows it")
    if options.detach:
        sys.stdout.write(f"{order.job_id}\n")
        return 0
    return _follow(server, order.job_id)


def _variables(given: list[str]) -> dict[str, str]:
    variables = {}
    for each in given:
        name, is_set, value = each.partition("=")
        if not name or (not is_set and name not in os.environ):
            raise ConfigError(f"--env: {name!r} is not set here; give --env {name or 'NAME'}=VALUE")
        variables[name] = value if is_set else os.environ[name]
    return variables


def _server(address: str) -> "JobServer":
    if "://" not in address:
        address = f"http://{address}"
    if not re.match(r"https?://[^/]", address):
        raise ConfigError(
            f"--address: {address!r} is no URL of a job server; give the cluster's dashboard, such"
            f" as {ADDRESS}"
        )
    if "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"  # before Ray is imported, which reads it then
    # Ray's client prefers this variable, and then RAY_ADDRESS, to the address that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    from roll_sft.runtime.jobs import JobServer

    return JobServer(address.rstrip("/"))


def _has_token() -> bool:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(path).is_file()


def _follow(server: "JobServer", job_id: str) -> int:
    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        code = server.follow(job_id, write)
    except KeyboardInterrupt:
        logs, stop = (_again(verb, job_id, server) for verb in ("logs", "stop"))
        _tell(f"job {job_id} goes on; {logs} follows it again, {stop} ends it")
        raise
    _tell(f"job {job_id} ended with exit code {code}")
    return code


def _about_job(verb: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {verb}", description=f"{VERBS[verb]}.", allow_abbrev=False
    )
    is_list = verb == "status"
    parser.add_argument("job_id", metavar="ID", nargs="?" if is_list else None)
    _add_address(parser)
    options = parser.parse_args(arguments)
    server = _server(options.address)
    if verb == "logs":
        return _follow(server, options.job_id)
    if verb == "stop":
        return _stop(server, options.job_id)
    jobs = server.jobs() if options.job_id is None else [server.job(options.job_id)]
    if not jobs:
        _tell(f"{server.address} has no jobs")
    for job in jobs:
        code = "" if job.driver_exit_code is None else f"  exit code {job.driver_exit_code}"
        sys.stdout.write(f"{job.submission_id}  {job.status.value}{code}\n")
    return 0


def _stop(server: "JobServer", job_id: str) -> int:
    server.job(job_id)
    if server.stop(job_id):
        _tell(f"job {job_id} is asked to save and end")
    server.wait(job_id)
    _tell(f"job {job_id} ended with exit code {server.exit_code(job_id)}")
    return 0


def _again(verb: str, job_id: str, server: "JobServer") -> str:
    return f"`{PROGRAM} {verb} {job_id} --address {server.address}`"


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
