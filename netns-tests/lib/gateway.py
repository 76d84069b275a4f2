"""A gateway in one line: the configuration of an ordinary listener in front of a few upstreams.

And for the usual one, in the pod, with its backend in the neighbour's namespace, what is needed.
"""

from __future__ import annotations

import json
import socket

from lib.topology import PORT, Family, Pair, Topology

GATEWAY_PORT = 8000


def gateway(*upstreams: str, **options: object) -> str:
    """One [[listener]] over both families; several of them may follow each other.

    The options are the listener's own, a table being a dict, an array of tables a list of those.
    """
    settings = {
        "name": "web",
        "bind": "*",
        "port": GATEWAY_PORT,
        "upstream": list(upstreams),
        **options,
    }
    return "[[listener]]\n" + "".join(f"{key} = {toml(each)}\n" for key, each in settings.items())


def to_neighbour(family: Family, *upstreams: str, **options: object) -> str:
    """A gateway whose one upstream is the neighbour, unless others are given."""
    return gateway(*(upstreams or (at(family.beyond),)), **options)


def trusting(*peers: str, policy: str = "require") -> list[dict[str, object]]:
    """What `proxy_protocol` of a listener has to be for these peers to speak for others."""
    return [{"from": list(peers), "policy": policy}]


def toml(value: object) -> str:
    """A value as TOML writes it on one line: as JSON does, but for tables."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


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
