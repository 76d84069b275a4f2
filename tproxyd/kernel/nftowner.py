"""Our nft table as our own: nobody else can flush or edit it (NFT_TABLE_F_OWNER, Linux ≥ 5.12).

The owner is a netlink socket, so the process that keeps the state keeps one: that of a libnftables
context, through which the table is written. Facts (run on Linux 6.18 with nft 1.0.6, which knows
the word `owner` and not `persist`):

- `nft flush ruleset` of others passes an owned table over and succeeds; every other write to it,
  `add table` of the same name too, is EPERM. Reading is everybody's.
- When the socket closes, however its process ended, the kernel removes the table; with
  NFT_TABLE_F_PERSIST (Linux ≥ 6.9) the table stays, with its rules and without an owner, and who
  sends its flags again adopts it. That flag can be given at the creation only.
- Flags never change otherwise: EOPNOTSUPP. So a script for an owned table must not name the table
  in a statement (that sends flags, of 0); and giving up ownership means replacing the table in one
  transaction, or with `persist` closing the socket.
- nft 1.0.6 lists the owner as a comment, `# progname python3`; NFTA_TABLE_OWNER is its port.

A table with `persist` is thus made in a transaction of our own and filled in a second one. Where a
table stands already, and only there (the guard is switched on over rules that stand), a copy under
another name intercepts meanwhile.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Protocol

from tproxyd.kernel.firewall import Firewall
from tproxyd.kernel.nfnetlink import DELTABLE, NEWTABLE, OWNER, PERSIST, Wire
from tproxyd.kernel.nftlang import MEANWHILE, TABLE, refill, table_text
from tproxyd.kernel.ownership import Own


class Context(Protocol):
    """What libnftables has."""

    fd: int

    def run(self, script: str, answer: bool = False) -> str: ...
    def close(self) -> None: ...


class Owner:
    """The table while it is owned, from the first `write` to `release`.

    `chains`: the names of those in our table; None where it holds more than chains.
    """

    def __init__(self, context: Context, how: Own, chains: Callable[[], list[str] | None]) -> None:
        self.how, self._context, self._chains = how, context, chains
        self._wire = Wire(socket.socket(fileno=os.dup(context.fd)))

    def owns(self) -> bool:
        there = self._wire.look()
        return there is not None and there.owner == self._wire.port

    def write(self, firewall: Firewall) -> None:
        there = self._wire.look()
        if not firewall:
            if there is not None:
                self._context.run(f"delete table inet {TABLE}\n")
            return
        if self.how is Own.WHILE_ALIVE:
            before = "" if there is None else f"delete table inet {TABLE}\n"
            self._context.run(before + table_text(firewall, owned=True))
            return
        chains = None if there is None else self._chains()
        if there is not None and there.persists and chains is not None:
            if not self.owns():
                self._wire.change((NEWTABLE, OWNER | PERSIST))
            self._context.run(refill(firewall, chains))
            return
        if there is None:
            self._wire.change((NEWTABLE, OWNER | PERSIST))
        else:
            again = f"add table inet {MEANWHILE}\ndelete table inet {MEANWHILE}\n"
            self._context.run(again + table_text(firewall, MEANWHILE))
            self._wire.change((DELTABLE, None), (NEWTABLE, OWNER | PERSIST))
        self._context.run(refill(firewall, ()))

    def release(self) -> None:
        """The table stays, as anybody's."""
        try:
            if self.how is Own.WHILE_ALIVE and self.owns():
                firewall = self._text()
                self._context.run(f"delete table inet {TABLE}\n{firewall}")
        finally:
            self._wire.close()
            self._context.close()

    def _text(self) -> str:
        """The table as nft itself writes it, without its flags."""
        lines = self._context.run(f"list table inet {TABLE}\n").splitlines(keepends=True)
        return "".join(line for line in lines if line.strip() != "flags owner")
