"""The status page as a browser shows it: it lives, it says what is wrong, its console stays empty.

The daemon runs without --install beside `tproxyd install`: what the test breaks nobody repairs but
the test.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator

import pytest
from lib.browser import Browser, missing
from lib.daemon import ADMIN_PORT, Daemon, tproxyd
from lib.streams import receive
from lib.topology import Topology
from lib.waits import wait_for

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

PAGE = f"http://127.0.0.1:{ADMIN_PORT}/"
# A browser that shares the machine: what takes it a second here may take many elsewhere.
PATIENCE_S = 40.0


@pytest.fixture
def daemon(net: Topology) -> Iterator[Daemon]:
    with Daemon(net.pod, install=False) as daemon:
        assert tproxyd(net.pod, "install").returncode == 0
        yield daemon


@pytest.fixture
def browser(net: Topology) -> Iterator[Browser]:
    with Browser(net.pod) as browser:
        yield browser


def wait_says(browser: Browser, selector: str, pattern: str) -> str:
    text = ""

    def says() -> bool:
        nonlocal text
        text = browser.text(selector)
        return re.search(pattern, text) is not None

    try:
        wait_for(says, f"{selector} to say {pattern!r}", PATIENCE_S)
    except AssertionError as error:
        error.add_note(f"it says {text!r}")
        raise
    return text


def verdict(browser: Browser) -> str:
    return str(browser.run("return document.querySelector('#verdict').className"))


class Load:
    """Short connections, one after the other, and one that stays."""

    def __init__(self, net: Topology) -> None:
        self._net, self._stop = net, threading.Event()
        self._listener = net.app()
        self._thread = threading.Thread(target=self._run)
        self.stays = net.pair()

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._net.client.connect("10.9.1.1", 80) as client:
                with self._listener.accept()[0] as app:
                    client.sendall(b"x" * 10_000)
                    receive(app, 10_000)
                assert client.recv(1) == b""
            self._stop.wait(0.02)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_the_page_lives(net: Topology, daemon: Daemon, browser: Browser) -> None:
    browser.open(PAGE)
    wait_says(browser, "#headline", "^Ready; no traffic right now$")
    assert verdict(browser) == "good"
    assert browser.text("#count") == "0"
    with Load(net) as load:
        wait_says(browser, "#headline", "^Traffic flows, the kernel state stands$")
        wait_says(browser, "#traffic", r"^[1-9].* new/s, .*B/s$")
        first = wait_says(browser, "#ends", r"(downstream|upstream)_fin\s+\d+")
        wait_for(lambda: browser.text("#ends") != first, "the numbers to move", PATIENCE_S)
        # The new connections of each second, as the chart has them.
        wait_for(
            lambda: browser.run("return past.connections.some(each => each > 1)"),
            "the chart to rise",
            PATIENCE_S,
        )
        assert browser.run("return charts[0].onePath.getAttribute('d').includes('L')")
        host, port = load.stays.client.getsockname()
        wait_says(browser, "#rows", rf"{re.escape(host)}:{port}\b")
        browser.click("#columns th[data-key=age] button")
        # The oldest, which is the one that stays.
        wait_says(browser, "#rows tr:first-child", rf"{re.escape(host)}:{port}\b")
        assert browser.run("return document.querySelector('#columns [data-key=age]').ariaSort") == (
            "descending"
        )
    wait_says(browser, "#headline", "^Ready; no traffic right now$")
    assert daemon.get("/livez")[0] == 200
    assert browser.console() == []


def test_the_charts_are_full_at_once(net: Topology, daemon: Daemon, browser: Browser) -> None:
    """What was before the page was opened is there; the daemon keeps it, not the page."""

    def is_some() -> bool:
        past = json.loads(daemon.get("/history")[1])
        return bool(past["last"] >= 4 and max(past["connections"]) > 0)

    with Load(net):
        wait_for(is_some, "some history", PATIENCE_S)
    browser.open(PAGE)
    assert wait_for(lambda: browser.run("return past.open.length"), "history", PATIENCE_S) >= 3
    assert browser.run("return Math.max(...past.connections)") > 0
    assert browser.console() == []


def test_drift_turns_it_red_and_healing_green(
    net: Topology, daemon: Daemon, browser: Browser
) -> None:
    browser.open(PAGE)
    wait_for(lambda: verdict(browser) == "good", "a green verdict", PATIENCE_S)
    net.pod.run("nft", "delete", "table", "inet", "tproxyd")
    wait_says(browser, "#headline", "^The kernel state has drifted$")
    assert verdict(browser) == "bad"
    assert "to do: add the firewall rules" in browser.text("#reasons")
    assert "tproxyd install" in browser.text("#todo")
    assert browser.text("#kernel").startswith("drift")
    assert browser.run("return document.title").startswith("✕ The kernel state has drifted")
    assert tproxyd(net.pod, "install").returncode == 0
    wait_for(lambda: verdict(browser) == "good", "a green verdict again", PATIENCE_S)
    assert browser.text("#kernel").startswith("stands")
    assert browser.text("#reasons") == ""
    assert browser.console() == []


def test_a_reload_is_nothing_bad(net: Topology, daemon: Daemon, browser: Browser) -> None:
    """Workers of before that see their connections off are shown as that, and not as missing."""
    workers = os.sched_getaffinity(0)
    pair = net.pair()
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: daemon.status()["reload"]["done"] == 1, "the reload")
    browser.open(PAGE)
    ready = f"{len(workers)} of {len(workers)} ready"
    wait_says(browser, "#ready", f"^{ready}, 1 draining with 1 connection$")
    assert verdict(browser) == "good"
    assert re.search(r"\d\s+draining\s+1\s", browser.text("#workers tr:last-child"))
    assert browser.run("return document.querySelector('#workers .wrong')") is None
    pair.client.close()
    assert pair.app.recv(1) == b""
    pair.app.close()
    wait_says(browser, "#ready", f"^{ready}$")
    assert browser.console() == []


def test_a_daemon_that_is_gone_is_said_to_be(
    net: Topology, daemon: Daemon, browser: Browser
) -> None:
    browser.open(PAGE)
    wait_for(lambda: verdict(browser) == "good", "a green verdict", PATIENCE_S)
    assert browser.console() == []
    assert daemon.stop() == 0
    said = wait_says(browser, "#verdict", "The daemon does not answer")
    assert verdict(browser) == "bad"
    assert "nobody listens at this address" in said
    assert re.search(r"What is below is of \d\d:\d\d:\d\d", said)
    with Daemon(net.pod, install=False):
        wait_for(lambda: verdict(browser) == "good", "the next one to be seen", PATIENCE_S)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read(
    net: Topology, daemon: Daemon, browser: Browser, scheme: str
) -> None:
    """No scrolling sideways, and every text has the contrast of WCAG AA."""
    browser.prefer(scheme)
    browser.resize(360, 740)
    browser.open(PAGE)
    with Load(net):
        wait_says(browser, "#headline", "^Traffic flows")
        assert browser.run("return document.documentElement.scrollWidth") <= 360
        assert browser.run(WORKERS_OVER) <= 0
        assert browser.run(CONTRAST) == []
    net.pod.run("nft", "delete", "table", "inet", "tproxyd")
    wait_says(browser, "#headline", "drifted")
    # Colours change softly, unless the reader has asked for none of that.
    wait_for(lambda: browser.run(CONTRAST) == [], "readable colours", PATIENCE_S)


WORKERS_OVER = """
    const box = document.querySelector("#workers").closest(".scroll");
    return box.scrollWidth - box.clientWidth;
"""
# Every element with a text of its own, against the first ground below it that is opaque: those of
# less than 4.5 : 1.
CONTRAST = """
const parse = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(c => (c /= 255) <= .03928 ? c / 12.92
  : ((c + .055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
const bad = [];
for (const node of document.querySelectorAll("body *:not(script):not(noscript *)")) {
  if (![...node.childNodes].some(each => each.nodeType === 3 && each.data.trim())) continue;
  if (!node.getClientRects().length) continue;
  let under = node, ground;
  do {
    ground = parse(getComputedStyle(under).backgroundColor);
    under = under.parentElement;
  } while (under && ground[3] === 0);
  const [a, b] = [light(parse(getComputedStyle(node).color)), light(ground)];
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (ratio < 4.5) bad.push(`${node.tagName}#${node.id} ${node.textContent.trim()} ${ratio}`);
}
return bad;
"""


def test_only_its_own_script_may_run(net: Topology, daemon: Daemon, browser: Browser) -> None:
    """Its headers forbid all else: a script that came in by some text, and any other host."""
    browser.open(PAGE)
    wait_for(lambda: verdict(browser) == "good", "a green verdict", PATIENCE_S)
    browser.run(
        "const script = document.createElement('script');"
        "script.textContent = 'window.ran = true';"
        "document.body.append(script)"
    )
    assert browser.run("return window.ran") is None
    refused = browser.run(
        "return fetch('http://10.9.1.1:9133/status').then(() => 'let through', each => each.name)"
    )
    assert refused == "TypeError"
    told = browser.console()
    assert len(told) >= 2
    assert all("Content Security Policy" in each for each in told)
