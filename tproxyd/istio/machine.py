"""The kernel of this machine, as run.py asks it.

Where no backend is named, istio-iptables takes legacy tables if there are rules in them, else the
nft variant of iptables; so do we, and without an iptables, nft itself. (`tproxyd install`, of which
nobody expects chains in iptables-save, takes nft at once.)
"""

from __future__ import annotations

from functools import cached_property

from tproxyd.config import Backend
from tproxyd.errors import KernelError
from tproxyd.istio import leftovers, wire
from tproxyd.istio.options import IstioOptions
from tproxyd.istio.run import Outcome
from tproxyd.istio.wire import NEAR
from tproxyd.kernel import claim, reconcile
from tproxyd.kernel.desired import BackendChoice, Facts
from tproxyd.kernel.iptables import Iptables
from tproxyd.kernel.nft import Nft


class Machine:
    """In the network namespace of the calling thread."""

    def has_ipv6(self) -> bool:
        return self._facts.ipv6

    def install(self, options: IstioOptions, backend: str) -> Outcome:
        """Where istio-iptables itself was before, its chains are changed into ours in one step; its
        routes have to make room for ours, for some milliseconds.
        """
        claim.refuse_beside("install the kernel state")
        report = reconcile.install_istio(
            options, self._chosen(backend), make_room=lambda: _remove(options)
        )
        return Outcome(report.changed, report.notes, report.installed)

    def differs(self, options: IstioOptions, backend: str) -> Outcome:
        found = _would_remove(options)
        report = reconcile.check_istio(options, self._chosen(backend))
        installed = report.installed or bool(found)
        return Outcome((*found, *report.differs), report.notes, installed)

    def rules(self, options: IstioOptions, backend: str) -> str:
        return reconcile.rules_istio(options, self._chosen(backend), facts=self._facts)

    def clean(self, options: IstioOptions) -> Outcome:
        claim.refuse_beside("remove the kernel state")
        changed = [*reconcile.clean_istio(options).changed, *_remove(options)]
        if _remove_wire():
            changed.append(f"remove {NEAR}, a validation's wire")
        return Outcome(tuple(changed))

    def left(self, options: IstioOptions) -> Outcome:
        return Outcome((*reconcile.left_istio(options).differs, *_would_remove(options)))

    @cached_property
    def _facts(self) -> Facts:
        return reconcile.facts()

    def _chosen(self, backend: str) -> Backend | BackendChoice:
        asked = Backend(backend)
        if asked is Backend.AUTO and not self._facts.legacy_rules and _has_iptables():
            why = f"backend {Backend.IPTABLES_NFT}: there is an iptables, as istio-iptables uses it"
            return BackendChoice(Backend.IPTABLES_NFT, why)
        return asked


def _remove_wire() -> bool:
    try:
        return wire.remove()
    except OSError as error:
        hint = f"ip link delete {NEAR}"
        raise KernelError(f"remove {NEAR}", error.strerror or str(error), hint) from error


def _would_remove(options: IstioOptions) -> list[str]:
    return [f"remove {each.text}" for each in leftovers.find(options.mark, options.table)]


def _remove(options: IstioOptions) -> list[str]:
    found = leftovers.find(options.mark, options.table)
    leftovers.remove(found)
    return [f"remove {each.text}" for each in found]


def _has_iptables() -> bool:
    try:
        Iptables(Nft()).probe()
    except KernelError:
        return False
    return True
