"""Which of a listener's upstreams a connection goes to, and which are left out for now.

Who they are comes from outside, as one picture of usable addresses (proc/upstreams.py resolves
names and runs the active checks). What a worker sees itself is added here: an upstream whose
connects fail `eject_after` times in a row is ejected, left out for `eject_s`, then tried with one
connection; each further failure doubles the time, up to a minute, and one success ends it. Only the
dialling counts: a connection that was there and broke says nothing about the next one.

Each worker keeps its own books: connections are spread over workers by the kernel's hash, so what
one sees is a fair sample, and nothing has to be shared. For least-connections that means the least
of this worker's.

Who is left out: one tried for this very connection before, one that is ejected, and, while a
client's address is to be kept, those of the other IP version, as long as there are any of its own.
If nobody remains the client is refused at once: a proxy that knows nobody to ask should not keep it
waiting.

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


class Member:
    """One upstream, as this worker knows it."""

    __slots__ = ("ejections", "failures", "here", "open", "out_until", "probing", "upstream")

    def __init__(self, upstream: Upstream, here: bool) -> None:
        self.upstream = upstream
        self.here = here  # it is an address of this host
        self.open = 0  # connections, those being made too
        self.failures = 0  # connects in a row
        self.ejections = 0  # without a success between them
        self.out_until = 0.0  # monotonic seconds
        self.probing = False  # one connection tries it again


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
                member = Member(upstream, self._is_here(upstream.host))
                self._members[upstream] = member
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
        usable = [
            each
            for each in self._order
            if each.out_until <= now and not (tried and each.upstream in tried)
        ]
        if self._listener.spoofs:
            v6 = ":" in client.host
            usable = [each for each in usable if (":" in each.upstream.host) == v6] or usable
        if not usable:
            return None
        chosen = self._choice(usable, client) if len(usable) > 1 else usable[0]
        chosen.open += 1
        if chosen.ejections:  # this one tries it, and others wait for what comes of that
            chosen.probing = True
            chosen.out_until = now + self._listener.connect_timeout_s
        return chosen

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

    def connected(self, member: Member) -> bool:
        """It took a connection; whether that ends an ejection."""
        was_out = member.ejections > 0
        member.failures = member.ejections = 0
        member.out_until, member.probing = 0.0, False
        return was_out

    def failed(self, member: Member, now: float, its_own: bool = True) -> float:
        """It did not; for how many seconds it is left out from now on, 0 for no change in that.

        Not `its_own` is what says nothing about it: no free source port.
        """
        self.left(member.upstream)
        if not its_own:
            return 0.0
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
