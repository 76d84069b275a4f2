"""diff: from any state to any state, in an order that is safe to be interrupted."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tproxyd.kernel.firewall import (
    Chain,
    ConnMark,
    Goto,
    Hook,
    InInterface,
    PacketMark,
    Rule,
    Unknown,
    Verdict,
)
from tproxyd.kernel.state import (
    EMPTY,
    FWMARK_ACCEPT,
    MARK_SYSCTLS,
    NUMBERS,
    OURS,
    Change,
    KernelState,
    PolicyRule,
    Route,
    Stage,
    Sysctl,
    UnknownRoute,
    UnknownRule,
    diff,
    number_for,
    remembered,
    render,
)

ON = Sysctl(FWMARK_ACCEPT, OURS)
OURS_AND_SYSCTL = number_for([FWMARK_ACCEPT])
CHAIN = Chain("prerouting", Hook.PREROUTING, (Rule((InInterface(("lo",)),), Verdict.ACCEPT),))

_families = st.sampled_from([4, 6])
_numbers = st.sampled_from(NUMBERS)
_destinations = st.sampled_from(["default", "::6/128"])
_routes = st.builds(
    Route, _families, st.sampled_from([133, 200]), _numbers, _destinations
) | st.builds(UnknownRoute, _families, st.just("unreachable 10.0.0.0/8"))
_rules = st.builds(
    PolicyRule,
    _families,
    st.just(1337),
    st.sampled_from([0x539, 0x10]),
    st.just(0xFFF),
    st.just(133),
    _numbers,
) | st.builds(UnknownRule, _families, st.just("priority 7 from 10.0.0.0/8"))
_chains = st.sampled_from([CHAIN, replace(CHAIN, name="other"), Unknown("set")])
states = st.builds(
    KernelState,
    st.sampled_from([(), (ON,)]),
    # One route per place: the kernel has no two.
    st.lists(_routes, max_size=4, unique_by=lambda r: r.slot or r).map(tuple),
    st.lists(_rules, max_size=4).map(tuple),
    st.lists(_chains, max_size=3, unique=True).map(tuple),
)


def made(have: KernelState, change: Change) -> KernelState:
    """`have` after the change, by nothing but what the change says."""
    if isinstance(change.old, tuple) or isinstance(change.new, tuple):
        assert have.firewall == change.old
        assert isinstance(change.new, tuple)
        return replace(have, firewall=change.new)
    kind = {
        Sysctl: "sysctls",
        Route: "routes",
        UnknownRoute: "routes",
        PolicyRule: "rules",
        UnknownRule: "rules",
    }[type(change.new or change.old)]
    items = list(getattr(have, kind))
    if change.old is not None:
        items.remove(change.old)
    if change.new is not None:
        items.append(change.new)
    return replace(have, **{kind: tuple(items)})


@given(states, states)
def test_diff_leads_from_any_state_to_any_state(have: KernelState, want: KernelState) -> None:
    for change in diff(have, want):
        have = made(have, change)
    assert diff(have, want) == ()
    assert sorted(map(str, have.rules)) == sorted(map(str, want.rules))
    assert sorted(map(str, have.routes)) == sorted(map(str, want.routes))
    assert have.sysctls == want.sysctls
    assert set(have.firewall) == set(want.firewall)


@given(states)
def test_nothing_differs_from_itself(state: KernelState) -> None:
    assert diff(state, state) == ()
    assert diff(state, replace(state, firewall=state.firewall[::-1])) == ()


@given(states, states)
def test_stages_never_go_back(have: KernelState, want: KernelState) -> None:
    stages = [change.stage for change in diff(have, want)]
    assert stages == sorted(stages)


def held(state: KernelState) -> frozenset[str]:
    """The sysctls that this state remembers."""
    return frozenset(
        name
        for item in (*state.routes, *state.rules)
        if isinstance(item, Route | PolicyRule)
        for name in remembered(item.protocol)
    )


def whole(protocol: int, table: int) -> KernelState:
    return KernelState(
        tuple(Sysctl(name, OURS) for name in MARK_SYSCTLS if name in remembered(protocol)),
        (Route(4, table, protocol), Route(6, table, protocol)),
        (PolicyRule(4, 1337, 0x539, 0xFFF, table, protocol),),
        (CHAIN,),
    )


@given(st.data())
def test_no_interruption_loses_the_memory_of_a_sysctl(data: st.DataObject) -> None:
    """Between any two writes: where a sysctl is set, something that is there says so."""
    kinds = st.just(EMPTY) | st.builds(whole, st.sampled_from(NUMBERS), st.sampled_from([133, 200]))
    have, want = data.draw(kinds), data.draw(kinds)
    if have.sysctls:  # somebody removed all but one survivor
        survivor = data.draw(st.sampled_from([*have.routes, *have.rules]))
        if isinstance(survivor, Route):
            have = replace(have, routes=(survivor,), rules=())
        if isinstance(survivor, PolicyRule):
            have = replace(have, routes=(), rules=(survivor,))
    for change in diff(have, want):
        have = made(have, change)
        assert {sysctl.name for sysctl in have.sysctls} <= held(have), change


def test_numbers_and_sysctls() -> None:
    """Of every set of sysctls the number, and back; none is anybody else's."""
    sets = [remembered(number) for number in NUMBERS]
    assert [number_for(names) for names in sets] == list(NUMBERS) == list(range(133, 141))
    assert len(set(sets)) == len(sets)
    assert sets[-1] == set(MARK_SYSCTLS)
    assert remembered(None) == remembered(NUMBERS.stop) == remembered(OURS - 1) == frozenset()


def test_a_number_that_forgets_one_sysctl_comes_after_it_is_put_back() -> None:
    both = whole(number_for(MARK_SYSCTLS[:2]), 133)
    stages = [change.stage for change in diff(both, whole(OURS_AND_SYSCTL, 133))]
    assert stages == [Stage.DROP_SYSCTL, Stage.DROP_RULE, Stage.DROP_ROUTE, Stage.DROP_ROUTE]


def test_interception_comes_last_and_goes_first() -> None:
    want = whole(OURS_AND_SYSCTL, 133)
    assert diff(EMPTY, want)[-1].stage is Stage.SET_FIREWALL
    assert diff(want, EMPTY)[0].stage is Stage.DROP_FIREWALL


def test_a_change_of_number_is_a_replacement() -> None:
    """Removed and added, the answers would have no way home in between."""
    ours, remembering = whole(OURS, 133), whole(OURS_AND_SYSCTL, 133)
    up = [(change.stage, change.old is not None) for change in diff(ours, remembering)]
    assert up == [
        (Stage.ADD_ROUTE, True),
        (Stage.ADD_ROUTE, True),
        (Stage.ADD_SYSCTL, False),
        (Stage.ADD_RULE, True),
    ]
    down = [(change.stage, change.new is not None) for change in diff(remembering, ours)]
    assert down == [
        (Stage.DROP_SYSCTL, False),
        (Stage.DROP_RULE, True),
        (Stage.DROP_ROUTE, True),
        (Stage.DROP_ROUTE, True),
    ]


def test_a_second_equal_rule_is_one_too_many() -> None:
    once = whole(OURS, 133)
    twice = replace(once, rules=once.rules * 2)
    (change,) = diff(twice, once)
    assert (change.old, change.new) == (once.rules[0], None)


def test_comments_are_not_compared() -> None:
    with_reason = replace(CHAIN, rules=(Rule((InInterface(("lo",)),), Verdict.ACCEPT, "a reason"),))
    have, want = KernelState(firewall=(CHAIN,)), KernelState(firewall=(with_reason,))
    assert diff(have, want) == ()


def test_the_order_of_rules_is_compared() -> None:
    one, two = Rule((PacketMark(1, 1),), Goto("a")), Rule((PacketMark(2, 2),), Goto("b"))
    have = KernelState(firewall=(Chain("c", None, (one, two)),))
    want = KernelState(firewall=(Chain("c", None, (two, one)),))
    assert len(diff(have, want)) == 1


def test_two_kinds_of_match_with_equal_fields_differ() -> None:
    have = KernelState(firewall=(Chain("c", None, (Rule((PacketMark(1, 1),), Verdict.DROP),)),))
    want = KernelState(firewall=(Chain("c", None, (Rule((ConnMark(1, 1),), Verdict.DROP),)),))
    assert len(diff(have, want)) == 1


def test_changes_in_words() -> None:
    remembering = whole(number_for(MARK_SYSCTLS), 133)
    texts = [str(change) for change in diff(EMPTY, remembering)]
    assert texts == [
        "add ip -4 route local default dev lo table 133 proto 140",
        "add ip -6 route local default dev lo table 133 proto 140",
        "set net.ipv4.tcp_fwmark_accept=133",
        "set net.ipv4.fwmark_reflect=133",
        "set net.ipv6.fwmark_reflect=133",
        "add ip -4 rule priority 1337 fwmark 0x539/0xfff lookup 133 protocol 140",
        "add the firewall rules (nft table inet tproxyd)",
    ]
    texts = [str(change) for change in diff(remembering, EMPTY)]
    assert texts[:4] == [
        "remove the firewall rules (nft table inet tproxyd)",
        "put net.ipv4.tcp_fwmark_accept back to 0",
        "put net.ipv4.fwmark_reflect back to 0",
        "put net.ipv6.fwmark_reflect back to 0",
    ]
    assert "replace" in str(diff(whole(OURS, 133), remembering)[0])


def test_render_shows_what_is_unknown() -> None:
    state = KernelState(
        routes=(UnknownRoute(4, "10.0.0.0/8 table 7 proto 133"),),
        rules=(UnknownRule(6, "priority 5 protocol 133"),),
        firewall=(Unknown("an empty table"),),
    )
    assert render(state) == (
        "# ip -4 route 10.0.0.0/8 table 7 proto 133\n"
        "# ip -6 rule priority 5 protocol 133\n"
        "something unknown: an empty table\n"
    )
