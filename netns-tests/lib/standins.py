"""The sockets of the daemon, made by hand: for tests of what the kernel does with their packets."""

from __future__ import annotations

import socket

from lib.topology import Family, Topology
from tproxyd import linux


def transparent(net: Topology, family: Family, mark: int = 0) -> socket.socket:
    """A TCP socket of the pod that may have anybody's address."""
    sock = net.keep(net.pod.open_socket(af(family)))
    if family.name == "v4":
        sock.setsockopt(socket.SOL_IP, linux.IP_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, linux.IPV6_TRANSPARENT, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, linux.SO_MARK, mark)
    return sock


def listen(net: Topology, family: Family, port: int, mark: int = 0) -> socket.socket:
    """Our listening socket."""
    listener = transparent(net, family, mark)
    listener.bind(("" if family.name == "v4" else "::", port))
    listener.listen()
    return listener


def accept(net: Topology, listener: socket.socket) -> socket.socket:
    """Our end of the next connection."""
    sock = net.keep(listener.accept()[0])
    sock.settimeout(listener.gettimeout())
    return sock


def dial_as(
    net: Topology, family: Family, source: tuple[str, int], to: tuple[str, int], mark: int = 0
) -> socket.socket:
    """Our connection to `to` with that source address."""
    sock = transparent(net, family, mark)
    sock.bind(source)
    sock.connect(to)
    return sock


def af(family: Family) -> socket.AddressFamily:
    return socket.AF_INET if family.name == "v4" else socket.AF_INET6
