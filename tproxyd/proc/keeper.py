"""The process that holds the kernel state, from the inside: a child of the supervisor.

It is asked over a socketpair, one JSON line a request and one an answer, and while it guards it
also says by itself what it has healed ("news" lines). What it may be asked is Verb.

Guarding is one loop: hear that something has changed, wait a moment (who changes one thing changes
more, as `firewall-cmd --reload` does), then ask the kernel side to make the state, which reads all
of it and writes what differs. The same is done every few seconds whatever was heard, for events get
lost; and what has none is looked at several times a second. Twenty thousand changes a second cost
the looks that fit into one (GAP_S), not twenty thousand.

Where healing fails, and where somebody undoes again and again what was healed, the pauses grow
(pace.py). It never gives up.

EOF on its socket means that the supervisor is gone without a farewell: a farewell is Verb.LEAVE.
What then becomes of the rules is `on_crash`, and it ends. With "closed" they stay: with nobody
listening, intercepted connections are refused, and traffic never reaches the application around
the proxy. With "open" interception ends.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import pickle
import select
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import inf

from tproxyd.config import Config, OnCrash
from tproxyd.errors import KernelError
from tproxyd.linux import name_process, take_up
from tproxyd.proc.means import Means, Report, Verb
from tproxyd.proc.pace import FIRST_S, LONGEST_S, Pace

log = logging.getLogger("tproxyd")

# From the first event to the look: for the rest of what its author is about to do. A flush and a
# reload by `nft -f` are milliseconds apart.
SETTLE_S = 0.02
# Between two looks, where events do not end. One takes 2 ms of CPU time with nft, and 5 ms more for
# each 100,000 routes of others; whatever it takes, a storm of events takes 4 % (SHARE).
GAP_S = 0.05
SHARE = 25
# What sends no events (sysctls, legacy tables): 0.1 ms a time. With the heal behind it, 0.3 s for
# legacy tables on a slow machine, what is noticed here is right again within a second.
POLL_S = 0.25
# Everything, in case an event was lost in a way that nobody noticed; where nft's are not to be
# had, what has no events is everything.
LOOK_S = 5.0


def serve(
    sock: socket.socket,
    config: Config,
    means: Means,
    wish: Verb | None = None,
    *,
    prepare: bool = False,
) -> None:
    """Answer requests, and guard, until the supervisor is gone.

    `wish`: what a predecessor that died was guarding: INSTALL or STOP_INTERCEPTING.
    """
    name_process("tproxyd/kernel")
    take_up()  # CAP_NET_ADMIN, which is of use here only
    if prepare:
        means.prepare()
    keeper = Keeper(sock, config, means)
    if wish is not None:
        keeper.take_up(wish)
    keeper.run()


class Keeper:
    def __init__(self, sock: socket.socket, config: Config, means: Means) -> None:
        sock.setblocking(True)
        self._sock, self._config, self._means = sock, config, means
        self._kernel = means.kernel(config)
        self._outside = means.outside()
        self._unread = b""
        self._claimed = False
        self._followed: Config | None = None
        self._wish: Verb | None = None  # what is guarded: INSTALL, STOP_INTERCEPTING
        self._looked_at, self._look_at = -inf, inf  # time.monotonic(), as all of these
        self._poll_at = self._full_at = inf
        self._gap = GAP_S
        self._heard_at: float | None = None  # the first event since the last look that was well
        self._authors: dict[str, None] = {}
        self._trouble = ""  # why the last attempt failed
        self._pace = Pace()

    def take_up(self, wish: Verb) -> None:
        self._guard(wish)
        self._look_at = time.monotonic()

    def run(self) -> None:
        while True:
            poller = select.poll()
            poller.register(self._sock, select.POLLIN)
            outside = {each.fileno() for each in self._outside.files()}
            for fd in outside:
                poller.register(fd, select.POLLIN)
            wait = None
            if self._wish is not None:
                due = min(self._look_at, self._poll_at, self._full_at) - time.monotonic()
                wait = max(0, due * 1000)
            ready = {fd for fd, _ in poller.poll(wait)}
            if ready & outside:
                self._hear()
            if self._sock.fileno() in ready and not self._take_requests():
                return
            if self._wish is not None:
                self._act()

    # Requests -----------------------------------------------------------------------------------

    def _take_requests(self) -> bool:
        """False when this was the last."""
        try:
            data = self._sock.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            self._orphaned()
            return False
        self._unread += data
        while b"\n" in self._unread:
            line, _, self._unread = self._unread.partition(b"\n")
            request = json.loads(line)
            verb = Verb(request["verb"])
            answer: dict[str, object]
            try:
                report = self._do(verb, request)
                answer = {"report": asdict(report)}
                if verb is Verb.CHECK:
                    undone = "another program undoes what is healed, again and again"
                    fight = undone if self._pace.fighting and report.differs else ""
                    answer["trouble"] = self._trouble or fight
            except KernelError as error:
                answer = {"error": [error.action, error.why, error.hint], "wrote": error.wrote}
            except ImportError as error:  # replaced or removed since the start
                again = "install tproxyd again, then: tproxyd clean"
                why = ["load what writes to the kernel", str(error), again]
                answer = {"error": why, "wrote": True}  # who knows
            if verb is Verb.LEAVE:
                return False
            self._say({**answer, "n": request["n"]})
        return True

    def _say(self, what: Mapping[str, object]) -> None:
        with contextlib.suppress(ConnectionError):  # EOF comes next
            self._sock.sendall(json.dumps(what).encode() + b"\n")

    def _do(self, verb: Verb, request: Mapping[str, str]) -> Report:
        match verb:
            case Verb.CLAIM:
                self._claim()
                return Report()
            case Verb.INSTALL:
                return self._install()
            case Verb.GUARD:
                self._claim()
                self._guard(Verb.INSTALL)
                return self._look() or Report()
            case Verb.STOP_INTERCEPTING:
                guarded, self._wish = self._wish, None  # what this stops nobody puts back
                report = self._kernel(verb)
                if guarded is not None:
                    self._guard(verb)
                return report
            case Verb.CHECK:
                return self._check()
            case Verb.CLEAN:
                self._wish = None
                return self._kernel(verb)
            case Verb.MOVE:
                return self._move(pickle.loads(base64.b64decode(request["config"])))
            case Verb.RELEASE | Verb.LEAVE:
                if self._wish is not None:
                    self._wish = None
                    self._kernel(Verb.RELEASE)
                self._outside.release()
                self._claimed, self._followed = False, None
                return Report()

    def _install(self) -> Report:
        self._claim()
        self._guard(Verb.INSTALL)  # hear before you write
        try:
            report = self._kernel(Verb.INSTALL)
        except BaseException:
            self._wish = None
            raise
        self._outside.read()  # our own writes
        self._is_well()
        return report

    def _check(self) -> Report:
        if self._wish is None:
            return self._kernel(Verb.CHECK)
        if report := self._look():
            return report
        if self._wish is Verb.STOP_INTERCEPTING:
            return Report()
        return self._kernel(Verb.CHECK)

    def _move(self, config: Config) -> Report:
        """Forward whole, or back."""
        kernel, before = self._kernel, self._config
        self._kernel, self._config = self._means.kernel(config), config
        if self._wish is None:
            return Report()
        try:
            self._guard(Verb.INSTALL)
            report = self._kernel(Verb.INSTALL)
        except BaseException:
            self._kernel, self._config = kernel, before
            self._pace.hurry()
            try:
                self._guard(Verb.INSTALL)
                self._look(told=False)
            except KernelError as error:
                log.error("%s", error)
            raise
        self._outside.read()
        self._is_well()
        return report

    # Guarding -----------------------------------------------------------------------------------

    def _claim(self) -> None:
        if not self._claimed:
            self._outside.claim()
            self._claimed = True

    def _guard(self, wish: Verb) -> None:
        """From now on nothing of this is missed."""
        self._wish = wish
        now = time.monotonic()
        self._poll_at, self._full_at = now + POLL_S, now + LOOK_S
        if self._followed is not self._config and self._claimed:
            self._outside.follow(self._config)
            self._followed = self._config

    def _hear(self) -> None:
        news = self._outside.read()
        if self._wish is None or not news.concerns_us:
            return
        now = time.monotonic()
        if self._heard_at is None:
            self._heard_at = now
        self._authors.update(dict.fromkeys(news.authors))
        if news.routing and self._trouble:
            self._look_at = min(self._look_at, max(now, self._pace.try_soon()))
        self._look_at = min(self._look_at, max(now + SETTLE_S, self._looked_at + self._gap))

    def _act(self) -> None:
        """What is due."""
        now = time.monotonic()
        if now >= self._poll_at:
            changed = self._outside.changed() or not self._outside.hears
            # However much there is to look at, it takes a fiftieth of a CPU at most.
            self._poll_at = now + max(POLL_S, 50 * (time.monotonic() - now))
            if changed:
                self._look_at = min(self._look_at, now)
        if now >= min(self._look_at, self._full_at):
            self._look()

    def _look(self, *, told: bool = True) -> Report | None:
        """Make the state what it should be; None where that failed, or has to wait."""
        assert self._wish is not None
        now = self._looked_at = time.monotonic()
        self._full_at, self._look_at = now + LOOK_S, inf
        if now < self._pace.not_before:
            self._look_at = self._pace.not_before
            return None
        noticed = now if self._heard_at is None else self._heard_at
        began = _cpu_time()
        try:
            self._claim()
            if self._followed is not self._config:
                self._guard(self._wish)
            report = self._kernel(self._wish)
        except (KernelError, ImportError) as error:
            self._failed(str(error).splitlines()[0])
            return None
        if not report.changed:
            self._gap = max(GAP_S, SHARE * (_cpu_time() - began))
            self._is_well()
            return report
        if told:
            seconds = time.monotonic() - noticed
            self._say(
                {
                    "news": "healed",
                    "wrong": report.wrong,
                    "done": report.changed,
                    "by": list(self._authors),
                    "seconds": round(seconds, 4),
                }
            )
        self._healed(report.wrong)
        return replace(report, changed=())

    def _is_well(self) -> None:
        self._heard_at = None
        self._authors.clear()
        if self._trouble:
            self._trouble = ""
            self._say({"news": "well"})

    def _healed(self, wrong: Sequence[str]) -> None:
        self._is_well()
        was_fighting = self._pace.fighting
        times = self._pace.healed(time.monotonic(), wrong)
        if self._pace.fighting and not was_fighting:
            self._say({"news": "fight", "times": times, "wrong": wrong})
        # What came meanwhile is our own, most of it; for the rest look again.
        self._outside.read()
        self._look_at = time.monotonic() + GAP_S

    def _failed(self, why: str) -> None:
        self._pace.failed(time.monotonic())
        self._look_at = self._pace.not_before
        self._outside.read()
        new, self._trouble = why != self._trouble, why
        self._say({"news": "failed", "why": why, "new": new})

    # The end ------------------------------------------------------------------------------------

    def _orphaned(self) -> None:
        """The supervisor died, and the workers with it."""
        if self._wish is not Verb.INSTALL:
            return
        if self._config.rules.on_crash is OnCrash.CLOSED:
            log.error(
                "the daemon was killed: the rules stay, and clients are refused until one serves;"
                " start it again, or: tproxyd clean"
            )
            return
        pause = FIRST_S
        while True:
            try:
                self._kernel(Verb.STOP_INTERCEPTING)
            except KernelError as error:
                log.error("%s", error)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_S)
            else:
                log.error("the daemon was killed: clients reach the application directly")
                return


def _cpu_time() -> float:
    """Of this process, and of those that it has started: iptables-save, say."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system
