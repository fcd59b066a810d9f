"""Lets ranks on other nodes reach rank 0's rendezvous store, and nobody else.

torch's store asks nobody who it is, so it listens on loopback alone. On rank 0's node a gate
listens on the private address: a connection must answer a random challenge with the HMAC-SHA256 of
the run's secret before the gate connects it to the store. A rank on another node has a port of its
own on loopback, which leads to the gate. What passes is not encrypted, as in Ray itself.

Gate and port are processes of this file, of the standard library alone: they also answer while a
rank holds the interpreter, and end with the rank that started them.
"""

import asyncio
import contextlib
import functools
import hmac
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

LOOPBACK = "127.0.0.1"
CHALLENGE_BYTES = DIGEST_BYTES = 32
ANSWER_TIMEOUT_S = 10.0
_PART_BYTES = 1 << 16
Streams = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Gate:
    """Where a gate listens, and the secret that it asks for."""

    host: str
    port: int
    secret: str = field(repr=False)  # hexadecimal


@contextlib.contextmanager
def gate_to(port: int, *, host: str) -> Iterator[Gate]:
    """A gate at `host` to the store on loopback `port`, while the block runs."""
    secret = secrets.token_hex(DIGEST_BYTES)
    with _program("gate", listens=host, to=(LOOPBACK, port), secret=secret) as listening:
        yield Gate(host, listening, secret)


@contextlib.contextmanager
def port_behind(gate: Gate) -> Iterator[int]:
    """A port on loopback that leads through `gate`, while the block runs."""
    target = (gate.host, gate.port)
    with _program("port", listens=LOOPBACK, to=target, secret=gate.secret) as listening:
        yield listening


@contextlib.contextmanager
def _program(role: str, *, listens: str, to: tuple[str, int], secret: str) -> Iterator[int]:
    """Run this file; yields the port that it listens on. The secret goes through a pipe."""
    with subprocess.Popen(
        [sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as program:
        assert program.stdin is not None, "the program has a pipe for its input"
        assert program.stdout is not None, "the program has a pipe for its output"
        order = {"role": role, "listens": listens, "to": to, "secret": secret}
        program.stdin.write(f"{json.dumps(order)}\n".encode())
        program.stdin.flush()
        answer = program.stdout.readline()
        if not answer:
            raise OSError(f"no port of {listens} can be listened on")
        yield int(answer)


def _digest(secret: str, challenge: bytes) -> bytes:
    return hmac.digest(bytes.fromhex(secret), challenge, "sha256")


async def _admit(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to: tuple[str, int], secret: str
) -> None:
    """The gate's side of a connection."""
    challenge = secrets.token_bytes(CHALLENGE_BYTES)
    writer.write(challenge)
    answer = await asyncio.wait_for(reader.readexactly(DIGEST_BYTES), ANSWER_TIMEOUT_S)
    if hmac.compare_digest(answer, _digest(secret, challenge)):
        await _join(reader, writer, *await asyncio.open_connection(*to))


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to: tuple[str, int], secret: str
) -> None:
    """The rank's side of a connection."""
    gate_reader, gate_writer = await asyncio.open_connection(*to)
    challenge = await asyncio.wait_for(gate_reader.readexactly(CHALLENGE_BYTES), ANSWER_TIMEOUT_S)
    gate_writer.write(_digest(secret, challenge))
    await _join(reader, writer, gate_reader, gate_writer)


async def _join(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    other_reader: asyncio.StreamReader,
    other_writer: asyncio.StreamWriter,
) -> None:
    """Copy between two connections, both ways, until both have ended."""
    with contextlib.closing(other_writer):
        await asyncio.gather(_copy(reader, other_writer), _copy(other_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while part := await reader.read(_PART_BYTES):
        writer.write(part)
        await writer.drain()
    writer.write_eof()


def _quietly(serve: Streams) -> Streams:
    """`serve`, which closes the connection where the peer is gone, too late or not admitted."""

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with (
            contextlib.closing(writer),
            contextlib.suppress(OSError, EOFError, asyncio.TimeoutError),
        ):
            await serve(reader, writer)

    return served


async def _serve(role: str, *, listens: str, to: tuple[str, int], secret: str) -> None:
    serve = functools.partial({"gate": _admit, "port": _pass_on}[role], to=to, secret=secret)
    server = await asyncio.start_server(_quietly(serve), listens, 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


def _end_with_parent() -> None:
    """End this process when its standard input does."""
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """Serve what the first line of standard input asks for, until standard input ends."""
    order = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asyncio.run(
        _serve(
            order["role"],
            listens=order["listens"],
            to=tuple(order["to"]),
            secret=order["secret"],
        )
    )


if __name__ == "__main__":
    main()
