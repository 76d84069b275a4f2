"""What the soak's client and application say to each other, so that every byte can be judged.

A connection begins with a Hello: who the client is, and how many bytes go each way. Those are cut
from one long block without a period, beginning where the connection's number says: a byte that is
lost, doubled, or of another connection is seen at once, and nobody has to remember what was sent.
"""

from __future__ import annotations

import hashlib
import ipaddress
import struct
from enum import IntEnum
from typing import NamedTuple

_PERIOD = 1_048_573  # a prime, so that no power of two in a buffer's size hides a shift
_BLOCK = hashlib.shake_256(b"soak").digest(_PERIOD)
_TWICE = memoryview(_BLOCK + _BLOCK)
LONGEST = 1 << 16  # of a piece

PORT = 80
# One of those that the default configuration leaves alone: what connections cost without a proxy.
DIRECT_PORT = 15021
MAGIC = b"SOAK"
_HELLO = struct.Struct(">4sBIQQ16sH")
HELLO_SIZE = _HELLO.size


class Kind(IntEnum):
    CLIENT_FIRST = 0  # the client finishes first, then the application answers
    APP_FIRST = 1  # the application finishes first
    ECHO = 2  # what the client says comes back, until it finishes
    ABORT = 3  # the client resets before it has sent all


class Hello(NamedTuple):
    kind: Kind
    number: int
    up: int  # bytes from the client
    down: int  # and to it
    source: str  # whom the application should see
    port: int  # of the client's own socket: it should not see that one

    def encode(self) -> bytes:
        ip = ipaddress.ip_address(self.source)
        packed = ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed
        return _HELLO.pack(MAGIC, self.kind, self.number, self.up, self.down, packed, self.port)

    @classmethod
    def decode(cls, data: bytes) -> Hello:
        """ValueError when that is none."""
        magic, kind, number, up, down, packed, port = _HELLO.unpack(data)
        if magic != MAGIC:
            raise ValueError(f"{data!r} is no hello")
        ip = ipaddress.IPv6Address(packed)
        return cls(Kind(kind), number, up, down, str(ip.ipv4_mapped or ip), port)


class Stream:
    """One direction of a connection: its next bytes."""

    def __init__(self, number: int, *, up: bool) -> None:
        self.at = (number * 2_654_435_761 + 104_729 * up) % _PERIOD
        self.done = 0

    def take(self, size: int) -> memoryview:
        """The next `size` bytes, LONGEST at most."""
        piece = _TWICE[self.at : self.at + size]
        self.at = (self.at + size) % _PERIOD
        self.done += size
        return piece

    def is_next(self, data: bytes) -> bool:
        return self.take(len(data)) == data
