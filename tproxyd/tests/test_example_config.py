"""The example file shows every setting there is, each with its default."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tproxyd.config import Config, HealthCheck, Intercept, Listener, Log, PerClient, Rules, SendTlvs
from tproxyd.configfile import parse

PATH = Path(__file__).resolve().parents[2] / "systemd" / "tproxyd.toml"
TEXT = PATH.read_text()
GATEWAY = TEXT[TEXT.index("# [[listener]]") :]
EXAMPLE_ENTRY = TEXT[TEXT.index("# [[listener.proxy_protocol]]") : TEXT.index("# A gateway: ")]


def test_it_equals_the_defaults() -> None:
    assert parse(TEXT, str(PATH)) == Config()


@pytest.mark.parametrize(
    ("table", "of"),
    [
        ("", Config),
        ("[rules]", Rules),
        ("[log]", Log),
        ("[[listener]]", Listener),
        ("[listener.intercept]", Intercept),
        ("[listener.health_check]", HealthCheck),
        ("[listener.per_client]", PerClient),
        ("[listener.send_tlvs]", SendTlvs),
    ],
)
def test_every_setting_is_shown(table: str, of: type) -> None:
    section = TEXT if not table else TEXT[TEXT.index(f"\n{table}\n") + len(table) + 2 :]
    section = re.split(r"^\[", section, maxsplit=1, flags=re.MULTILINE)[0]
    shown = set(re.findall(r"^(\w+) = ", section, flags=re.MULTILINE))
    tables = {"rules", "log", "listeners", "intercept", "send_tlvs", "proxy_protocol"}
    tables |= {"health_check", "per_client"}
    assert shown == {field.name for field in dataclasses.fields(of)} - tables


def test_the_entry_that_is_commented_out_is_valid() -> None:
    entry = re.sub(r"^# ?", "", EXAMPLE_ENTRY, flags=re.MULTILINE)
    config = parse(TEXT + entry, str(PATH))
    (peers,) = config.listeners[0].proxy_protocol
    assert "172.17.0.54" in peers.peers


def test_the_gateway_that_is_commented_out_is_valid() -> None:
    _, gateway = parse(TEXT + re.sub(r"^# ?", "", GATEWAY, flags=re.MULTILINE), "x").listeners
    assert gateway.bind == "*"
    assert len(gateway.upstream) == 2
