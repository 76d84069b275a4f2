"""reconcile over the strict fake: twice, from anywhere, and when steps fail."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from tproxyd.config import Config, ReturnPath, Rules
from tproxyd.errors import KernelError
from tproxyd.kernel.desired import PRIORITY, Facts
from tproxyd.kernel.firewall import Unknown
from tproxyd.kernel.reconcile import Report, _failure, check, clean, install, reconcile, rules
from tproxyd.kernel.state import (
    EMPTY,
    MARK_SYSCTLS,
    OURS,
    Change,
    PolicyRule,
    Route,
    Stage,
    Sysctl,
    UnknownRoute,
    UnknownRule,
    diff,
)
from tproxyd.tests.fakes import Crash, FakeKernel

CONFIG = Config()
CONNTRACK = Config(rules=Rules(return_path=ReturnPath.CONNTRACK))
OTHER = Config(mark=0x20, table=7)
STATIC = 4  # RTPROT_STATIC: `ip route add` by hand
STEPS = 8  # of CONFIG: two routes, three sysctls, two rules, the firewall
STEPS_CONNTRACK = 5  # the same without the sysctls


def state_of(kernel: FakeKernel) -> str:
    return str(kernel)


def test_install_twice_writes_once() -> None:
    kernel = FakeKernel()
    first = install(CONFIG, world=kernel)
    assert list(first.changed) == kernel.written
    assert len(kernel.written) == STEPS
    assert (first.differs, first.installed) == ((), True)
    assert first.return_path is ReturnPath.ACCEPT_MARK
    second = install(CONFIG, world=kernel)
    assert second == replace(first, changed=(), wrong=())
    assert len(kernel.written) == STEPS


def test_clean_leaves_nothing_and_gives_the_sysctls_back() -> None:
    kernel = FakeKernel()
    before = state_of(kernel)
    install(CONFIG, world=kernel)
    assert set(kernel.sysctls.values()) == {133}
    report = clean(world=kernel)
    assert state_of(kernel) == before
    assert (report.installed, report.differs, report.return_path) == (False, (), None)
    assert clean(world=kernel) == Report()


@pytest.mark.parametrize("values", [*itertools.product((0, 1), repeat=3)], ids=str)
def test_a_sysctl_that_was_set_before_us_stays(values: tuple[int, int, int]) -> None:
    kernel = FakeKernel(sysctls=values)
    before = state_of(kernel)
    report = install(CONFIG, world=kernel)
    assert [change for change in report.changed if change.startswith("set")] == [
        f"set {name}=133" for name, value in zip(MARK_SYSCTLS, values, strict=True) if not value
    ]
    clean(world=kernel)
    assert state_of(kernel) == before


@pytest.mark.parametrize("values", [*itertools.product((0, 1), repeat=3)], ids=str)
@pytest.mark.parametrize("healed", [False, True])
def test_the_sysctls_are_remembered_where_every_rule_and_route_is_lost(
    values: tuple[int, int, int], healed: bool
) -> None:
    """systemd-networkd removes at its start what it does not know."""
    kernel = FakeKernel(sysctls=values)
    before = state_of(kernel)
    install(CONFIG, world=kernel)
    installed = state_of(kernel)
    kernel.routes.clear()
    kernel.rules.clear()
    if healed:
        install(CONFIG, world=kernel)
        assert state_of(kernel) == installed
    clean(world=kernel)
    assert state_of(kernel) == before


@pytest.mark.parametrize("one", [CONFIG, CONNTRACK, OTHER])
@pytest.mark.parametrize("other", [CONFIG, CONNTRACK, OTHER])
def test_from_one_configuration_to_another(one: Config, other: Config) -> None:
    straight, detour = FakeKernel(), FakeKernel()
    install(other, world=straight)
    install(one, world=detour)
    install(other, world=detour)
    assert detour.sysctls == straight.sysctls
    with straight.lock(), detour.lock():
        have, want = detour.read_routing(), straight.read_routing()
    assert diff(have, want) == ()
    assert detour.firewall == straight.firewall
    clean(world=detour)
    assert state_of(detour) == state_of(FakeKernel())


def test_what_stood_and_was_another_is_replaced() -> None:
    kernel = FakeKernel()
    assert not install(CONFIG, world=kernel).replaced
    kernel.routes.pop()
    assert not install(CONFIG, world=kernel).replaced  # only made whole
    assert install(OTHER, world=kernel).replaced


def test_conntrack_after_accept_mark_puts_the_sysctls_back() -> None:
    kernel = FakeKernel()
    install(CONFIG, world=kernel)
    report = install(CONNTRACK, world=kernel)
    assert not any(kernel.sysctls.values())
    assert report.return_path is ReturnPath.CONNTRACK


def test_a_drain_and_back() -> None:
    kernel = FakeKernel()
    install(CONFIG, world=kernel)
    report = install(CONFIG, intercept=False, world=kernel)
    assert report.changed == ("replace the firewall rules (nft table inet tproxyd)",)
    assert check(CONFIG, intercept=False, world=kernel).differs == ()
    assert len(check(CONFIG, world=kernel).differs) == 1
    assert install(CONFIG, world=kernel).changed == report.changed


def test_check_reads_only() -> None:
    kernel = FakeKernel()
    report = check(CONFIG, world=kernel)
    assert (len(report.differs), report.installed, report.changed) == (STEPS, False, ())
    assert kernel.written == []
    install(CONFIG, world=kernel)
    kernel.routes.pop()
    written = list(kernel.written)
    report = check(CONFIG, world=kernel)
    assert report.differs == ("add ip -6 route local default dev lo table 133 proto 140",)
    assert report.installed
    assert kernel.written == written


def test_foreign_things_are_left_alone() -> None:
    kernel = FakeKernel()
    kernel.routes.append(Route(4, 999, STATIC))
    # The twin of our rule, set by hand.
    kernel.rules.append(PolicyRule(4, PRIORITY, 0x539, 0xFFF, 133, STATIC))
    before = state_of(kernel)
    install(CONFIG, world=kernel)
    clean(world=kernel)
    assert state_of(kernel) == before


def test_a_table_that_is_taken_is_not_taken_over() -> None:
    kernel = FakeKernel()
    kernel.routes.append(Route(6, 133, STATIC))
    before = state_of(kernel)
    with pytest.raises(KernelError, match="File exists") as caught:
        install(CONFIG, world=kernel)
    assert not kernel.firewall
    assert not any(kernel.sysctls.values())
    assert "done all the same: add ip -4 route" in str(caught.value)
    assert "still to do: add ip -6 route" in str(caught.value)
    clean(world=kernel)
    assert state_of(kernel) == before


def test_leftovers_of_another_version_go() -> None:
    kernel = FakeKernel()
    before = state_of(kernel)
    kernel.routes += [UnknownRoute(4, "unreachable default proto 133"), Route(4, 8, OURS)]
    kernel.rules += [UnknownRule(6, "iif eth0 protocol 134")]
    kernel.rules += [PolicyRule(4, 9, 1, 1, 8, OURS)] * 2
    kernel.firewall = (Unknown("a set"),)
    install(CONFIG, world=kernel)
    assert check(CONFIG, world=kernel).differs == ()
    clean(world=kernel)
    assert state_of(kernel) == before


def test_the_sysctls_are_given_back_by_any_survivor() -> None:
    for survivor in range(4):
        kernel = FakeKernel()
        install(CONFIG, world=kernel)
        kernel.firewall = ()
        if survivor < 2:
            kernel.routes, kernel.rules = [kernel.routes[survivor]], []
        else:
            kernel.routes, kernel.rules = [], [kernel.rules[survivor - 2]]
        clean(world=kernel)
        assert state_of(kernel) == state_of(FakeKernel())


# When a step fails --------------------------------------------------------------------------------


def fail_at(kernel: FakeKernel, number: int, error: BaseException) -> None:
    """The write with this number, from now, raises."""
    left = [number]

    def before(_: Change) -> None:
        left[0] -= 1
        if left[0] < 0:
            kernel.before_write = lambda change: None
            raise error

    kernel.before_write = before


def refusal(n: int = 0) -> KernelError:
    return KernelError(f"do it ({n})", "Operation not permitted", "run it as root")


@pytest.mark.parametrize(
    ("config", "steps", "number"),
    [(CONFIG, STEPS, number) for number in range(STEPS)]
    + [(CONNTRACK, STEPS_CONNTRACK, number) for number in range(STEPS_CONNTRACK)],
)
def test_a_failed_install_never_intercepts_without_a_way_home(
    config: Config, steps: int, number: int
) -> None:
    kernel = FakeKernel()
    assert len(check(config, world=kernel).differs) == steps
    fail_at(kernel, number, refusal())
    with pytest.raises(KernelError, match="still to do") as caught:
        install(config, world=kernel)
    assert str(caught.value).startswith(f"{refusal()}\n")
    assert kernel.firewall == ()
    assert len(check(config, world=kernel).differs) == steps - len(kernel.written)
    # Both from here: on, or away.
    away = FakeKernel()
    away.routes, away.rules = list(kernel.routes), list(kernel.rules)
    away.sysctls = dict(kernel.sysctls)
    clean(world=away)
    assert state_of(away) == state_of(FakeKernel())
    install(config, world=kernel)
    assert check(config, world=kernel).differs == ()


@pytest.mark.parametrize("number", range(STEPS))
def test_a_failed_clean_goes_on_and_says_what_is_left(number: int) -> None:
    kernel = FakeKernel()
    install(CONFIG, world=kernel)
    kernel.written.clear()
    fail_at(kernel, number, refusal())
    with pytest.raises(KernelError, match="still to do"):
        clean(world=kernel)
    if number == 0:  # interception: its clients need all the rest
        assert kernel.written == []
        assert kernel.firewall
    elif number in (1, 2, 3):  # a sysctl: the others are put back; what remembers it stays
        stuck = MARK_SYSCTLS[number - 1]
        assert [name for name, value in kernel.sysctls.items() if value] == [stuck]
        assert stuck in kernel.remembers
        assert (len(kernel.routes), len(kernel.rules), kernel.firewall) == (2, 2, ())
        assert len(kernel.written) == 3
    else:
        assert len(kernel.written) == STEPS - 1
    clean(world=kernel)
    assert state_of(kernel) == state_of(FakeKernel())


def test_the_same_refusal_is_told_once() -> None:
    errors = [refusal(1), refusal(1), refusal(2), refusal(2)]
    told = str(_failure(errors, [], (), wrote=False))
    assert told.splitlines() == [str(refusal(1)), f"  also: {refusal(2)}"]


def test_a_failed_change_keeps_the_state_that_worked() -> None:
    kernel = FakeKernel()
    install(CONFIG, world=kernel)
    fail_at(kernel, 1, refusal())
    with pytest.raises(KernelError):
        install(OTHER, world=kernel)
    missing = check(CONFIG, world=kernel).differs
    assert missing == ("remove ip -4 route local default dev lo table 7 proto 140",)


def test_every_refusal_is_told() -> None:
    kernel = FakeKernel()
    install(CONFIG, world=kernel)
    refused: list[KernelError] = []

    def before(change: Change) -> None:
        if change.stage is Stage.DROP_RULE:
            refused.append(refusal(len(refused)))
            raise refused[-1]

    kernel.before_write = before
    with pytest.raises(KernelError) as caught:
        clean(world=kernel)
    assert len(refused) == 2
    assert all(f"do it ({n})" in str(caught.value) for n in range(2))
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert caught.value.__cause__.exceptions == tuple(refused)


def test_clean_takes_no_way_home_from_interception_that_it_cannot_read() -> None:
    kernel = FakeKernel()
    install(CONFIG, world=kernel)
    before = state_of(kernel)
    kernel.unreadable = KernelError("read the nft table", "CAP_NET_ADMIN is missing", "be root")
    with pytest.raises(KernelError, match="still to do: put net") as caught:
        clean(world=kernel)
    assert state_of(kernel) == before
    assert not caught.value.wrote


def test_a_failed_install_tells_whether_it_has_written() -> None:
    kernel = FakeKernel()

    def refuse(_: Change) -> None:
        raise refusal()

    kernel.before_write = refuse
    with pytest.raises(KernelError) as caught:
        install(CONFIG, world=kernel)
    assert not caught.value.wrote
    fail_at(kernel, 1, refusal())
    with pytest.raises(KernelError) as caught:
        install(CONFIG, world=kernel)
    assert caught.value.wrote


def test_install_without_an_nft_writes_nothing() -> None:
    kernel = FakeKernel()
    kernel.unreadable = KernelError("talk to nftables", "no library", "apt install libnftables1")
    with pytest.raises(KernelError, match="can't talk to nftables: no library; apt install"):
        install(CONFIG, world=kernel)
    assert kernel.written == []


def test_install_with_lo_down_writes_nothing_and_clean_works() -> None:
    kernel = FakeKernel()
    install(CONFIG, world=kernel)
    kernel.lo_up = False
    kernel.written.clear()
    with pytest.raises(KernelError, match=r"lo is down.*; ip link set lo up"):
        install(OTHER, world=kernel)
    assert kernel.written == []
    clean(world=kernel)
    assert not kernel.routes


def test_a_kernel_that_forgets_what_was_written() -> None:
    class Forgetful(FakeKernel):
        def apply(self, change: Change) -> None:
            super().apply(change)
            self.rules.clear()

    with pytest.raises(KernelError, match="reads back differently") as caught:
        install(CONFIG, world=Forgetful())
    assert "still to do: add ip -4 rule" in str(caught.value)


@pytest.mark.parametrize("number", range(STEPS + 1))
def test_a_crash_anywhere_is_cleaned_up_after(number: int) -> None:
    kernel = FakeKernel()
    fail_at(kernel, number, Crash())
    if number < STEPS:
        with pytest.raises(Crash):
            install(CONFIG, world=kernel)
    else:
        install(CONFIG, world=kernel)
    kernel.before_write = lambda change: None
    clean(world=kernel)
    assert state_of(kernel) == state_of(FakeKernel())


# What is said -------------------------------------------------------------------------------------


def test_notes() -> None:
    report = install(CONFIG, world=FakeKernel(ipv6=False))
    assert any("no IPv6" in note for note in report.notes)
    assert any("return path accept-mark" in note for note in report.notes)
    assert report.notes == check(CONFIG, world=FakeKernel(ipv6=False)).notes
    (note,) = install(CONFIG, world=FakeKernel(writable=False)).notes
    assert "return path conntrack" in note


def test_accept_mark_where_it_cannot_be_written() -> None:
    config = Config(rules=Rules(return_path=ReturnPath.ACCEPT_MARK))
    kernel = FakeKernel(writable=False)
    with pytest.raises(KernelError, match="Read-only file system; use conntrack"):
        install(config, world=kernel)
    assert not kernel.firewall


def test_rules_is_a_script_with_the_commands_as_comments() -> None:
    text = rules(CONFIG, facts=Facts(ipv6=True, host_netns=False))
    head, _, script = text.partition("\n\n")
    assert all(line.startswith("# ") for line in head.splitlines())
    assert "# ip -6 rule add priority 1337 fwmark 0x539/0xfff lookup 133 protocol 140\n" in text
    for name in MARK_SYSCTLS:
        assert f"# sysctl -w {name}=133\n" in text
    assert script.startswith("add table inet tproxyd\ndelete table inet tproxyd\n")


def test_reconcile_to_a_state_of_ones_own() -> None:
    kernel = FakeKernel()
    want = replace(EMPTY, routes=(Route(4, 5, OURS),))
    assert reconcile(want, kernel).installed
    assert kernel.routes == [Route(4, 5, OURS)]
    assert not reconcile(EMPTY, kernel).installed


@pytest.mark.parametrize("name", MARK_SYSCTLS)
def test_a_sysctl_that_somebody_else_put_back_is_set_again(name: str) -> None:
    kernel = FakeKernel()
    install(CONFIG, world=kernel)
    kernel.sysctls[name] = 0
    assert install(CONFIG, world=kernel).changed == (f"set {Sysctl(name, OURS)}",)
