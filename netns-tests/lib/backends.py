"""Who holds the packet rules, in tests that are to pass whoever it is."""

from __future__ import annotations

import importlib.util
import re

import pytest

from lib.netns import Namespace

needs_iptc = pytest.mark.skipif(
    importlib.util.find_spec("iptc") is None,
    reason="needs python-iptables; try: pip install python-iptables",
)
BACKENDS = ["nft", "iptables-nft", pytest.param("iptables-legacy", marks=needs_iptc)]


def rules(backend: str, scheme: str = "lean") -> str:
    """The part of a configuration."""
    return f'[rules]\nbackend = "{backend}"\nscheme = "{scheme}"\n'


def dump(namespace: Namespace) -> str:
    """Everything the kernel holds there that tproxyd could change, legacy tables too.

    Without what counts packets, and the hour. Legacy tables that exist and are empty are left out:
    nothing takes one away again.
    """
    parts = [namespace.dump()]
    for command in ("iptables-legacy-save", "ip6tables-legacy-save"):
        lines = [
            re.sub(r"\[\d+:\d+\]", "", line)
            for line in namespace.run(command).splitlines()
            if not line.startswith("#")
        ]
        tables = re.findall(r"^(\*.*?)^COMMIT", "".join(f"{x}\n" for x in lines), re.S | re.M)
        kept = [table for table in tables if not _is_empty(table)]
        parts.append(f"$ {command}\n{''.join(kept)}")
    return re.sub(r"counter packets \d+ bytes \d+", "counter", "\n".join(parts))


def _is_empty(table: str) -> bool:
    return all(
        line.startswith("*") or line.split()[1:] == ["ACCEPT"] for line in table.splitlines()
    )
