"""A daemon as a test hears it: what its processes write to a pipe, and what its admin port says."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

PATIENCE_S = 10.0


def patience(what: str) -> Iterator[None]:
    """For a loop that waits for a state: `next` of it fails when that takes too long."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        yield
        os.sched_yield()
    raise AssertionError(f"not within {PATIENCE_S} s: {what}")


class Talker:
    """`stderr` is the reading end of a pipe that all its processes write to.

    Waiting for a line is waiting for a state; its end means that every process is gone.
    """

    stderr: int
    admin_port: int

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._unread = b""

    def wait_line(self, pattern: str) -> str:
        """The next line of any of its processes that matches; those before it are read over."""
        for line in self._read():
            if re.search(pattern, line):
                return line
        raise AssertionError(f"ended without {pattern!r}:\n" + "\n".join(self.lines))

    def rest(self) -> list[str]:
        """What is said until every process is gone."""
        return list(self._read())

    def _read(self) -> Iterator[str]:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            while b"\n" in self._unread:
                line, _, self._unread = self._unread.partition(b"\n")
                self.lines.append(line.decode())
                yield self.lines[-1]
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.stderr], (), (), max(0, left))
            assert ready, f"no such line in {PATIENCE_S} s:\n" + "\n".join(self.lines)
            data = os.read(self.stderr, 65536)
            if not data:
                return
            self._unread += data

    def get(self, path: str, port: int = 0) -> tuple[int, str]:
        where = ("127.0.0.1", port or self.admin_port)
        with socket.create_connection(where, timeout=PATIENCE_S) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
            answer = b"".join(iter(lambda: client.recv(65536), b"")).decode()
        head, _, body = answer.partition("\r\n\r\n")
        return int(head.split()[1]), body

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.get("/status")[1]))

    def metric(self, name: str) -> float:
        (line,) = re.findall(rf"^{re.escape(name)} (.*)$", self.get("/metrics")[1], re.MULTILINE)
        return float(line)
