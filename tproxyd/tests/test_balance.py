"""Which upstream a connection goes to, and what its failures lead to."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tproxyd.addr import Client, Endpoint, Upstream
from tproxyd.config import Balance, Listener, SourceKind
from tproxyd.flow.balance import Cluster, Member

A, B, C = (Endpoint(f"10.0.0.{n}", 80) for n in (1, 2, 3))
B6 = Endpoint("fd00::2", 80)
CLIENT, CLIENT6 = Client(Endpoint("106.52.131.116", 40000)), Client(Endpoint("2001:db8::7", 40000))
LISTENER = Listener(bind="*", source=SourceKind.PROXY, eject_after=2, eject_s=1.0)


def cluster(*upstreams: Endpoint, listener: Listener = LISTENER, **more: object) -> Cluster:
    changed = replace(listener, upstream=upstreams, **more)  # type: ignore[arg-type]
    return Cluster(changed, upstreams, lambda host: host == A.host)


def chosen(
    of: Cluster, client: Client = CLIENT, now: float = 0.0, tried: tuple[Upstream, ...] = ()
) -> Member:
    member = of.choose(client, tried, now)
    assert member is not None
    return member


def some_client(n: int) -> Client:
    return Client(Endpoint(f"10.1.{n >> 8}.{n & 255}", 40000))


# Choosing -----------------------------------------------------------------------------------------


def test_in_turn() -> None:
    of = cluster(A, B, C)
    assert [chosen(of).upstream for _ in range(6)] == [A, B, C, A, B, C]


def test_the_least_of_connections() -> None:
    of = cluster(A, B, C, balance=Balance.LEAST_CONNECTIONS)
    assert {chosen(of).upstream for _ in range(3)} == {A, B, C}
    of.left(Upstream(B))
    assert chosen(of).upstream == B
    of.left(Upstream(C))
    assert chosen(of).upstream == C


def test_by_the_clients_address() -> None:
    of = cluster(A, B, C, balance=Balance.SOURCE_HASH)
    first = {n: chosen(of, some_client(n)).upstream for n in range(300)}
    again = cluster(C, A, B, balance=Balance.SOURCE_HASH)  # another worker, another order
    assert all(chosen(again, some_client(n)).upstream == first[n] for n in first)
    assert min(Counter(first.values()).values()) > 60
    other_port = Client(Endpoint(some_client(7).host, 1))
    assert chosen(of, other_port).upstream == first[7]


def test_only_the_clients_of_one_that_goes_are_moved() -> None:
    of = cluster(A, B, C, balance=Balance.SOURCE_HASH)
    first = {n: chosen(of, some_client(n)).upstream for n in range(300)}
    of.replace([A, C])
    moved = {n for n in first if chosen(of, some_client(n)).upstream != first[n]}
    assert moved == {n for n, upstream in first.items() if upstream == B}
    of.replace([A, B, C])
    assert all(chosen(of, some_client(n)).upstream == first[n] for n in first)


@pytest.mark.parametrize("balance", Balance)
def test_one_that_was_tried_is_not_chosen_again(balance: Balance) -> None:
    of = cluster(A, B, C, balance=balance)
    tried: tuple[Upstream, ...] = ()
    for _ in range(3):
        tried += (chosen(of, tried=tried).upstream,)
    assert set(tried) == {A, B, C}
    assert of.choose(CLIENT, tried, 0.0) is None


def test_a_client_whose_address_is_kept_stays_in_its_family() -> None:
    of = cluster(A, B6, C, source=SourceKind.CLIENT)
    assert {chosen(of).upstream for _ in range(4)} == {A, C}
    assert {chosen(of, CLIENT6).upstream for _ in range(4)} == {B6}
    assert chosen(of, CLIENT6, tried=(Upstream(B6),)).upstream in {A, C}  # better than nobody
    mixed = cluster(A, B6)
    assert {chosen(mixed).upstream for _ in range(4)} == {A, B6}


def test_who_is_on_this_host() -> None:
    of = cluster(A, B)
    assert {member.upstream: member.here for member in (chosen(of), chosen(of))} == {
        A: True,
        B: False,
    }


def test_an_address_that_comes_to_this_host_is_noticed() -> None:
    ours: set[str] = set()
    of = Cluster(replace(LISTENER, upstream=(A,)), (A,), lambda host: host in ours)
    assert not chosen(of).here
    ours.add(A.host)
    assert not chosen(of, now=0.9).here
    assert chosen(of, now=1.0).here


def test_nobody_is_known() -> None:
    assert cluster().choose(CLIENT, (), 0.0) is None


# Ejection -----------------------------------------------------------------------------------------


def fails(of: Cluster, now: float, wanted: Endpoint = A, client: Client = CLIENT) -> float:
    member = chosen(of, client, now)
    assert member.upstream == wanted
    return of.failed(member, client, now)


def test_failures_in_a_row_eject() -> None:
    of = cluster(A)
    assert fails(of, 0.0) == 0.0
    assert fails(of, 0.0) == 1.0
    of.replace([A, B])
    assert {chosen(of, now=0.9).upstream for _ in range(3)} == {B}


def test_where_all_are_ejected_one_connection_at_a_time_tries() -> None:
    """The one whose time is up next; whoever comes back is seen by the next client."""
    of = cluster(A, B, eject_after=1, eject_s=60.0)
    assert fails(of, 0.0, A) == 60.0
    assert fails(of, 1.0, B) == 60.0
    early = chosen(of, now=2.0)
    assert early.upstream == A
    second = chosen(of, now=2.0)
    assert second.upstream == B
    assert of.choose(CLIENT, (), 2.0) is None
    assert of.choose(CLIENT, (early.upstream,), 2.0) is None
    assert of.failed(early, CLIENT, 3.0) == 0.0  # nothing new
    assert fails(of, 3.0, A) == 0.0
    assert of.connected(second, CLIENT, 4.0)
    assert {chosen(of, now=4.0).upstream for _ in range(3)} == {B}


def test_one_that_tries_before_the_time_and_is_never_heard_of_again() -> None:
    of = cluster(A, eject_after=1, eject_s=60.0, connect_timeout_s=5.0)
    fails(of, 0.0)
    of.left(chosen(of, now=1.0).upstream)  # its client left while it waited
    assert of.choose(CLIENT, (), 5.9) is None
    assert chosen(of, now=6.0).upstream == A


# Where the upstream sees the client ---------------------------------------------------------------

SEEN = replace(LISTENER, source=SourceKind.CLIENT)
BANNED, SOUND = some_client(1), some_client(2)


def test_what_one_client_meets_is_no_reason_while_others_are_served() -> None:
    """A firewall at the upstream drops it, say."""
    of = cluster(A, listener=SEEN)
    for second in range(20):
        assert fails(of, second, client=BANNED) == 0.0
        of.connected(chosen(of, SOUND, second), SOUND, second)
    for n in range(9):
        assert fails(of, 20.0, client=BANNED) == 0.0, n


def test_what_it_meets_at_one_alone_is() -> None:
    """A connection that another upstream takes: it was not the client."""
    of, not_b = cluster(A, B, listener=SEEN, eject_after=3), (Upstream(B),)
    of.connected(chosen(of, SOUND, tried=not_b), SOUND, 0.0)
    pauses = []
    for _ in range(3):
        of.connected(chosen(of, SOUND, tried=(Upstream(A),)), SOUND, 0.0)
        assert of.failed(chosen(of, CLIENT, tried=not_b), CLIENT, 0.0) == 0.0
        of.connected(chosen(of, CLIENT, tried=(Upstream(A),)), CLIENT, 0.0)
        pauses.append(of.served_elsewhere(Upstream(A), CLIENT, 0.0))
        assert of.served_elsewhere(Upstream(A), CLIENT, 0.0) == 0.0
    assert pauses == [0.0, 0.0, 1.0]
    assert of.served_elsewhere(Upstream(C), CLIENT, 0.0) == 0.0  # it is no more


def test_what_several_clients_meet_is() -> None:
    of = cluster(A, listener=SEEN)
    of.connected(chosen(of, SOUND), SOUND, 0.0)
    assert fails(of, 1.0, client=BANNED) == 0.0
    assert fails(of, 1.0, client=SOUND) == 1.0


def test_so_is_what_the_only_client_meets() -> None:
    """A balancer in front, say, that sends no header."""
    of = cluster(A, listener=SEEN)
    of.connected(chosen(of), CLIENT, 0.0)
    assert [fails(of, 1.0), fails(of, 1.0)] == [0.0, 1.0]


def test_who_is_not_served_keeps_nobody_from_trying() -> None:
    of = cluster(A, listener=SEEN, eject_after=1, eject_s=60.0)
    assert fails(of, 0.0, client=BANNED) == 60.0
    assert chosen(of, BANNED, 1.0).upstream == A
    assert of.choose(BANNED, (), 1.0) is None
    assert of.connected(chosen(of, SOUND, 1.0), SOUND, 1.0)


def test_who_is_not_served_spoils_no_probe() -> None:
    """Its time was up, and of all clients it was this one that tried it: the next one may."""
    of, not_b = cluster(A, B, listener=SEEN, eject_after=1), (Upstream(B),)
    of.connected(chosen(of, SOUND, tried=not_b), SOUND, 0.0)
    assert of.failed(chosen(of, BANNED, tried=not_b), BANNED, 0.0) == 1.0
    assert of.failed(chosen(of, BANNED, 1.0, not_b), BANNED, 2.0) == 0.0
    assert of.connected(chosen(of, SOUND, 2.0, not_b), SOUND, 2.0)


# Ejection, by and by ------------------------------------------------------------------------------


def test_a_success_between_them_does_not() -> None:
    of = cluster(A)
    for _ in range(5):
        assert fails(of, 0.0) == 0.0
        assert not of.connected(chosen(of), CLIENT, 0.0)


def test_what_says_nothing_about_it_does_not() -> None:
    of = cluster(A)
    for _ in range(5):
        of.failed(chosen(of), CLIENT, 0.0, its_own=False)
    assert chosen(of).open == 1


def test_it_is_tried_by_one_connection_and_then_for_twice_as_long() -> None:
    of, now, pauses = cluster(A), 0.0, []
    fails(of, now)
    pauses.append(fails(of, now))
    for _ in range(8):
        now += pauses[-1]
        probe = chosen(of, now=now)
        assert of.choose(CLIENT, (), now) is None  # the others wait for what comes of that
        now += 0.5
        pauses.append(of.failed(probe, CLIENT, now))
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    now += 60
    assert of.connected(chosen(of, now=now), CLIENT, now)
    assert fails(of, now) == 0.0
    assert fails(of, now) == 1.0  # from the beginning


def test_a_probe_that_was_never_answered_is_made_again() -> None:
    """Its client left while it waited."""
    of = cluster(A)
    fails(of, 0.0)
    fails(of, 0.0)
    of.left(chosen(of, now=1.0).upstream)
    assert of.choose(CLIENT, (), 5.9) is None
    assert chosen(of, now=6.0).upstream == A


def test_a_crowd_that_fails_together_ejects_once() -> None:
    of = cluster(A, B)
    crowd = [chosen(of, tried=(Upstream(B),)) for _ in range(64)]
    assert [of.failed(member, CLIENT, 0.0) for member in crowd].count(1.0) == 1
    assert {chosen(of, now=0.5).upstream for _ in range(2)} == {B}
    assert {chosen(of, now=1.0).upstream for _ in range(2)} == {A, B}


def test_ejecting_can_be_off() -> None:
    of = cluster(A, eject_after=0)
    assert [fails(of, 0.0) for _ in range(9)] == [0.0] * 9


def test_a_first_pause_of_more_than_a_minute() -> None:
    of = cluster(A, eject_s=90.0)
    assert [fails(of, 0.0), fails(of, 0.0), fails(of, 90.0)] == [0.0, 90.0, 90.0]


def test_a_new_picture_keeps_what_is_known() -> None:
    of = cluster(A, B)
    fails(of, 0.0)
    of.left(chosen(of).upstream)  # B
    fails(of, 0.0)
    of.replace([C, A])
    assert {chosen(of, now=0.5).upstream for _ in range(3)} == {C}


# The books ----------------------------------------------------------------------------------------


class Books(RuleBasedStateMachine):
    """Upstreams come and go while connections to them live and end."""

    def __init__(self) -> None:
        super().__init__()
        self.of = cluster(A, B, balance=Balance.LEAST_CONNECTIONS)
        self.now = 0.0
        self.dialling: list[Member] = []
        self.living: list[Upstream] = []
        self.picture: set[Endpoint] = {A, B}

    @rule(picture=st.sets(st.sampled_from([A, B, C, B6])))
    def replace(self, picture: set[Endpoint]) -> None:
        self.picture = picture
        self.of.replace(sorted(picture))

    @rule()
    def choose(self) -> None:
        member = self.of.choose(CLIENT, (), self.now)
        if member is not None:
            assert member.upstream in self.picture
            self.dialling.append(member)

    @precondition(lambda self: self.dialling)
    @rule(data=st.data(), success=st.booleans())
    def answer(self, data: st.DataObject, success: bool) -> None:
        member = self.dialling.pop(data.draw(st.integers(0, len(self.dialling) - 1)))
        if success:
            self.of.connected(member, CLIENT, self.now)
            self.living.append(member.upstream)
        else:
            self.of.failed(member, CLIENT, self.now)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.of.left(self.living.pop(data.draw(st.integers(0, len(self.living) - 1))))

    @rule(seconds=st.sampled_from([0.5, 1.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def open_is_what_is_open(self) -> None:
        living = Counter([*self.living, *(member.upstream for member in self.dialling)])
        known = self.of._members
        assert {upstream: known[upstream].open for upstream in living} == living
        assert known.keys() == self.picture | living.keys()


TestBooks = Books.TestCase
