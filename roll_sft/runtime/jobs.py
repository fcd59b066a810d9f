"""Jobs of a Ray cluster through its job server: submitted, followed and stopped.

Promises: a job is submitted once, also where the connection is lost meanwhile; its log is shown
without a hole and without a repetition over lost connections; what a server answers, or that it
does not, becomes one line.
"""

import asyncio
import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from roll_sft.base.errors import ConfigError, ResourceError, first_line

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 30.0
UPLOAD_TIMEOUT_S = 600.0
AGENT_TIMEOUT_S = 60.0  # the agent that starts jobs is the last part of a cluster to be ready
SILENT_S = 20.0  # a log that says nothing for so long: ask whether the server is there
LOST_TIMEOUT_S = 600.0
POLL_S = 1.0
KILLED = 137
# What the shell of a job writes last: Ray keeps no exit code of a job that it stops.
ENDED = "the run ended with exit code"
_TAIL_CHARACTERS = 4096
_LOST = (OSError, RuntimeError, RayError, aiohttp.ClientError, TimeoutError)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Order:
    """What a job runs, with what; `command` is of a POSIX shell."""

    job_id: str
    command: str
    folder: Path
    variables: Mapping[str, str]


class JobServer:
    """The job server of the cluster at `address`, a URL.

    Each call raises `ResourceError` where it does not answer or refuses the token, and
    `ConfigError` for a job that it does not know.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        for name in ("", ".dashboard.modules.dashboard_sdk", ".dashboard.modules.job.sdk"):
            logging.getLogger(f"ray{name}").setLevel(logging.WARNING)  # each package, each end
        parts = urlsplit(address)
        with self._asking("to connect"):
            port = parts.port or (443 if parts.scheme == "https" else 80)
            place = (parts.hostname or "", port)
            socket.create_connection(place, timeout=CONNECT_TIMEOUT_S).close()
            client = _answered(lambda: JobSubmissionClient(address), timeout_s=ANSWER_TIMEOUT_S)
        self._client: JobSubmissionClient = client

    def submit(self, order: Order) -> None:
        """Send the folder of `order` and start its job."""
        environment = {"working_dir": str(order.folder), "env_vars": {**order.variables}}

        def submit() -> Any:
            return self._client.submit_job(
                entrypoint=with_exit_code(order.command),
                submission_id=order.job_id,
                runtime_env=environment,
            )

        ends = time.monotonic() + AGENT_TIMEOUT_S
        with self._asking("to submit"):
            while True:
                try:
                    _answered(submit, timeout_s=UPLOAD_TIMEOUT_S)
                    return
                except RuntimeError as error:
                    if "already exists" in str(error):  # the answer to an earlier try was lost
                        return
                    if "try again later" not in str(error):
                        raise
                    if time.monotonic() > ends:
                        raise ResourceError(
                            f"{self.address}: no node takes jobs after {AGENT_TIMEOUT_S:g} s; where"
                            " another Ray holds port 52365 of the head, start it with"
                            " --dashboard-agent-listen-port of another"
                        ) from error
                except ConnectionError:
                    if time.monotonic() > ends:
                        raise
                time.sleep(POLL_S)

    def job(self, job_id: str) -> JobDetails:
        """What the server knows of a job."""
        with self._asking(job_id):
            return _answered(lambda: self._client.get_job_info(job_id), timeout_s=ANSWER_TIMEOUT_S)

    def jobs(self) -> list[JobDetails]:
        """The jobs that were submitted, oldest first."""
        with self._asking("for jobs"):
            jobs = _answered(self._client.list_jobs, timeout_s=ANSWER_TIMEOUT_S)
        return sorted(
            (each for each in jobs if each.submission_id), key=lambda job: job.start_time or 0
        )

    def stop(self, job_id: str) -> bool:
        """Ask a job to end; returns whether it ran."""
        with self._asking(job_id):
            return _answered(lambda: self._client.stop_job(job_id), timeout_s=ANSWER_TIMEOUT_S)

    def wait(self, job_id: str) -> None:
        """Wait until a job has ended."""
        while not self.job(job_id).status.is_terminal():
            time.sleep(POLL_S)

    def exit_code(self, job_id: str) -> int:
        """The exit code of a job that has ended."""
        job = self.job(job_id)
        with self._asking(job_id):
            log = _answered(lambda: self._client.get_job_logs(job_id), timeout_s=ANSWER_TIMEOUT_S)
        return _exit_code(job, log[-_TAIL_CHARACTERS:])

    def follow(self, job_id: str, write: Callable[[str], object]) -> int:
        """Write the log of a job as it grows, until the job ends; returns its exit code.

        A connection that is lost is made again for `LOST_TIMEOUT_S`.
        """
        self.job(job_id)
        return asyncio.run(self._follow(job_id, write))

    async def _follow(self, job_id: str, write: Callable[[str], object]) -> int:
        log = _Log(write)
        while True:
            is_whole = False
            with contextlib.suppress(*_LOST):
                async with contextlib.aclosing(self._parts(job_id)) as parts:
                    log.begin()
                    async for part in parts:
                        log.add(part)
                is_whole = True
            job = await self._job_again(job_id)
            if job.status.is_terminal() and is_whole:
                return _exit_code(job, log.tail)
            await asyncio.sleep(POLL_S)

    async def _parts(self, job_id: str) -> AsyncGenerator[str, None]:
        """The log from its beginning. Raises where the connection or the server is lost."""
        tail: Any = self._client.tail_job_logs(job_id)  # a generator, which Ray does not say
        async with contextlib.aclosing(tail) as source:
            while True:
                part = asyncio.ensure_future(anext(source))
                try:
                    while not (await asyncio.wait([part], timeout=SILENT_S))[0]:
                        await self._job_now(job_id)
                    yield await part
                except StopAsyncIteration:
                    return
                finally:
                    part.cancel()
                    await asyncio.wait([part])

    async def _job_now(self, job_id: str) -> JobDetails:
        asked = _asked(lambda: self._client.get_job_info(job_id))
        return await asyncio.wait_for(asyncio.wrap_future(asked), ANSWER_TIMEOUT_S)

    async def _job_again(self, job_id: str) -> JobDetails:
        """What the server knows of a job, asked until it answers."""
        ends = time.monotonic() + LOST_TIMEOUT_S
        while True:
            try:
                return await self._job_now(job_id)
            except _LOST as error:
                if time.monotonic() > ends:
                    raise ResourceError(
                        f"{self.address}: did not answer for {LOST_TIMEOUT_S:g} s"
                        f" ({first_line(error)}); the job goes on if its cluster does:"
                        f" `roll-sft submit logs {job_id} --address {self.address}`"
                    ) from error
                await asyncio.sleep(POLL_S)

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Have what goes wrong in the block, where the server is asked, become one line."""
        try:
            yield
        except _LOST as error:
            text = first_line(error)
            if "does not exist" in text and "Job" in text:
                raise ConfigError(
                    f"{what}: {self.address} has no such job; `roll-sft submit status --address"
                    f" {self.address}` lists its jobs"
                ) from error
            if type(error).__name__ == "AuthenticationError":
                raise ResourceError(
                    f"--address: {self.address} refuses the token; set RAY_AUTH_MODE=token, and"
                    " RAY_AUTH_TOKEN or the file ~/.ray/auth_token to the token of the cluster's"
                    " head"
                ) from error
            if isinstance(error, OSError | TimeoutError):
                raise ResourceError(
                    f"--address: no job server answers at {self.address} ({text}); give the URL of"
                    " the cluster's dashboard, such as http://HEAD:8265"
                ) from error
            raise ResourceError(f"{self.address}: {what}: {text}") from error


class _Log:
    """A text that is read again from its beginning after a loss, and written once."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.tail = ""
        self._write, self._written, self._read = write, 0, 0

    def begin(self) -> None:
        self._read = 0

    def add(self, part: str) -> None:
        new = part[max(0, self._written - self._read) :]
        self._read += len(part)
        if new:
            self._write(new)
            self._written += len(new)
            self.tail = (self.tail + new)[-_TAIL_CHARACTERS:]


def with_exit_code(command: str) -> str:
    """A line of the shell that runs `command`, writes how it ended, and ends so.

    A stop signals the shell, too; it waits for `command`.
    """
    return f'trap : TERM INT; {command}; code=$?; echo "{ENDED} $code"; exit $code'


def _exit_code(job: JobDetails, tail: str) -> int:
    code: int | None = job.driver_exit_code
    if code is not None:
        return code if code >= 0 else 128 - code
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if written := re.findall(rf"^{ENDED} (\d+)$", tail, flags=re.M):
        return int(written[-1])
    if job.status == JobStatus.STOPPED:
        return KILLED
    raise ResourceError(f"the job did not run to its end: {_reason(job)}")


def _reason(job: JobDetails) -> str:
    return " ".join((job.message or "Ray does not say why").split())[:500]


def _asked(call: Callable[[], T]) -> "Future[T]":
    """The result of `call` in a thread: Ray's client waits for an answer without a limit."""
    asked: Future[T] = Future()

    def ask() -> None:
        try:
            asked.set_result(call())
        except (*_LOST, ValueError) as error:
            asked.set_exception(error)
        except BaseException as error:  # a fault: nobody may wait for the answer for ever
            asked.set_exception(error)
            raise

    threading.Thread(target=ask, name="job server", daemon=True).start()
    return asked


def _answered(call: Callable[[], T], *, timeout_s: float) -> T:
    return _asked(call).result(timeout=timeout_s)
