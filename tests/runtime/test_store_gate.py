"""The gate to the rendezvous store: who is let through, and what is left of it."""

import hmac
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from roll_sft.runtime.store_gate import CHALLENGE_BYTES, Gate, gate_to, port_behind

TEXT = b"x" * 200_000  # more than is copied at once


@pytest.fixture
def store() -> Iterator[int]:
    """The port of a server that sends back what it is sent."""

    def serve(listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    def echo(connection: socket.socket) -> None:
        with connection:
            while part := connection.recv(1 << 16):
                connection.sendall(part)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        yield listening.getsockname()[1]


def received(connection: socket.socket, length: int) -> bytes:
    content = b""
    while len(content) < length and (part := connection.recv(1 << 16)):
        content += part
    return content


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def answer_of(gate: Gate, secret: str) -> bytes:
    """What a stranger reads after it has answered with `secret` and sent a text."""
    with connected(gate.port) as stranger:
        challenge = received(stranger, CHALLENGE_BYTES)
        stranger.sendall(hmac.digest(bytes.fromhex(secret), challenge, "sha256") + b"text")
        stranger.shutdown(socket.SHUT_WR)
        try:
            return received(stranger, 4)
        except ConnectionResetError:  # closed with the text unread
            return b""


def test_who_has_the_secret_reaches_the_store_and_nobody_else_does(store: int) -> None:
    with gate_to(store, host="127.0.0.1") as gate:
        with port_behind(gate) as port, connected(port) as first, connected(port) as second:
            for rank in (first, second):
                threading.Thread(target=rank.sendall, args=(TEXT,), daemon=True).start()
                assert received(rank, len(TEXT)) == TEXT
        assert answer_of(gate, gate.secret) == b"text"
        assert answer_of(gate, "00" * 32) == b""
        wrong = replace(gate, secret="00" * 32)
        with port_behind(wrong) as port, connected(port) as rank:
            assert received(rank, 1) == b""
        assert answer_of(gate, gate.secret) == b"text", "the gate still serves"
    assert gate.secret not in repr(gate)


def test_the_secret_is_on_no_command_line_and_no_process_is_left(store: int) -> None:
    with gate_to(store, host="127.0.0.1") as gate, port_behind(gate):
        # Ended children of other tests, which nobody waits for any more, have no command line.
        programs = [
            each for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE
        ]
        started = [each for each in programs if "store_gate.py" in " ".join(each.cmdline())]
        assert len(started) == 2
        for each in started:
            assert gate.secret not in f"{each.cmdline()} {each.environ()}"
    assert psutil.wait_procs(started, timeout=30)[1] == []
