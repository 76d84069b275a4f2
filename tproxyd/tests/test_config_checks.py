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
