"""A random walk over the strict fake: installs, cleans, damage, refusals and crashes in any order.

Always: what others have stays as it is, install ends in what was wanted, clean in nothing, and the
sysctl is in the end what it would be without us, unless others removed every item that remembers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tproxyd.addr import Endpoint, PrefixSet, parse_prefix
from tproxyd.config import (
    Config,
    Intercept,
    Listener,
    ReturnPath,
    Rules,
    Scope,
    SourceKind,
    Via,
)
from tproxyd.errors import KernelError
from tproxyd.kernel.desired import PRIORITY, desired
from tproxyd.kernel.firewall import Unknown
from tproxyd.kernel.reconcile import check, clean, install
from tproxyd.kernel.state import (
    MARK_SYSCTLS,
    NUMBERS,
    OURS,
    Change,
    PolicyRule,
    Route,
    UnknownRoute,
    UnknownRule,
    diff,
)
from tproxyd.tests.fakes import Crash, FakeKernel, is_ours

_intercepts = st.builds(
    Intercept,
    scope=st.just(Scope.LOCAL),
    via=st.sampled_from(Via),
    sources=st.sampled_from([PrefixSet(), PrefixSet([parse_prefix("10.0.0.0/8")])]),
    interfaces=st.sampled_from([(), ("eth0",), ("eth0", "veth*")]),
) | st.sampled_from([Intercept(Scope.FORWARD), Intercept(Scope.OUTBOUND, Via.REDIRECT)])
configs = st.builds(
    Config,
    mark=st.sampled_from([0x539, 0x20]),
    table=st.sampled_from([133, 7]),
    rules=st.builds(Rules, return_path=st.sampled_from(ReturnPath)),
    listeners=st.lists(
        st.builds(
            Listener,
            name=st.sampled_from(["inbound", "output"]),
            port=st.sampled_from([15006, 15001]),
            bind=st.sampled_from(["", "*"]),
            intercept=_intercepts,
            upstream=st.sampled_from([(), (Endpoint("10.0.0.5", 80),), (Endpoint("app", 80),)]),
            source=st.sampled_from(SourceKind),
        ),
        min_size=1,
        max_size=2,
        unique_by=(lambda listener: listener.name, lambda listener: listener.port),
    ).map(tuple),
)

FOREIGN_ROUTES = [Route(4, 254, 4), Route(6, 999, 4)]
FOREIGN_RULES = [PolicyRule(4, PRIORITY, 0x539, 0xFFF, 133, 4), PolicyRule(6, 5210, 1, 1, 52, 3)]


class Walk(RuleBasedStateMachine):
    @initialize(
        ipv6=st.booleans(),
        host=st.booleans(),
        sysctls=st.tuples(*[st.integers(0, 1)] * 3),
        writable=st.booleans(),
    )
    def begin(self, ipv6: bool, host: bool, sysctls: tuple[int, int, int], writable: bool) -> None:
        self.kernel = FakeKernel(ipv6=ipv6, host_netns=host, sysctls=sysctls, writable=writable)
        self.kernel.routes += FOREIGN_ROUTES
        self.kernel.rules += FOREIGN_RULES
        self.without_us = dict(self.kernel.sysctls)  # what the sysctls would be

    def refused(self, call: Callable[[], object]) -> bool:
        """Whether it failed, for the one reason for which it may."""
        self.kernel.before_write = lambda change: None
        if self.kernel.writable:
            call()
            return False
        try:
            call()
        except KernelError:
            return True
        return False

    def tried(self, number: int, error: BaseException) -> None:
        """The write with this number raises `error`, once."""
        left = [number]

        def before(_: Change) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise error

        self.kernel.before_write = before

    @rule(config=configs, intercept=st.booleans())
    def install(self, config: Config, intercept: bool) -> None:
        if self.refused(lambda: install(config, intercept=intercept, world=self.kernel)):
            return
        with self.kernel.lock():
            have = replace(self.kernel.read_routing(), firewall=self.kernel.read_firewall())
        assert diff(have, desired(config, facts=self.kernel.facts(), intercept=intercept)) == ()
        assert check(config, intercept=intercept, world=self.kernel).differs == ()
        written = list(self.kernel.written)
        assert install(config, intercept=intercept, world=self.kernel).changed == ()
        assert self.kernel.written == written

    @rule()
    def clean(self) -> None:
        if self.refused(lambda: clean(world=self.kernel)):
            return
        assert not any(map(is_ours, (*self.kernel.routes, *self.kernel.rules)))
        assert self.kernel.firewall == ()
        assert self.kernel.sysctls == self.without_us

    @rule(config=st.none() | configs, number=st.integers(0, 8), crash=st.booleans())
    def fail(self, config: Config | None, number: int, crash: bool) -> None:
        self.tried(number, Crash() if crash else KernelError("do it", "no", "ask again"))
        with contextlib.suppress(Crash, KernelError):
            if config is None:
                clean(world=self.kernel)
            else:
                install(config, world=self.kernel)

    @rule(data=st.data())
    def somebody_removes_a_piece(self, data: st.DataObject) -> None:
        kernel = self.kernel
        pieces = [item for item in (*kernel.routes, *kernel.rules) if is_ours(item)]
        remembered = kernel.remembers
        piece = data.draw(st.sampled_from([*pieces, None]))
        if isinstance(piece, Route | UnknownRoute):
            kernel.routes.remove(piece)
        elif piece is not None:
            kernel.rules.remove(piece)
        elif kernel.firewall:
            gone = data.draw(st.integers(0, len(kernel.firewall) - 1))
            kernel.firewall = kernel.firewall[:gone] + kernel.firewall[gone + 1 :]
        for name in remembered - kernel.remembers:
            self.without_us[name] = kernel.sysctls[name]

    @rule(number=st.sampled_from(NUMBERS), family=st.sampled_from([4, 6]))
    def somebody_edits_our_table_and_doubles_our_rules(self, number: int, family: int) -> None:
        kernel = self.kernel
        kernel.firewall = (*kernel.firewall, Unknown(f"set {len(kernel.firewall)}"))
        kernel.rules += [item for item in kernel.rules if is_ours(item)][:1]
        if number == OURS and UnknownRule(4, "odd") not in kernel.rules:
            kernel.rules.append(UnknownRule(4, "odd"))
            kernel.routes.append(UnknownRoute(4, "odd"))

    @rule(name=st.sampled_from(MARK_SYSCTLS), value=st.integers(0, 1))
    def somebody_sets_a_sysctl(self, name: str, value: int) -> None:
        self.kernel.sysctls[name] = value
        if name not in self.kernel.remembers:
            self.without_us[name] = value

    @precondition(lambda self: self.kernel.writable)
    @rule()
    def somebody_mounts_proc_sys_read_only(self) -> None:
        self.kernel.writable = False

    @precondition(lambda self: not self.kernel.writable)
    @rule()
    def somebody_mounts_proc_sys_writable(self) -> None:
        self.kernel.writable = True

    @invariant()
    def every_sysctl_is_remembered(self) -> None:
        for name, value in self.kernel.sysctls.items():
            if value and value != self.without_us[name]:
                assert name in self.kernel.remembers, f"nothing remembers {name}\n{self.kernel}"

    @invariant()
    def others_keep_what_they_have(self) -> None:
        assert [r for r in self.kernel.routes if not is_ours(r)] == FOREIGN_ROUTES
        assert [r for r in self.kernel.rules if not is_ours(r)] == FOREIGN_RULES
        assert self.kernel.foreign_tables == ["table ip nat { … }"]

    def teardown(self) -> None:
        if hasattr(self, "kernel"):
            self.kernel.writable = True
            self.clean()


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
