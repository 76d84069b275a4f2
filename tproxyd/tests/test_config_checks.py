"""What only makes sense across the values of a configuration."""

from __future__ import annotations

import pytest

from tproxyd.configfile import parse
from tproxyd.tests.test_config import problems


@pytest.mark.parametrize(
    ("bind", "upstream", "loops"),
    [
        ("127.0.0.1", "127.0.0.1:8080", True),
        ("*", "127.0.0.1:8080", True),
        ("::", "[::1]:8080", True),
        ("*", "127.0.0.1:15006", True),  # where the other listener intercepts
        ("127.0.0.1", "127.0.0.2:8080", False),
        ("0.0.0.0", "[::1]:8080", False),
        ("*", "127.0.0.1:8081", False),
        ("*", "app.example:8080", False),
        ("*", "10.0.0.1:8080", False),  # whose that is only the host knows
    ],
)
def test_an_upstream_that_is_our_own_listener(bind: str, upstream: str, loops: bool) -> None:
    text = f'''
    [[listener]]
    [[listener]]
    name = "web"
    bind = "{bind}"
    port = 8080
    source = "proxy"
    upstream = ["{upstream}"]
    '''
    if not loops:
        parse(text, "x")
        return
    j = 0 if "15006" in upstream else 1
    why = f'"{upstream}" is listener[{j}] itself: it would be called by us, for ever'
    assert problems(text) == {"listener[1].upstream": why}


def test_a_second_listener_needs_a_name_and_a_port_of_its_own() -> None:
    assert problems("[[listener]]\n[[listener]]") == {
        "listener[1].name": '"inbound" is also the name of listener[0]',
        "listener[1].port": "15006 is also the port of listener[0]",
    }


# What the first match leaves ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ports", "but"),
    [
        ("ports = [80], exclude_ports = [80]", "80"),
        ('ports = [80, 443], exclude_ports = ["1-100", 443]', "1-100, 443"),
        ('exclude_ports = "*"', "1-65535"),
        ("ports = [15020]", "15020-15021, 15090"),  # the default ones
    ],
)
def test_ports_that_are_all_excluded(ports: str, but: str) -> None:
    why = f"all of them are in exclude_ports ({but}), so nothing would be taken"
    assert problems(f"[[listener]]\nintercept = {{ {ports} }}") == {
        "listener[0].intercept.ports": why
    }


SEVERAL = """
[[listener]]
name = "a"
intercept = {{ {} }}
[[listener]]
name = "b"
port = 2
intercept = {{ {} }}
"""


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("ports = [80, 443]", "ports = [80]"),
        ("", "ports = [80]"),
        ("", ""),
        ("", 'ports = ["15000-16000"]'),  # both leave Istio's ports out
        ("ports = [80]", 'ports = ["80-81"], exclude_ports = [81]'),
        ("ports = [80]", 'ports = [80], sources = ["10.0.0.0/8"]'),
        ('sources = ["10.0.0.0/9", "10.128.0.0/9"]', 'sources = ["10.0.0.0/8"]'),
        ('destinations = ["10.0.0.0/8", "fd00::/8"]', 'destinations = ["10.1.0.1", "fd00::1"]'),
        (
            'exclude_destinations = ["10.1.0.0/16"]',
            'exclude_destinations = ["10.0.0.0/8"]',
        ),
        ('interfaces = ["eth0", "eth1"]', 'interfaces = ["eth1"]'),
        ('via = "redirect"', ""),
        (
            'scope = "outbound", exclude_uids = [1]',
            'scope = "outbound", exclude_uids = [1, 2]',
        ),
    ],
)
def test_a_listener_behind_one_that_takes_it_all(first: str, then: str) -> None:
    why = "listener[0], which comes first, takes all of that"
    assert problems(SEVERAL.format(first, then)) == {"listener[1].intercept": why}


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("ports = [80]", "ports = [80, 443]"),
        ("", "exclude_ports = []"),
        ("ports = [80], exclude_ports = []", 'ports = ["80-81"]'),
        ('sources = ["10.0.0.0/8"]', ""),
        ('sources = ["10.0.0.0/8"]', 'sources = ["10.0.0.0/8", "fd00::/8"]'),
        ('destinations = ["10.1.0.0/16"]', 'destinations = ["10.0.0.0/8"]'),
        ('exclude_destinations = ["10.0.0.0/8"]', ""),
        ('exclude_destinations = ["10.0.0.0/8"]', 'exclude_destinations = ["10.1.0.0/16"]'),
        ('interfaces = ["eth0"]', ""),
        ('interfaces = ["eth0"]', 'interfaces = ["eth0", "eth1"]'),
        ('scope = "outbound", exclude_uids = [1]', 'scope = "outbound"'),
        ("", 'scope = "forward"'),
    ],
)
def test_a_listener_that_something_is_left_for(first: str, then: str) -> None:
    assert len(parse(SEVERAL.format(first, then), "x").listeners) == 2


ENTRIES = """
[[listener]]
[[listener.proxy_protocol]]
from = {}
policy = "optional"
[[listener.proxy_protocol]]
from = {}
policy = "{}"
"""


def test_a_peer_that_an_earlier_entry_judges() -> None:
    text = ENTRIES.format('["10.0.0.0/8"]', '["10.1.0.0/16", "11.0.0.0/8"]', "require")
    path = "listener[0].proxy_protocol"
    why = f"{path}[0], which comes first, has optional for 10.1.0.0/16"
    assert problems(text) == {f"{path}[1].from": why}


@pytest.mark.parametrize(
    ("first", "then", "policy"),
    [
        ('["10.1.0.0/16"]', '["10.0.0.0/8"]', "require"),
        ('["10.0.0.0/8"]', '["fd00::/8"]', "require"),
        ('["10.0.0.0/8"]', '["10.1.0.0/16"]', "optional"),  # said twice is said
        ("[]", '["10.1.0.0/16"]', "require"),
    ],
)
def test_a_peer_that_no_earlier_entry_judges(first: str, then: str, policy: str) -> None:
    (listener,) = parse(ENTRIES.format(first, then, policy), "x").listeners
    assert len(listener.proxy_protocol) == 2


def test_upstreams_that_are_all_wrong_are_upstreams() -> None:
    text = '[[listener]]\nbind = "*"\nport = 80\nbalance = "source-hash"\nupstream = ["a"]\n'
    assert list(problems(text)) == ["listener[0].upstream[0]"]


@pytest.mark.parametrize("path", ["var/log/x", "./x", "../x", "stdout"])
def test_the_access_log_has_a_path_from_the_root(path: str) -> None:
    (why,) = problems(f'log.access = "{path}"').values()
    assert why.startswith(f'"{path}" is neither "-", "journal" nor a path from /')
