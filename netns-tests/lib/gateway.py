"""A gateway in one line: the configuration of an ordinary listener in front of a few upstreams."""

from __future__ import annotations

import json

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
