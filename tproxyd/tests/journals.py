"""A journal for tests: systemd's native protocol, read strictly."""

from __future__ import annotations

import array
import fcntl
import os
import re
import socket
import struct
from pathlib import Path

Entry = dict[str, list[str]]  # a field may be there several times

SEALED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def parse(data: bytes) -> Entry:
    """As journald-native.c does; a field that it would ignore fails here."""
    fields: Entry = {}
    while data:
        line, newline, rest = data.partition(b"\n")
        assert newline, f"an entry that ends in the middle of {line[:50]!r}"
        key, equals, value = line.partition(b"=")
        if not equals:
            size = struct.unpack("<Q", rest[:8])[0]
            value, rest = rest[8 : 8 + size], rest[8 + size :]
            assert len(value) == size, "a value that is shorter than it says"
            assert rest[:1] == b"\n", "a value without its newline"
            rest = rest[1:]
        assert re.fullmatch(rb"[A-Z][A-Z0-9_]{0,63}", key), key
        fields.setdefault(key.decode(), []).append(value.decode())
        data = rest
    return fields


class Journal:
    """Listens at `path`, as journald at /run/systemd/journal/socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.sock.bind(str(path))
        path.chmod(0o666)
        self.in_files = 0

    def read(self) -> list[Entry]:
        """The entries that have come."""
        entries: list[Entry] = []
        while True:
            try:
                data, controls, _, _ = self.sock.recvmsg(1 << 20, socket.CMSG_SPACE(4))
            except BlockingIOError:
                return entries
            for _, _, raw in controls:
                (fd,) = array.array("i", raw)
                assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == SEALED
                assert not data
                data = os.pread(fd, 1 << 24, 0)
                os.close(fd)
                self.in_files += 1
            entries.append(parse(data))

    def close(self) -> None:
        self.sock.close()
        self.path.unlink()
