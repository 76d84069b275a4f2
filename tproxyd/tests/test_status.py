"""The words for what a listener does: in the log, in /status, on the screen."""

from __future__ import annotations

import pytest

from tproxyd.addr import Endpoint, PrefixSet, parse_prefix
from tproxyd.config import Intercept, Listener, Scope, Via
from tproxyd.proc import status
from tproxyd.proc.picture import Address, Entry, Health

TEN = PrefixSet((parse_prefix("10.0.0.0/8"),))
HERE = PrefixSet((parse_prefix("127.0.0.0/8"), parse_prefix("::1")))


@pytest.mark.parametrize(
    ("intercept", "said"),
    [
        (Intercept(), "every port but 15020-15021, 15090"),
        (
            Intercept(ports=((80, 80), (8000, 8010)), exclude_ports=(), sources=TEN),
            "ports 80, 8000-8010; from 10.0.0.0/8",
        ),
        (Intercept(via=Via.REDIRECT, exclude_ports=()), "every port; by redirect"),
        (
            Intercept(
                scope=Scope.FORWARD,
                exclude_ports=((22, 22),),
                destinations=TEN,
                exclude_destinations=HERE,
                interfaces=("eth0", "veth*"),
            ),
            (
                "forwarded, every port but 22; to 10.0.0.0/8; not to 127.0.0.0/8, ::1/128;"
                " arriving on eth0, veth*"
            ),
        ),
        (
            Intercept(
                scope=Scope.OUTBOUND,
                via=Via.REDIRECT,
                exclude_ports=(),
                exclude_uids=(0, 1337),
                exclude_gids=(1337,),
            ),
            "outbound, every port; not of uid 0, 1337; not of gid 1337",
        ),
    ],
)
def test_what_a_listener_takes(intercept: Intercept, said: str) -> None:
    assert status.describe(intercept) == said
    assert status.listener_part(Listener(intercept=intercept), [], ())["intercept"] == said


APP, SIX = Endpoint("app.example", 80), Endpoint("fd00::5", 80)


@pytest.mark.parametrize(
    ("listener", "said"),
    [
        (
            Listener(intercept=Intercept(ports=((80, 80),), exclude_ports=())),
            "inbound listens on port 15006 (IPv4 and IPv6) for ports 80",
        ),
        (
            Listener(intercept=Intercept(ports=((80, 80),), exclude_ports=()), upstream=(APP, SIX)),
            (
                "inbound listens on port 15006 (IPv4 and IPv6) for ports 80,"
                " upstream app.example:80, [fd00::5]:80"
            ),
        ),
        (
            Listener(name="web", bind="0.0.0.0", port=8000, upstream=(APP, Endpoint("/run/x", 0))),
            "web listens on 0.0.0.0:8000 for app.example:80, unix:/run/x",
        ),
        (
            Listener(name="web", bind="::1", port=8000, upstream=(APP,)),
            "web listens on [::1]:8000 for app.example:80",
        ),
    ],
)
def test_the_line_at_the_start(listener: Listener, said: str) -> None:
    assert status.introduce(listener, ["IPv4", "IPv6"]) == said


def test_the_part_of_an_ordinary_listener() -> None:
    listener = Listener(name="web", bind="*", port=8000, upstream=(APP,))
    entry = Entry(APP, (Address(SIX, Health.DOWN, "connection refused"),), "gone")
    assert status.listener_part(listener, ["IPv6"], (entry,)) == {
        "name": "web",
        "bind": "*",
        "port": 8000,
        "families": ["IPv6"],
        "intercept": "",
        "upstreams": [
            {
                "upstream": "app.example:80",
                "addresses": [
                    {"address": "[fd00::5]:80", "health": "down", "why": "connection refused"}
                ],
                "error": "gone",
            }
        ],
    }
