"""Which of a listener's upstreams a connection goes to, and which are left out for now.

Who they are comes from outside, as one picture of usable addresses (proc/upstreams.py resolves
names and runs the active checks). What a worker sees itself is added here: an upstream whose
connects fail `eject_after` times in a row is ejected, left out for `eject_s`, then tried with one
connection; each further failure doubles the time, up to a minute, and one success ends it. Only the
dialling counts: a connection that was there and broke says nothing about the next one. Where the
client's address is kept, a failure may be about the client (a firewall that knows it, a route that
its answers miss). So while others are being served, one client's failures in a row count once, and
further ones only when the same connection is then taken by another upstream.

Each worker keeps its own books: connections are spread over workers by the kernel's hash, so what
one sees is a fair sample, and nothing has to be shared. For least-connections that means the least
of this worker's.

Who is left out: one tried for this very connection before, one that is ejected, and, while a
client's address is to be kept, those of the other IP version, as long as there are any of its own.
If only ejected ones remain, one connection at a time tries the one whose time is up next, or
whoever comes back would stay unseen for up to a minute, with clients at the door; the others are
refused at once, as all are if nobody remains: a proxy that knows nobody to ask should not keep them
waiting. (Where addresses are kept it is one of each client: what one meets says little of others.)

source-hash is rendezvous hashing (highest random weight): of a set of upstreams every client has
its own order, so when one goes only its clients move, and when it is back they come back. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from hashlib import blake2b

from tproxyd.addr import Client, Endpoint, Upstream
from tproxyd.config import Balance, Listener

_LONGEST_S = 60.0
_SERVED_S = 10.0  # others are being served: the last of them so recently
_LOOK_S = 1.0  # addresses come and go (boot, DHCP, keepalived), and asking is a system call, 4 µs


class Member:
    """One upstream, as this worker knows it."""

    __slots__ = (
        "blamed_by",
        "doubted",
        "ejections",
        "failures",
        "here",
        "looked_at",
        "open",
        "out_until",
        "probing",
        "tried_by",
        "tried_until",
        "upstream",
    )

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.here, self.looked_at = False, float("-inf")  # whether it is an address of this host
        self.open = 0  # connections, those being made too
        self.failures = 0  # connects in a row
        self.ejections = 0  # without a success between them
        self.out_until = 0.0  # monotonic seconds
        self.probing = False  # its time is up, and one connection tries it again
        # While it is ejected: who tries it now, before its time or when that is up.
        self.tried_by, self.tried_until = "", 0.0
        self.blamed_by = ""  # whose failure counted last
        self.doubted = False  # that client's next failure did not


class Cluster:
    """The upstreams of one listener in one worker."""

    def __init__(
        self, listener: Listener, upstreams: Iterable[Endpoint], is_here: Callable[[str], bool]
    ) -> None:
        """`is_here`: whether a host is an address of this one (linux.AddressKinds)."""
        self._listener, self._is_here = listener, is_here
        self._members: dict[Endpoint, Member] = {}  # and those that are gone, while connected
        self._order: tuple[Member, ...] = ()
        self._next = 0
        self._served, self._served_at = "", float("-inf")  # the last client that was
        self._choice = {
            Balance.ROUND_ROBIN: self._in_turn,
            Balance.LEAST_CONNECTIONS: self._least,
            Balance.SOURCE_HASH: self._hashed,
        }[listener.balance]
        self._ranking = lru_cache(maxsize=4096)(self._rank)
        self.replace(upstreams)

    def replace(self, upstreams: Iterable[Endpoint]) -> None:
        """From now on it is these. What is known of those that stay is kept."""
        order = []
        for each in upstreams:
            upstream = Upstream(each)
            member = self._members.get(upstream)
            if member is None:
                member = self._members[upstream] = Member(upstream)
            order.append(member)
        self._order = tuple(order)
        self._members = {
            upstream: member
            for upstream, member in self._members.items()
            if member.open or member in self._order
        }
        self._ranking.cache_clear()

    def choose(self, client: Client, tried: Collection[Upstream], now: float) -> Member | None:
        """The one to connect to next, counted as connected to; None: there is nobody to ask.

        To be followed by exactly one of `failed`, and `left` when the connection is over.
        """
        order = self._order
        if tried:
            order = tuple(each for each in order if each.upstream not in tried)
        usable = self._fitting([each for each in order if each.out_until <= now], client)
        if usable:
            chosen = self._choice(usable, client) if len(usable) > 1 else usable[0]
        else:
            who = self._teller(client)
            idle = [each for each in order if each.tried_until <= now or each.tried_by != who]
            if not idle:
                return None
            chosen = min(self._fitting(idle, client), key=lambda each: each.out_until)
        if now - chosen.looked_at >= _LOOK_S:
            chosen.here, chosen.looked_at = self._is_here(chosen.upstream.host), now
        chosen.open += 1
        if chosen.ejections:  # this one tries it, and others wait for what comes of that
            until = now + self._listener.connect_timeout_s
            chosen.tried_by, chosen.tried_until = self._teller(client), until
            if usable:
                chosen.probing, chosen.out_until = True, until
        return chosen

    def _fitting(self, members: list[Member], client: Client) -> list[Member]:
        """Those of the client's IP version, where its address is kept and there are any."""
        if not self._listener.spoofs:
            return members
        v6 = ":" in client.host
        return [each for each in members if (":" in each.upstream.host) == v6] or members

    def _teller(self, client: Client) -> str:
        """Whom an upstream sees, and so whom its failure may be about; "": us, whoever it is."""
        return client.host if self._listener.spoofs else ""

    def _in_turn(self, usable: list[Member], _client: Client) -> Member:
        order = self._order
        for _ in order:
            member = order[self._next % len(order)]
            self._next = (self._next + 1) % len(order)
            if member in usable:
                return member
        raise AssertionError("usable members are of the order")

    def _least(self, usable: list[Member], client: Client) -> Member:
        fewest = min(each.open for each in usable)
        return self._in_turn([each for each in usable if each.open == fewest], client)

    def _hashed(self, usable: list[Member], client: Client) -> Member:
        return next(each for each in self._ranking(client.host) if each in usable)

    def _rank(self, host: str) -> list[Member]:
        """Every member, in the order that this client has for them."""

        def weight(member: Member) -> bytes:
            return blake2b(f"{host} {member.upstream}".encode(), digest_size=8).digest()

        return sorted(self._order, key=weight, reverse=True)

    def connected(self, member: Member, client: Client, now: float) -> bool:
        """It took a connection; whether that ends an ejection."""
        self._served, self._served_at = self._teller(client), now
        was_out = member.ejections > 0
        member.failures = member.ejections = 0
        member.out_until, member.probing, member.tried_until = 0.0, False, 0.0
        return was_out

    def failed(self, member: Member, client: Client, now: float, its_own: bool = True) -> float:
        """It did not; for how many seconds it is left out from now on, 0 for no change in that.

        Not `its_own` is what says nothing about it: no free source port.
        """
        self.left(member.upstream)
        member.tried_until = 0.0
        if not its_own:
            return 0.0
        who = self._teller(client)
        others_are_served = self._served != who and now - self._served_at < _SERVED_S
        if others_are_served and who == member.blamed_by:
            member.doubted = True
            if member.probing:  # somebody else's turn
                member.probing, member.out_until = False, now
            return 0.0
        member.blamed_by, member.doubted = who, False
        return self._count_failure(member, now)

    def served_elsewhere(self, upstream: Upstream, client: Client, now: float) -> float:
        """It failed a connection that another has taken since; as `failed`."""
        member = self._members.get(upstream)
        if member is None or not member.doubted or member.blamed_by != self._teller(client):
            return 0.0
        member.doubted = False
        return self._count_failure(member, now)

    def _count_failure(self, member: Member, now: float) -> float:
        member.failures += 1
        limit = self._listener.eject_after
        # Of a crowd that was dialling when it went away, only the first counts.
        out_already = now < member.out_until and not member.probing
        if not limit or member.failures < limit or out_already:
            return 0.0
        member.probing = False
        first = self._listener.eject_s
        # Whoever configures more than a minute means it.
        pause = min(first * 2.0 ** min(member.ejections, 60), max(first, _LONGEST_S))
        member.ejections += 1
        member.out_until = now + pause
        return pause

    def left(self, upstream: Upstream) -> None:
        """A connection to it is over."""
        member = self._members[upstream]
        member.open -= 1
        if not member.open and member not in self._order:
            del self._members[upstream]
