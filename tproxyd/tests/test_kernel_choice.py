"""Which backend writes the rules, and how they go from one to another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tproxyd.config import Backend, Config, ReturnPath, Rules
from tproxyd.kernel.desired import Facts, backend, notes, return_path
from tproxyd.kernel.reconcile import check, clean, install
from tproxyd.kernel.state import MARK_SYSCTLS
from tproxyd.tests.fakes import FakeKernel


def config(chosen: Backend) -> Config:
    return Config(rules=Rules(backend=chosen))


@pytest.mark.parametrize(
    ("legacy_rules", "nft", "chosen", "why"),
    [
        (True, True, Backend.IPTABLES_LEGACY, "the legacy tables have rules here"),
        (False, True, Backend.NFT, "nftables is there"),
        (False, False, Backend.IPTABLES_NFT, "there is no nft"),
    ],
)
def test_auto(legacy_rules: bool, nft: bool, chosen: Backend, why: str) -> None:
    facts = Facts(ipv6=True, host_netns=True, legacy_rules=legacy_rules, nft=nft)
    choice = backend(Config(), facts)
    assert choice.backend is chosen
    assert f"backend {chosen}: {why}" in choice.why
    assert (choice.why in notes(Config(), facts)) == (chosen is not Backend.NFT)
    asked = backend(config(Backend.NFT), facts)
    assert asked == (Backend.NFT, "backend nft: it was asked for")


@pytest.mark.parametrize("one", list(Backend)[1:])
def test_auto_stays_with_the_rules_that_stand(one: Backend) -> None:
    """A legacy rule of somebody's, or an nft that was installed since, moves nothing."""
    kernel = FakeKernel()
    install(config(one), world=kernel)
    held = str(kernel)
    for kernel.legacy_rules, kernel.nft in ((True, True), (False, True), (False, False)):
        assert check(config(Backend.AUTO), world=kernel).differs == ()
        assert install(config(Backend.AUTO), world=kernel).changed == ()
        assert str(kernel) == held


def test_a_settled_choice_outlives_the_rules() -> None:
    """They were flushed, and meanwhile somebody has made legacy rules and set all sysctls."""
    facts = Facts(ipv6=True, host_netns=False, sysctls_writable=False)
    path = return_path(Config(), facts).path
    assert path is ReturnPath.CONNTRACK
    later = replace(facts, legacy_rules=True, set_before=frozenset(MARK_SYSCTLS))
    settled = replace(later, backend=Backend.NFT, path=path)
    assert backend(Config(), settled).backend is Backend.NFT
    assert return_path(Config(), settled).path is path
    assert return_path(Config(), replace(settled, path=None)).path is ReturnPath.ACCEPT_MARK
    asked = Config(rules=Rules(return_path=ReturnPath.ACCEPT_MARK))
    assert return_path(asked, settled).path is ReturnPath.ACCEPT_MARK


@pytest.mark.parametrize("one", list(Backend)[1:])
@pytest.mark.parametrize("other", list(Backend)[1:])
def test_from_one_backend_to_another(one: Backend, other: Backend) -> None:
    kernel = FakeKernel()
    before = str(kernel)
    install(config(one), world=kernel)
    assert install(config(one), world=kernel).changed == ()
    report = install(config(other), world=kernel)
    writes = [change for change in report.changed if "firewall" in change]
    if one is not other:  # what is new stands before what is old goes
        verbs = [change.split()[0] for change in writes]
        assert verbs == sorted(verbs)
        assert set(verbs) == {"add", "remove"}
    assert (kernel.firewall != ()) == (other is Backend.NFT)
    assert {tables.backend for tables in kernel.tables.values()} <= {other}
    assert check(config(other), world=kernel).differs == ()
    clean(world=kernel)
    assert str(kernel) == before
