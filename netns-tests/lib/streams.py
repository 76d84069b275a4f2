"""What tests do with the two ends of a connection."""

from __future__ import annotations

import hashlib
import os
import select
import socket
import struct
import threading

from lib.netns import SOCKET_TIMEOUT_S
from lib.topology import Pair


def receive(sock: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes."""
    data = bytearray()
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        assert chunk, f"end of stream after {bytes(data)!r}, expected {count} bytes"
        data += chunk
    return bytes(data)


def receive_to_end(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(1 << 18), b""))


def assert_talks(pair: Pair) -> None:
    """Both directions carry bytes now."""
    there, back = os.urandom(32), os.urandom(32)
    pair.client.sendall(there)
    assert receive(pair.app, 32) == there
    pair.app.sendall(back)
    assert receive(pair.client, 32) == back


def reset(sock: socket.socket) -> None:
    """RST at once: SO_LINGER with a time of 0 makes close(2) abort the connection."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def was_reset(sock: socket.socket) -> bool:
    """Whether this end meets RST (True) or FIN (False) once what was sent before is read."""
    try:
        receive_to_end(sock)
    except ConnectionResetError:
        return True
    return False


class Sending(threading.Thread):
    """`data` sent to its end, and then FIN, while the test reads the other end."""

    def __init__(self, sock: socket.socket, data: bytes) -> None:
        super().__init__(daemon=True)
        self.sock, self.data = sock, data
        self.error: OSError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.sock.sendall(self.data)
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.error = error

    def assert_done(self) -> None:
        self.join(10)
        assert not self.is_alive()
        assert self.error is None, self.error


def pattern(size: int) -> bytes:
    """`size` bytes in which every place is recognisable, so that a lost or doubled one shows."""
    return hashlib.shake_256(b"tproxyd").digest(size)


class Receiving(threading.Thread):
    """Everything up to FIN, read while the test does something else."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self.sock = sock
        self.data: bytes | OSError = b""
        self.start()

    def run(self) -> None:
        try:
            self.data = receive_to_end(self.sock)
        except OSError as error:
            self.data = error

    def result(self) -> bytes:
        self.join(10)
        assert not self.is_alive()
        assert isinstance(self.data, bytes), self.data
        return self.data


def fill(sock: socket.socket, data: bytes, quiet_s: float = 1.0) -> int:
    """Send from `data` until nothing more has fitted for `quiet_s`; how much that was."""
    sock.setblocking(False)
    sent = 0
    with memoryview(data) as view:
        while sent < len(data) and select.select([], [sock], [], quiet_s)[1]:
            sent += sock.send(view[sent : sent + (1 << 18)])
    sock.settimeout(SOCKET_TIMEOUT_S)
    return sent
