"""The one topology of all tests: a pod with a client on one side and a neighbour on the other.

    client                    pod                              beyond
    10.9.1.2      c0 ══ p0    10.9.1.1    10.9.2.1   p1 ══ b0  10.9.2.2
    fd00:9:1::2               fd00:9:1::1 fd00:9:2::1          fd00:9:2::2

    beyond                    world
    106.52.131.1    b1 ══ w0  106.52.131.116
    2001:db8:6a::1            2001:db8:6a::34

The application and tproxyd live in the pod. `client` and `beyond` have the pod as their default
router, so a test can make the pod forward between them. `beyond` is the load balancer that speaks
for others, or the untrusted peer that pretends to, or the far end of forwarded traffic; `world` is
whom it speaks for, and the pod has no route there. Both are built only when a test touches them.
"""

from __future__ import annotations

import contextlib
import socket
from functools import cached_property, partial
from types import TracebackType
from typing import NamedTuple

from lib.netns import SOCKET_TIMEOUT_S, Namespace
from lib.waits import wait_for

PORT = 80  # of the application


class Family(NamedTuple):
    """The addresses of one IP version."""

    name: str
    client: str
    pod: str  # as the client reaches it
    pod_beyond: str  # as `beyond` reaches it
    beyond: str
    stranger: str  # a client that the pod meets in PROXY headers only; it lives in `world`
    beyond_world: str  # `beyond` as `world` reaches it

    def __str__(self) -> str:
        return self.name


V4 = Family(
    name="v4",
    client="10.9.1.2",
    pod="10.9.1.1",
    pod_beyond="10.9.2.1",
    beyond="10.9.2.2",
    stranger="106.52.131.116",
    beyond_world="106.52.131.1",
)
V6 = Family(
    name="v6",
    client="fd00:9:1::2",
    pod="fd00:9:1::1",
    pod_beyond="fd00:9:2::1",
    beyond="fd00:9:2::2",
    stranger="2001:db8:6a::34",
    beyond_world="2001:db8:6a::1",
)


def seen_port(port: int) -> int:
    """The port that the application sees for a client's port, when nothing is in its way.

    Published: it is how a reader of the application's log finds the client's own port.
    """
    return 1024 + (port - 1024 + 30_000) % 64_512


def _is_routed(namespace: Namespace, address: str) -> bool:
    return f"local {address} " in namespace.run("ip", "-6", "route", "show", "table", "local")


class Pair(NamedTuple):
    """Both ends of one proxied connection."""

    client: socket.socket
    app: socket.socket


class Topology:
    """`with Topology() as net:`; everything it made, sockets too, is gone afterwards.

    `pod` may be a namespace that there is already: of a container, say.
    """

    def __init__(self, pod: Namespace | None = None) -> None:
        self._given = pod
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Topology:
        try:
            self.client = self._exit.enter_context(Namespace("client"))
            self.pod = self._given or self._exit.enter_context(Namespace("pod"))
            self._join(self.client, "c0", self.pod, "p0", V4.client, V4.pod, V6.client, V6.pod)
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.close()

    @cached_property
    def beyond(self) -> Namespace:
        beyond = self._exit.enter_context(Namespace("beyond"))
        self._join(beyond, "b0", self.pod, "p1", V4.beyond, V4.pod_beyond, V6.beyond, V6.pod_beyond)
        return beyond

    @cached_property
    def world(self) -> Namespace:
        world = self._exit.enter_context(Namespace("world"))
        v4, v6 = (V4.stranger, V4.beyond_world), (V6.stranger, V6.beyond_world)
        self._join(world, "w0", self.beyond, "b1", *v4, *v6)
        return world

    def _join(
        self, leaf: Namespace, a: str, hub: Namespace, b: str, a4: str, b4: str, a6: str, b6: str
    ) -> None:
        """A veth pair between them, with addresses, and the hub as the leaf's default router.

        nodad: else an IPv6 address is tentative until a kernel worker has run (addrconf_dad_begin),
        even where accept_dad is 0; bind() refuses it till then, and connect() takes another one.
        """
        leaf.ip(f"link add {a} type veth peer name {b} netns {hub.name}")
        hub.ip(f"addr add {b4}/24 dev {b}", f"addr add {b6}/64 dev {b} nodad", f"link set {b} up")
        leaf.ip(
            f"addr add {a4}/24 dev {a}",
            f"addr add {a6}/64 dev {a} nodad",
            f"link set {a} up",
            f"route add default via {b4}",
            f"route add default via {b6}",
        )
        # A link has its carrier a moment after it is up, and its IPv6 addresses their routes then:
        # who compares what there was before with what there is later wants to see them in both.
        for namespace, address in ((leaf, a6), (hub, b6)):
            wait_for(partial(_is_routed, namespace, address), f"{address} to be usable")

    def keep(self, sock: socket.socket) -> socket.socket:
        """`sock`, closed when the topology goes; accepted ones come without a time limit."""
        if sock.gettimeout() is None:
            sock.settimeout(SOCKET_TIMEOUT_S)
        return self._exit.enter_context(contextlib.closing(sock))

    @cached_property
    def app_v4(self) -> socket.socket:
        return self.keep(self.pod.listen("0.0.0.0", PORT))

    @cached_property
    def app_v6(self) -> socket.socket:
        return self.keep(self.pod.listen("::", PORT))

    def app(self, family: Family = V4) -> socket.socket:
        """The application's listening socket."""
        return self.app_v6 if family is V6 else self.app_v4

    def connect(
        self, family: Family = V4, port: int = PORT, source: str = "", source_port: int = 0
    ) -> socket.socket:
        """A client's connection to the pod."""
        return self.keep(self.client.connect(family.pod, port, source, source_port))

    def connect_and_end(self, family: Family = V4, port: int = PORT) -> None:
        """A client's connection that the daemon ends at once, before or after connect() returns."""
        with contextlib.suppress(ConnectionResetError):
            assert self.connect(family, port).recv(1) == b""

    def connect_beyond(self, family: Family = V4, port: int = PORT) -> socket.socket:
        """The neighbour's connection to the pod."""
        return self.keep(self.beyond.connect(family.pod_beyond, port))

    def connect_world(self, family: Family, port: int) -> socket.socket:
        """A stranger's connection to the load balancer."""
        return self.keep(self.world.connect(family.beyond_world, port))

    def accept(self, family: Family = V4) -> socket.socket:
        """The application's end of the next connection that reaches it."""
        return self.keep(self.app(family).accept()[0])

    def pair(self, family: Family = V4) -> Pair:
        """A new connection from the client, and what the application got of it."""
        self.app(family)
        client = self.connect(family)
        app = self.accept(family)
        return Pair(client, app)

    def app_saw_nothing(self, family: Family = V4) -> bool:
        """No connection waits at the application."""
        listener = self.app(family)
        listener.setblocking(False)
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            return True
        finally:
            listener.settimeout(10.0)
        return False
