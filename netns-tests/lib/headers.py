"""PROXY headers as a load balancer writes them, straight from the specification.

Not tproxyd's own encoder on purpose: a mistake made in both directions would cancel out.
"""

from __future__ import annotations

import ipaddress
import struct

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def v1(
    source: str, destination: str, source_port: int = 40_000, destination_port: int = 80
) -> bytes:
    family = "TCP6" if ":" in source else "TCP4"
    return f"PROXY {family} {source} {destination} {source_port} {destination_port}\r\n".encode()


def v2(
    source: str,
    destination: str,
    source_port: int = 40_000,
    destination_port: int = 80,
    tlvs: bytes = b"",
) -> bytes:
    hosts = [ipaddress.ip_address(host).packed for host in (source, destination)]
    family = 0x21 if ":" in source else 0x11  # AF_INET6 or AF_INET, over STREAM
    block = b"".join(hosts) + struct.pack("!HH", source_port, destination_port) + tlvs
    return SIGNATURE + struct.pack("!BBH", 0x21, family, len(block)) + block


V1_UNKNOWN = b"PROXY UNKNOWN\r\n"
V2_LOCAL = SIGNATURE + struct.pack("!BBH", 0x20, 0, 0)
