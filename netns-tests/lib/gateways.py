"""A gateway in the pod: an ordinary listener, and its backend in the neighbour's namespace."""

from __future__ import annotations

import socket

from lib.topology import PORT, Family, Pair, Topology

GATEWAY_PORT = 8000


def gateway(family: Family, *upstreams: str, **options: object) -> str:
    """A listener in the pod; by default its one upstream is the neighbour."""
    listed = upstreams or (at(family.beyond),)
    lines = [
        "[[listener]]",
        'name = "web"',
        'bind = "*"',
        f"port = {GATEWAY_PORT}",
        f"upstream = {list(listed)}",
        *(f"{key} = {value!r}" for key, value in options.items()),
    ]
    return "\n".join(lines) + "\n"


def at(host: str, port: int = PORT) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def backend(net: Topology, family: Family, port: int = PORT) -> socket.socket:
    return net.keep(net.beyond.listen(family.beyond, port))


def through(net: Topology, family: Family, server: socket.socket, source_port: int = 0) -> Pair:
    client = net.connect(family, GATEWAY_PORT, source_port=source_port)
    return Pair(client, net.keep(server.accept()[0]))


def end(pair: Pair) -> None:
    """In order."""
    pair.client.close()
    assert pair.app.recv(1) == b""
    pair.app.close()
