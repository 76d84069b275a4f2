"""Whether nft's table is owned by the process that keeps it, and what is said of that."""

from __future__ import annotations

import itertools

import pytest

from tproxyd.addr import Endpoint
from tproxyd.config import (
    Backend,
    Config,
    Guard,
    Intercept,
    Listener,
    OnCrash,
    ReturnPath,
    Rules,
    Scheme,
    Scope,
    SourceKind,
    Via,
)
from tproxyd.kernel.desired import Facts, desired
from tproxyd.kernel.firewall import Hook
from tproxyd.kernel.nftlang import refill, render, table_text
from tproxyd.kernel.ownership import Own, ownership

POD = Facts(
    ipv6=True,
    host_netns=False,
    set_before=frozenset(),
    sysctls_writable=True,
    lo_up=True,
    own=frozenset(),
    ip_tables=(4, 6),
    legacy_rules=False,
    nft=True,
)
SIDECAR = (Listener(),)
BY_CONNTRACK = {"return_path": ReturnPath.CONNTRACK}


def wanted(listeners: tuple[Listener, ...] = SIDECAR, **rules: object) -> tuple[Own, str]:
    config = Config(rules=Rules(**rules), listeners=listeners)  # type: ignore[arg-type]
    own, said = ownership(config, POD)
    return own, " ".join(said)


def test_nobody_owns_by_default() -> None:
    assert wanted() == (Own.NOT, "")


def test_closed_outlives_its_owner() -> None:
    assert wanted(guard=Guard.OWNER) == (Own.FOR_GOOD, "")


def test_open_goes_with_its_owner_where_that_hurts_nobody() -> None:
    assert wanted(guard=Guard.OWNER, on_crash=OnCrash.OPEN) == (Own.WHILE_ALIVE, "")


@pytest.mark.parametrize(
    ("listeners", "rules"),
    [
        (SIDECAR, BY_CONNTRACK),
        (SIDECAR, {"scheme": Scheme.ISTIO}),
        ((Listener(intercept=Intercept(Scope.FORWARD)),), {}),
        ((Listener(intercept=Intercept(Scope.LOCAL, Via.REDIRECT)),), {}),
        (
            (Listener(), Listener("a", port=1, intercept=Intercept(Scope.OUTBOUND, Via.REDIRECT))),
            {},
        ),
        (
            (Listener(bind="*", upstream=(Endpoint("192.0.2.1", 80),), source=SourceKind.CLIENT),),
            {},
        ),
    ],
    ids=["conntrack", "istio", "router", "redirect", "outbound", "gateway"],
)
def test_open_does_not_where_open_connections_need_the_table(
    listeners: tuple[Listener, ...], rules: dict[str, object]
) -> None:
    own, said = wanted(listeners, guard=Guard.OWNER, on_crash=OnCrash.OPEN, **rules)
    assert own is Own.FOR_GOOD
    assert "open connections need these rules" in said


@pytest.mark.parametrize("backend", [Backend.IPTABLES_NFT, Backend.IPTABLES_LEGACY])
def test_tables_of_iptables_have_no_owner(backend: Backend) -> None:
    for guard, policy in itertools.product(Guard, OnCrash):
        own, said = wanted(backend=backend, guard=guard, on_crash=policy)
        assert own is Own.NOT
        assert ("no owner" in said) == (guard is Guard.OWNER)
        assert ("rules of iptables end with no process" in said) == (policy is OnCrash.OPEN)


def test_open_without_an_owner_says_what_that_is_worth() -> None:
    own, said = wanted(on_crash=OnCrash.OPEN)
    assert own is Own.NOT
    assert 'guard = "owner" would make it hold without' in said


# The scripts that an owner runs -------------------------------------------------------------------


def test_a_refill_never_names_the_table_alone() -> None:
    """That would be a change of its flags, which the kernel refuses."""
    firewall = desired(Config(), facts=POD).firewall
    script = refill(firewall, ["old", "prerouting"]).splitlines()
    assert script[:3] == [
        "flush table inet tproxyd",
        "delete chain inet tproxyd old",
        "delete chain inet tproxyd prerouting",
    ]
    assert not [line for line in script if line.startswith(("add table", "delete table", "table"))]
    # All of the rules that the whole table has, and chains before what jumps to them.
    rules = [line for line in script if line.startswith("add rule inet tproxyd prerouting ")]
    assert len(rules) == len(next(c for c in firewall if c.hook is Hook.BEHIND_NAT).rules)  # type: ignore[union-attr]
    assert script.index(rules[0]) > max(
        at for at, line in enumerate(script) if line.startswith("add chain")
    )


def test_an_owned_table_differs_by_its_flag_only() -> None:
    firewall = desired(Config(), facts=POD).firewall
    plain, owned = table_text(firewall), table_text(firewall, owned=True)
    assert owned.replace("\tflags owner\n", "") == plain
    assert render(firewall).endswith(plain)
