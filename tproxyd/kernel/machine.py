"""The kernel of this machine, as reconcile sees it: its parts in one, and the lock (nslock.py)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from tproxyd.config import Backend, ReturnPath
from tproxyd.errors import KernelError
from tproxyd.kernel import nslock, routewriter, xtables
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

# A whole reconcile takes tens of milliseconds, an nft command of an overloaded machine seconds.
LOCK_PATIENCE_S = 10.0


class Machine:
    """The kernel of this machine, in the network namespace of the calling thread."""

    def __init__(
        self,
        nft: Nft | None = None,
        *,
        adopt: int | None = None,
        writer: RouteWriter | None = None,
    ) -> None:
        """`adopt`: what istio-iptables makes with this mark is taken for ours, whoever made it.

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
    """One reconcile at a time in this network namespace; KernelError after LOCK_PATIENCE_S.

    Who may write nothing does without: what he reads may be half of a change.
    """
    try:
        held = nslock.take(nslock.STATE, LOCK_PATIENCE_S)
    except PermissionError:
        yield
        return
    if held is None:
        holder = nslock.holder(nslock.STATE)
        who = f"process {holder}" if holder else "it does not say which"
        why = f"another process ({who}) has been at it for {LOCK_PATIENCE_S:g} s"
        raise KernelError("change the kernel state", why, "end that process, try again")
    with held:
        yield
