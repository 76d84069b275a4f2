"""The iptables-nft backend: iptables-restore and iptables-save of the nft variant.

Four verbs, as the nft backend has: probe, read, apply, render (iptsave.py). Facts (iptables 1.8.9):

- `--noflush` leaves alone what the script does not name. A chain in a `:CHAIN` line is made, or
  emptied. Each COMMIT is one transaction of nf_tables.
- A table, and each of the kernel's own chains, comes into being with the first rule, and stays when
  that is gone: an empty `table ip mangle`. So what was not there before us has a mark beside it
  (iptsave.py), and goes with us. That takes nft, library or command; without either an empty chain
  stays, which does nothing.
- iptables-save of this variant creates nothing, but with 8,000 rules of others it takes 50 ms for
  each IP version, and it is not everywhere that somebody has made an `ip nat`. So it is only run
  where the kernel has a chain with a name of ours, which is asked by netlink.
"""

from __future__ import annotations

import contextlib
import os

from tproxyd.config import Backend
from tproxyd.errors import KernelError
from tproxyd.kernel.firewall import Chain, Family, Firewall, Table
from tproxyd.kernel.iptchains import PREFIX
from tproxyd.kernel.iptsave import (
    ISTIO_CHAINS,
    ISTIO_PREFIX,
    Listing,
    ours,
    read_save,
    script,
    strangers,
)
from tproxyd.kernel.nft import Nft
from tproxyd.kernel.state import Tables
from tproxyd.linux import CAP_NET_ADMIN, capabilities

_COMMAND: dict[Family, str] = {4: "iptables", 6: "ip6tables"}
_IP: dict[Family, str] = {4: "ip", 6: "ip6"}
_MODULES = (
    "nft_compat, nft_chain_nat, xt_TPROXY, xt_socket, xt_connmark, xt_mark, xt_addrtype,"
    " xt_conntrack"
)
_INSTALL = "install it: apt install iptables"
STRANGERS = "`tproxyd istio-iptables --cleanup-only` removes them, as istio-iptables itself does"


class Iptables:
    """The backend, for one IP version at a time. Not for use by two threads."""

    def __init__(self, nft: Nft, *, adopt: int | None = None) -> None:
        """`adopt`: see iptsave.Listing."""
        self._nft, self._adopt = nft, adopt

    def probe(self, family: Family = 4) -> str:
        """The command that will be used; KernelError where there is none."""
        return _find(family, "restore")

    def read(self, family: Family) -> Tables | None:
        """Ours; None where there is nothing. KernelError where there is, and no iptables."""
        if not self._may_hold(family):
            return None
        return ours(self._list(family), Backend.IPTABLES_NFT, family)

    def apply(self, family: Family, chains: Firewall) -> None:
        """Make our part of the tables exactly this."""
        have = self._list(family)
        refuse_strangers(have, chains, family)
        text = script(have, chains, family, self._new(family, have, chains))
        _run(f"write the tables of {_find(family, 'restore')}", family, "restore", text)
        wanted = {chain.table for chain in chains if isinstance(chain, Chain)}
        self._give_back(family, {at: have[at] for at in have if at not in wanted})

    def _may_hold(self, family: Family) -> bool:
        """Whether there may be anything of ours."""
        try:
            names = self._nft.chains(_IP[family], (PREFIX, ISTIO_PREFIX))
        except KernelError:
            return _is_there(family)  # it will say why, if there is one
        if any(name.startswith(PREFIX) for name in names):
            return True
        # Chains of istio's are ours where they are adopted, else by the comment of a rule at most;
        # and some of its rules are in no chain of its own.
        istios, adopts = not ISTIO_CHAINS.isdisjoint(names), self._adopt is not None
        if istios and adopts:
            return True
        return (istios or adopts) and _is_there(family)

    def _list(self, family: Family) -> dict[Table, Listing]:
        """Every table that is there; {} where nf_tables has none of that name."""
        with contextlib.suppress(KernelError):
            there = self._nft.tables(_IP[family])
            if not any(table in there for table in Table):
                return {}
        text = _run(f"read the IPv{family} tables", family, "save")
        return read_save(text, adopt=self._adopt)

    def _new(
        self, family: Family, have: dict[Table, Listing], want: Firewall
    ) -> list[tuple[Table, str]]:
        """The kernel's own chains that are wanted and not there."""
        try:
            there = self._nft.others(_IP[family])
        except KernelError:
            return []
        return [
            (chain.table, chain.name)
            for chain in want
            if isinstance(chain, Chain) and chain.hook is not None
            if (str(chain.table), chain.name) not in there
        ]

    def _give_back(self, family: Family, before: dict[Table, Listing]) -> None:
        """What came with us and holds nothing of anyone else's."""
        if not any(listing.made for listing in before.values()):
            return
        after = self._list(family)
        for table, listing in before.items():
            now = after.get(table, Listing())
            for name in listing.made:
                if not now.kernels.get(name) and now.policies.get(name) == "ACCEPT":
                    self._nft.drop(_IP[family], table, name)
            if listing.made and [n for t, n in self._nft.others(_IP[family]) if t == table] == [""]:
                self._nft.drop(_IP[family], table)


def refuse_strangers(have: dict[Table, Listing], want: Firewall, family: Family) -> None:
    """Chains of the names that we would use, and not ours, are not touched."""
    if found := strangers(have, want):
        why = f"another program has made {', '.join(found)}"
        raise KernelError(f"write the IPv{family} tables of iptables", why, STRANGERS)


# The commands -------------------------------------------------------------------------------------


def _find(family: Family, verb: str) -> str:
    """The command of the nft variant, by its own name or as the only one that there is."""
    import shutil  # like subprocess below: only those pay who use this backend

    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    name = _COMMAND[family]
    if command := shutil.which(f"{name}-nft-{verb}", path=path):
        return command
    command = shutil.which(f"{name}-{verb}", path=path)
    action = f"use {Backend.IPTABLES_NFT}"
    if command is None:
        raise KernelError(action, f"there is no {name}-nft-{verb}", _INSTALL)
    try:
        version = _call(command, "--version")
    except _Refused as refusal:
        version = str(refusal)
    if "nf_tables" not in version:
        raise KernelError(action, f"{command} is of the legacy variant", _INSTALL)
    return command


def _is_there(family: Family) -> bool:
    try:
        _find(family, "save")
    except KernelError:
        return False
    return True


def _run(action: str, family: Family, verb: str, script: str | None = None) -> str:
    command = _find(family, verb)
    options = ("--noflush", "-w") if verb == "restore" else ()
    try:
        return _call(command, *options, script=script)
    except _Refused as refusal:
        lines = [line for line in str(refusal).splitlines() if line.strip()] or ["no reason given"]
        hint = f"does the kernel have {_MODULES}? Does another program change these tables?"
        if CAP_NET_ADMIN not in capabilities():
            hint = "run it as root, with CAP_NET_ADMIN"
        raise KernelError(action, "; ".join(lines[:2]), hint) from None


class _Refused(Exception):
    """The command said no; its words."""


def _call(command: str, *options: str, script: str | None = None) -> str:
    import subprocess

    done = subprocess.run(
        [command, *options],
        input=script,
        stdin=subprocess.DEVNULL if script is None else None,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode != 0:
        raise _Refused(done.stderr)
    return done.stdout
