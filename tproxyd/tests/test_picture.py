"""The facts about upstreams, the picture that workers get of them, and the log."""

from __future__ import annotations

import itertools

import pytest

from tproxyd.addr import Endpoint
from tproxyd.config import Config, HealthCheck, Listener
from tproxyd.proc import picture
from tproxyd.proc.picture import NOT_YET, Address, Entry, Facts, Health

APP = Endpoint("app.example", 80)
ONE, TWO, SIX = Endpoint("127.0.0.1", 80), Endpoint("127.0.0.2", 80), Endpoint("::1", 80)
UNIX = Endpoint("/run/app.sock", 0)


def config(*upstream: Endpoint, **settings: object) -> Config:
    return Config(listeners=(Listener(upstream=upstream, **settings),))  # type: ignore[arg-type]


# The picture --------------------------------------------------------------------------------------


def test_what_the_configuration_alone_says() -> None:
    three = Config(
        listeners=(Listener(), Listener(upstream=(ONE, UNIX)), Listener(upstream=(SIX,)))
    )
    facts = picture.initial(three)
    assert facts.complete
    assert picture.picture(facts) == {1: (ONE, UNIX), 2: (SIX,)}


@pytest.mark.parametrize(
    "open_", [config(ONE, APP), config(ONE, health_check=HealthCheck(interval_s=1.0))]
)
def test_a_name_or_a_check_leaves_something_to_find_out(open_: Config) -> None:
    facts = picture.initial(open_)
    assert not facts.complete
    assert picture.picture(facts) == {0: (ONE,)}


def test_each_address_once_in_the_configured_order_and_none_that_is_down() -> None:
    entries = (
        Entry(APP, (Address(TWO, Health.UP), Address(ONE, Health.DOWN, "x"), Address(SIX))),
        Entry(TWO, (Address(TWO, Health.UP),)),
        Entry(UNIX, (Address(UNIX, Health.UP),)),
    )
    assert picture.picture(Facts({3: entries})) == {3: (TWO, SIX, UNIX)}


def test_facts_travel_as_one_line() -> None:
    facts = Facts(
        {
            0: (Entry(APP, (Address(TWO, Health.DOWN, "no\nanswer"), Address(SIX)), "gone"),),
            2: (Entry(UNIX, (Address(UNIX, Health.UP),)),),
        },
        {0: 3, 2: 0},
        complete=False,
    )
    line = picture.encode(facts)
    assert "\n" not in line
    assert picture.decode(line.encode()) == facts


def test_the_word_for_workers() -> None:
    told = picture.word({0: (ONE, SIX), 3: (UNIX,), 4: ()})
    assert told == (
        'upstreams {"0":[["127.0.0.1",80],["::1",80]],"3":[["/run/app.sock",0]],"4":[]}'
    )


def story(*facts: Facts) -> list[str]:
    """What the log says while these follow one another."""
    return [
        f"{'!' if bad else ' '} {text}"
        for before, after in itertools.pairwise(facts)
        for bad, text in picture.changes(["web"], before, after)
    ]


def entry(error: str = "", *addresses: Address) -> Facts:
    return Facts({0: (Entry(APP, addresses, error),)})


def test_the_log_of_a_name() -> None:
    assert story(
        entry(NOT_YET),
        entry("gone"),
        entry("gone in another way"),
        entry("", Address(ONE), Address(TWO)),
        entry("gone", Address(ONE), Address(TWO)),
        entry("", Address(TWO)),
    ) == [
        "! web: app.example can't be resolved: gone; connections are refused until it can",
        "  web: app.example is resolved again: 127.0.0.1, 127.0.0.2",
        "! web: app.example can't be resolved: gone; the last answer stays",
        "  web: app.example is resolved again: 127.0.0.2",
    ]
    assert story(entry(NOT_YET), entry("", Address(ONE))) == []


def test_a_name_twice_is_one_line_and_others_serve() -> None:
    def both(error: str) -> Facts:
        other = Endpoint(APP.host, 81)
        return Facts({0: (Entry(APP, (), error), Entry(other, (), error), Entry(ONE, (up(ONE),)))})

    assert story(both(NOT_YET), both("gone")) == [
        "! web: app.example can't be resolved: gone; the other upstreams serve until it can"
    ]


def up(where: Endpoint) -> Address:
    return Address(where, Health.UP)


def test_the_log_of_checks() -> None:
    def facts(of_one: Address, of_two: Address) -> Facts:
        return Facts({0: (Entry(ONE, (of_one,)), Entry(APP, (of_two,)))})

    assert story(
        facts(Address(ONE), Address(TWO)),
        facts(up(ONE), Address(TWO, Health.DOWN, "refused")),
        facts(up(ONE), Address(TWO, Health.DOWN, "silent")),
        facts(Address(ONE, Health.DOWN, "refused"), Address(TWO, Health.DOWN, "silent")),
        facts(up(ONE), Address(TWO, Health.DOWN, "silent")),
    ) == [
        "! web: 127.0.0.2:80 of app.example:80 is down: refused",
        "! web: 127.0.0.1:80 is down: refused",
        "! web: no upstream is left; its connections are refused",
        "  web: 127.0.0.1:80 is up again",
    ]
