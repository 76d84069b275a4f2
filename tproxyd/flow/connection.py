"""The life of a connection, in walking order. Start reading here.

`serve` is a generator: it yields what it waits for and is resumed by the engine (stream.py says
how), so the story stays straight, and a test drives it without sockets. Most walks never wait. It
ends in the relay, two plain objects that live on without it; so nothing of the walk is kept while
a connection is open, and of what it has read no more than its record needs, the header. Whatever
happens on the way, there is exactly one record in the end, with exactly one close reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from tproxyd.addr import Client, Endpoint, OriginalDst, Peer, Upstream
from tproxyd.config import HeaderPolicy, Listener, Scope
from tproxyd.errors import NO_MEMORY, CloseReason, PeerError, UpstreamError
from tproxyd.flow.announce import Announcer
from tproxyd.flow.balance import Cluster
from tproxyd.flow.connect import Dialled, Network, dial
from tproxyd.flow.origdst import original_destination
from tproxyd.flow.policy import OwnSockets, Plan, Refusal, client_of, is_own, plan_for
from tproxyd.flow.proxyproto import (
    NEED_MORE,
    NOT_PROXY,
    V1_SIGNATURE,
    V2_SIGNATURE,
    Header,
    parse,
)
from tproxyd.flow.record import Record
from tproxyd.flow.relay import DONTWAIT, Limits, Relay
from tproxyd.flow.stream import Step, Stream, Wait
from tproxyd.flow.tally import HeaderResult

# Of a client that is never asked for a header, what is read before its upstream is connected: a
# request's head or a TLS hello. The rest comes through the relay.
_AT_HAND = 16 * 1024
_SIGNED = (V1_SIGNATURE, V2_SIGNATURE)


class World(Network, Protocol):
    """All that a connection touches beyond its own sockets: the worker, or a test's stand-in."""

    view: memoryview  # the receive buffer, shared: what it holds is good until the next wait

    def opened(self, lane: Lane) -> bool: ...
    def kind_of(self, host: str) -> str: ...
    def count_header(self, version: str, result: HeaderResult) -> None: ...
    def count_fallback(self, cause: str) -> None: ...
    def count_left_out(self, tlvs: int) -> None: ...
    def count_retry(self, lane: Lane) -> None: ...
    def admits(self, lane: Lane, client: Client) -> str:
        """ "" and the client counts from now on; or the limit that stands against it."""
        ...

    def connected(self, seconds: float) -> None: ...
    def ejected(self, lane: Lane, upstream: Upstream, seconds: float, why: str) -> None: ...
    def returned(self, lane: Lane, upstream: Upstream) -> None: ...
    def ended(
        self, lane: Lane, life: Record, downstream: Stream, upstream: Stream | None, aborted: bool
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Lane:
    """A listener as its connections need it: its configuration, made ready once per worker."""

    listener: Listener
    expectation: Callable[[str], HeaderPolicy | None]  # policy.trust()
    own: OwnSockets
    limits: Limits
    announce: Announcer | None = None  # the PROXY header that the upstream gets
    cluster: Cluster | None = None  # None: where the client meant to go
    destination: Callable[[Stream], OriginalDst] = original_destination
    door: Callable[[Stream], Endpoint] | None = None  # where nat delivers its connections
    counts_clients: bool = False
    index: int = 0


class Passage(Relay):
    """The relay of a connection, which knows what to do when it is over."""

    __slots__ = ("_lane", "_world", "life")

    def __init__(
        self,
        lane: Lane,
        life: Record,
        world: World,
        both: tuple[Stream, Stream],
        early: bytes,
        own: int,
    ) -> None:
        """The first `own` bytes of `early` are a header of ours."""
        super().__init__(*both, early, lane.limits)
        self._lane, self.life, self._world = lane, life, world
        self.up.delivered = -own  # our own words are no payload

    def finished(self, reason: CloseReason, detail: str, aborted: bool) -> None:
        life, up, down = self.life, self.up, self.down
        life.reason, life.detail = reason, detail
        life.received, life.sent = max(up.delivered, 0), down.delivered
        self._world.ended(self._lane, life, up.source, down.source, aborted)


def serve(
    downstream: Stream, peer: Peer, lane: Lane, world: World
) -> Generator[Wait, bool, Relay | None]:
    """From the accepted socket to the relay; or, when it comes to nothing, to its record.

    Both sockets are closed by whoever has the last word, by RST unless both ended in order.
    """
    listener = lane.listener
    life = Record(listener, peer, world.now(), time.time())
    upstream: Dialled | None = None
    relay: Relay | None = None
    try:
        if not world.opened(lane):
            raise PeerError(CloseReason.OVERLOAD, f"max_connections = {listener.max_connections}")
        life.dst = lane.destination(downstream)
        expected = lane.expectation(peer.host)
        if expected is None:
            early = read_what_is_here(downstream, world)
        else:
            life.header, early = yield from read_header(downstream, expected, listener, world)
        told = client_of(peer, life.dst, life.header, listener, lane.own, world.kind_of)
        client = agreed(told, lane, life, world)
        own, said = b"", None
        if lane.announce is not None:
            own, said = lane.announce(client, life.dst, life.header)
        early = own + early
        began = world.now()
        if lane.cluster is None:
            here = listener.intercept.scope is Scope.LOCAL
            plan = planned(client, Upstream(life.dst), here, downstream, lane, life, world)
            deadline = began + listener.connect_timeout_s
            upstream = yield from dial(plan, deadline, downstream, world, bool(early))
        else:
            upstream = yield from dial_one_of(
                lane.cluster, client, downstream, lane, life, world, bool(early)
            )
        world.connected(world.now() - began)
        life.source, life.announced = upstream.source, said
        if said is not None and said.left_out:
            world.count_left_out(said.left_out)
        relay = Passage(lane, life, world, (downstream, upstream.stream), early, len(own))
    except (PeerError, UpstreamError) as failure:
        life.reason, life.detail = failure.reason, failure.detail
    except (OSError, MemoryError) as error:
        life.reason, life.detail = CloseReason.INTERNAL, str(error) or NO_MEMORY
    finally:
        if relay is None:
            world.ended(lane, life, downstream, upstream and upstream.stream, aborted=True)
    return relay


def read_what_is_here(downstream: Stream, world: World) -> bytes:
    """Payload that has come already, of a peer that is never asked for a header. Raises PeerError.

    Up to _AT_HAND; the rest goes through the relay.
    """
    n = read(downstream, world, _AT_HAND)
    return bytes(world.view[:n]) if n else b""


def read_header(
    downstream: Stream, expected: HeaderPolicy, listener: Listener, world: World
) -> Step[tuple[Header | None, bytes]]:
    """The PROXY header, if there is one, and the payload that is here already. Raises PeerError.

    Never more than max_header_bytes are asked for at once, and nothing behind the header, so that
    is also the most that payload can be.
    """
    deadline = world.now() + listener.header_timeout_s
    got = bytearray()
    while True:
        n = read(downstream, world, listener.max_header_bytes)
        if n is None:
            if (yield Wait(downstream, deadline)) or world.now() < deadline:
                continue
            if expected is not HeaderPolicy.REQUIRE and not got.startswith(_SIGNED):
                # It waits for the application to speak first, as SMTP and SSH clients do; or for
                # its answer to what may be the first byte of a signature, and is none.
                world.count_header("-", HeaderResult.ABSENT)
                return None, bytes(got)
            world.count_header("-", HeaderResult.TIMEOUT)
            raise PeerError(
                CloseReason.HEADER_TIMEOUT,
                f"{len(got)} bytes, no whole header, in {listener.header_timeout_s:g} s",
            )
        got += world.view[:n]
        try:
            header = parse(got, listener.max_header_bytes)
        except PeerError:
            world.count_header("1" if got[:1] == b"P" else "2", HeaderResult.INVALID)
            raise
        if n == 0 and header is NEED_MORE:
            if got.startswith(_SIGNED):  # and cut off
                world.count_header("1" if got[:1] == b"P" else "2", HeaderResult.INVALID)
                raise PeerError(CloseReason.HEADER_INVALID, f"it ends after {len(got)} bytes")
            header = NOT_PROXY
        if header is NEED_MORE:
            continue
        if isinstance(header, Header):
            if expected is HeaderPolicy.REJECT:
                world.count_header(str(header.version), HeaderResult.REJECTED)
                raise PeerError(CloseReason.HEADER_REJECTED, "this peer may not send one")
            return header, bytes(got[header.size :])
        if expected is HeaderPolicy.REQUIRE:
            world.count_header("-", HeaderResult.MISSING)
            what = f"{len(got)} bytes of payload came" if got else "it closed without a byte"
            raise PeerError(CloseReason.HEADER_MISSING, f"a PROXY header is required: {what}")
        world.count_header("-", HeaderResult.ABSENT)
        return None, bytes(got)


def read(downstream: Stream, world: World, size: int) -> int | None:
    """How many bytes came into the world's view; None when none are here. Raises PeerError."""
    try:
        return downstream.recv_into(world.view, size, DONTWAIT)
    except BlockingIOError:
        return None
    except OSError as error:
        raise PeerError(CloseReason.DOWNSTREAM_RESET, error.strerror or "") from None


def agreed(told: Client | Refusal, lane: Lane, life: Record, world: World) -> Client:
    """The client, written down; a refusal, or a limit of that client, is raised as PeerError."""
    refused = isinstance(told, Refusal)
    if life.header is not None:
        named = HeaderResult.LOCAL if life.header.source is None else HeaderResult.ACCEPTED
        world.count_header(str(life.header.version), HeaderResult.REFUSED if refused else named)
    if isinstance(told, Refusal):
        raise PeerError(told.reason, told.detail)
    limit = world.admits(lane, told) if lane.counts_clients else ""
    life.client = told  # only now: what has a client has entered, and leaves in the end
    if limit:
        raise PeerError(CloseReason.CLIENT_OVERLOAD, f"{limit} for {told.host}")
    return told


def planned(
    client: Client,
    upstream: Upstream,
    here: bool,
    downstream: Stream,
    lane: Lane,
    life: Record,
    world: World,
) -> Plan:
    """How to connect there, written down."""
    door = None if lane.door is None else lane.door(downstream)
    plan = plan_for(client, upstream, lane.listener, here, door)
    life.upstream, life.fallback = plan.upstream, plan.fallback
    if plan.fallback:
        world.count_fallback(plan.fallback)
    return plan


# What may say something about the upstream; the others are about us, or this client.
_ITS_FAILURES = frozenset(
    (
        CloseReason.UPSTREAM_REFUSED,
        CloseReason.UPSTREAM_UNREACHABLE,
        CloseReason.UPSTREAM_TIMEOUT,
        CloseReason.UPSTREAM_RESET,
    )
)


def dial_one_of(
    cluster: Cluster,
    client: Client,
    downstream: Stream,
    lane: Lane,
    life: Record,
    world: World,
    speaks: bool,
) -> Step[Dialled]:
    """Connected to the first upstream that takes it. Raises UpstreamError, OSError.

    Nothing was sent to those before it, so trying the next one is always safe. What went wrong with
    each is written down.
    """
    listener, tried = lane.listener, life.tried
    while True:
        member = cluster.choose(client, [upstream for upstream, _ in tried], world.now())
        if member is None:
            if tried:
                break
            raise UpstreamError(CloseReason.NO_UPSTREAM, "every upstream is down or unknown")
        upstream = member.upstream
        if tried:
            world.count_retry(lane)
        try:
            if member.here and is_own(upstream, lane.own):
                raise PeerError(CloseReason.LOOP, f"the upstream {upstream} is our own listener")
            plan = planned(client, upstream, member.here, downstream, lane, life, world)
            deadline = world.now() + listener.connect_timeout_s
            dialled = yield from dial(plan, deadline, downstream, world, speaks)
        except UpstreamError as failure:
            its_own = failure.reason in _ITS_FAILURES
            pause = cluster.failed(member, client, world.now(), its_own)
            if pause:
                world.ejected(lane, upstream, pause, failure.detail)
            last = failure
            tried = life.tried = (*tried, (upstream, failure.detail))
            if len(tried) >= listener.max_connect_attempts:
                break
        except BaseException:  # cut, while it waits
            cluster.left(upstream)
            raise
        else:
            if cluster.connected(member, client, world.now()):
                world.returned(lane, upstream)
            for other, why in tried:
                pause = cluster.served_elsewhere(other, client, world.now())
                if pause:
                    world.ejected(lane, other, pause, why)
            return dialled
    raise last
