"""The kernel of this machine, as reconcile sees it: its parts in one, and the lock.

The lock is an abstract unix socket: such names belong to the network namespace, as the state does,
vanish with the process that bound them, and need no file, which containers with a read-only root
would not have. Who finds it taken connects to it and waits for the connection to end.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from tproxyd.config import Backend, ReturnPath
from tproxyd.errors import KernelError
from tproxyd.kernel import routewriter, xtables
from tproxyd.kernel.desired import Facts
from tproxyd.kernel.firewall import Family, Firewall, Table
from tproxyd.kernel.nft import Nft
from tproxyd.kernel.ownership import Own
from tproxyd.kernel.routewriter import RouteWriter
from tproxyd.kernel.routing import Routing
from tproxyd.kernel.state import Change, KernelState, Tables

if TYPE_CHECKING:
    from tproxyd.kernel.iptables import Iptables
    from tproxyd.kernel.legacy import Legacy

LOCK_NAME = "\0tproxyd/kernel"
# A whole reconcile takes tens of milliseconds, an nft command of an overloaded machine seconds.
LOCK_PATIENCE_S = 10.0


class Machine:
    """The kernel of this machine, in the network namespace of the calling thread."""

    def __init__(
        self, nft: Nft | None = None, *, adopt: bool = False, writer: RouteWriter | None = None
    ) -> None:
        """`adopt`: the chains of istio-iptables are taken for ours, whoever has made them.

        `writer` is for the first `lock`.
        """
        self._nft = nft or Nft()
        self._adopt = adopt
        self._routing = Routing(writer)
        self.backend: Backend | None = None  # settled
        self._path: ReturnPath | None = None

    @functools.cached_property
    def _backends(self) -> dict[Backend, Iptables | Legacy]:
        """Those of iptables: half a mebibyte that a host without its tables need not load."""
        from tproxyd.kernel.iptables import Iptables
        from tproxyd.kernel.legacy import Legacy

        return {
            Backend.IPTABLES_NFT: Iptables(self._nft, adopt=self._adopt),
            Backend.IPTABLES_LEGACY: Legacy(adopt=self._adopt),
        }

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Also the time for which a netlink socket is open, and who writes routes is there."""
        with _locked(), contextlib.closing(self._routing):
            yield

    def own(self, how: Own) -> bool:
        """Of nft's table, for as long as this Machine is there. Whether that is a change."""
        return self._nft.own(how)

    def settle(self, backend: Backend, path: ReturnPath) -> None:
        """What AUTO has come to, for as long as this Machine is there."""
        self.backend, self._path = backend, path

    def facts(self) -> Facts:
        return replace(
            self._routing.facts(),
            legacy_rules=xtables.has_rules(),
            nft=self._has_nft(),
            backend=self.backend,
            path=self._path,
        )

    def _has_nft(self) -> bool:
        try:
            self._nft.probe()
        except KernelError:
            return False
        return True

    def read_routing(self) -> KernelState:
        return self._routing.read()

    def read_firewall(self) -> Firewall:
        """What only nft could have made is not there where there is no nft."""
        return self._nft.read() if self._has_nft() else ()

    def read_tables(self) -> tuple[Tables, ...]:
        families: tuple[Family, ...] = (4, 6)
        if not any(map(self._has_tables, families)):
            return ()
        found = [each.read(family) for each in self._backends.values() for family in families]
        return tuple(filter(None, found))

    def _has_tables(self, family: Family) -> bool:
        """Whether iptables, either variant, may have a table here."""
        try:
            of_nft = self._nft.tables({4: "ip", 6: "ip6"}[family])
        except KernelError:
            return True  # who knows
        return bool(xtables.names(family)) or any(table in of_nft for table in Table)

    def apply(self, change: Change) -> None:
        match change.old, change.new:
            case _, tuple() as firewall:
                self._nft.apply(firewall)
            case _, Tables(backend, family, chains):
                self._backends[backend].apply(family, chains)
            case Tables(backend, family), None:
                self._backends[backend].apply(family, ())
            case _:
                self._routing.apply(change)


@functools.cache
def lasting() -> Machine:
    """One for this process, whatever the configuration: its socket may own the nft table."""
    return Machine(writer=routewriter.prepared())


# The lock -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One reconcile at a time in this network namespace; KernelError after LOCK_PATIENCE_S."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    with contextlib.ExitStack() as stack:
        while not _taken(stack):
            if (remaining := deadline - time.monotonic()) <= 0:
                why = f"another process ({_holder()}) has been at it for {LOCK_PATIENCE_S:g} s"
                raise KernelError("change the kernel state", why, "end that process, try again")
            _wait_for_release(remaining)
        yield


def _taken(stack: contextlib.ExitStack) -> bool:
    lock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    try:
        lock.bind(LOCK_NAME)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        lock.close()
        return False
    lock.listen(128)
    return True


def _wait_for_release(patience: float) -> None:
    """A connection that nobody accepts ends when the holder closes its socket, or dies."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waiter:
        waiter.settimeout(patience)
        try:
            waiter.connect(LOCK_NAME)
        except OSError:
            time.sleep(0.005)  # it is between bind and listen, or has just gone
            return
        with contextlib.suppress(OSError):  # a reset or the timeout: the caller looks again
            waiter.recv(1)


def _holder() -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # who waited before us may have filled its queue
        try:
            probe.connect(LOCK_NAME)
            raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return "it does not say which"
    return f"process {struct.unpack('3i', raw)[0]}"
