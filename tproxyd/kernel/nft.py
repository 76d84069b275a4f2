"""The nft backend: owns `table inet tproxyd`, which is replaced whole in one transaction.

Four verbs: probe (which tool speaks nft here), read (what the table holds), apply (make it hold
this), render (the script that apply runs; `nft -f` accepts it unchanged).

libnftables through ctypes reads and applies in about a millisecond; the nft command, which is
started for each call when the library is missing, takes 10 to 30. Facts:

- `add table X; delete table X; table X {…}` in one transaction replaces atomically, whether X was
  there or not (nft ≥ 1.0.1). The script needs newlines; the library takes no `; }` on one line.
- Only our table is ever listed. Older nft crashes on expressions that a newer one has put into
  somebody else's table.
- Whether our table is there is asked without nft (nfnetlink.py): its errors would have to be
  understood by their English text, since libnftables reports no errno.
- libnftables calls exit() when it gets no netlink socket, and writes to stderr when it lacks
  CAP_NET_ADMIN (being root is not needed). Both are looked at first.
- A script is not read from stdin together with `nft -j`: it comes back without an answer.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
from collections.abc import Callable
from typing import Protocol

from tproxyd import linux
from tproxyd.errors import KernelError
from tproxyd.kernel import nfnetlink
from tproxyd.kernel.firewall import Firewall, Unknown
from tproxyd.kernel.nfnetlink import Described, Refused
from tproxyd.kernel.nftjson import Listing, parse
from tproxyd.kernel.nftlang import MEANWHILE, TABLE, render
from tproxyd.kernel.nftowner import Owner
from tproxyd.kernel.ownership import Own

LIBRARY = "libnftables.so.1"
_INSTALL = "install it: apt install libnftables1 (or nftables)"
_MODULES = (
    "nf_tables, nft_tproxy, nft_socket, nft_fib_inet, nft_reject_inet, nft_ct, nft_redir,"
    " nft_chain_nat, nft_nat"
)

_FAMILIES = {"inet": 1, "ip": 2, "ip6": 10}  # include/uapi/linux/netfilter.h, NFPROTO_*
_NETLINK_NETFILTER = 12  # include/uapi/linux/netlink.h
_OUTPUT_JSON = 1 << 4  # nftables/libnftables.h, NFT_CTX_OUTPUT_JSON


class Nft:
    """The backend. One tool is looked for on first use and kept; not for use by two threads."""

    def __init__(
        self,
        library: str = LIBRARY,
        tables: Callable[[int], dict[str, Described]] = nfnetlink.tables,
    ) -> None:
        self._name, self._tables = library, tables
        self._tool: _Tool | None = None
        self._owner: Owner | None = None

    def own(self, how: Own) -> bool:
        """From now on the table is written as our own; with Own.NOT it is given up, and stands.

        Whether that is a change.
        """
        changed = how is not (self._owner.how if self._owner else Own.NOT)
        if self._owner is not None and self._owner.how is not how:
            self._owner.release()
            self._owner = None
        if how is not Own.NOT and self._owner is None:
            action = f"own the nft table inet {TABLE}"
            _may_talk(action)
            tool = self._find()
            if not isinstance(tool, _Library):
                why = f"{tool} ends with each command, and its ownership with it"
                raise KernelError(action, why, _INSTALL + ', or set guard = "none"')
            self._owner = Owner(tool.context(), how, self._only_chains)
        return changed

    def probe(self) -> str:
        """Which tool will be used; KernelError where there is none."""
        return str(self._find())

    def read(self) -> Firewall:
        """What our table holds; () where it is not there."""
        action = f"read the nft table inet {TABLE}"
        found = self._of("inet", action)
        stray = (Unknown(f"table {MEANWHILE}"),) if MEANWHILE in found else ()
        if TABLE not in found:
            return stray
        described = found[TABLE]
        if self._owner is not None and not self._owner.owns():
            stray = (*stray, Unknown("a table that is not our own"))
        if described.asleep:
            stray = (*stray, Unknown("a table that sleeps"))
        if not described.flags:
            return (*parse(self._ask(action, f"list table inet {TABLE}")), *stray)
        # Its flags say whose it is, which is no part of what it does; and listed it must not be.
        names = self._chains()
        if described.objects != len(names):
            stray = (*stray, Unknown("a table that holds more than chains"))
        listings = [self._ask(action, f"list chain inet {TABLE} {name}") for name in names]
        parts = [entry for listing in listings for entry in listing]
        # Chains first, as a table is listed: a rule stands in a chain that is known.
        parts.sort(key=lambda entry: "rule" in entry)
        return (*parse(parts), *stray)

    def _chains(self) -> list[str]:
        listing = self._ask(f"read the nft table inet {TABLE}", "list chains inet")
        chains = [entry["chain"] for entry in listing if "chain" in entry]
        return [each["name"] for each in chains if each["table"] == TABLE]

    def _only_chains(self) -> list[str] | None:
        names = self._chains()
        described = self._of("inet", f"read the nft table inet {TABLE}").get(TABLE)
        return names if described is not None and described.objects == len(names) else None

    def apply(self, firewall: Firewall) -> None:
        """Make the table hold exactly this; () removes it."""
        action = f"write the nft table inet {TABLE}"
        if self._owner is not None:
            try:
                self._owner.write(firewall)
            except Refused as refusal:
                raise _refusal(action, refusal) from None
        else:
            there = self._of("inet", action).get(TABLE)
            # A table that an owner has left: "add" would be a change of its flags.
            script = render(firewall).partition("\n")[2] if there and there.flags else None
            self._run(action, script or render(firewall), answer=False)
        if MEANWHILE in self._of("inet", action):
            self._run(action, f"delete table inet {MEANWHILE}\n", answer=False)

    def others(self, ip: str) -> list[tuple[str, str]]:
        """The tables of family `ip` or `ip6`, and their chains: those of iptables-nft among them.

        A table without a chain is there with "".
        """
        action = f"list the nft chains of {ip}"
        chains = [
            entry["chain"] for entry in self._ask(action, f"list chains {ip}") if "chain" in entry
        ]
        found = [(name, "") for name in self._of(ip, action)]
        return found + [(each["table"], each["name"]) for each in chains if each["family"] == ip]

    def tables(self, ip: str) -> list[str]:
        """Of family `ip` or `ip6`; as `chains`, it takes neither library nor command."""
        _may_talk(f"list the nft tables of {ip}")
        return [*self._tables(_FAMILIES[ip])]

    def chains(self, ip: str, begin: tuple[str, ...]) -> list[str]:
        """The names, of those that begin so, of chains of family `ip` or `ip6`."""
        _may_talk(f"list the nft chains of {ip}")
        return nfnetlink.chains(_FAMILIES[ip], begin)

    def _of(self, ip: str, action: str) -> dict[str, Described]:
        """The tables of a family."""
        _may_talk(action)
        self._find()
        return self._tables(_FAMILIES[ip])

    def drop(self, ip: str, table: str, chain: str = "") -> None:
        """One chain, or one table; refused where a rule is in it."""
        what = f"chain {ip} {table} {chain}" if chain else f"table {ip} {table}"
        self._run(f"remove the empty nft {what}", f"delete {what}\n", answer=False)

    def _ask(self, action: str, command: str) -> Listing:
        text = self._run(action, command, answer=True)
        try:
            return list(json.loads(text)["nftables"])
        except (ValueError, KeyError, TypeError):
            hint = "is nft built with JSON support? `nft -j list tables` must print JSON"
            raise KernelError(action, f"nft answered {text[:60]!r}", hint) from None

    def _run(self, action: str, script: str, *, answer: bool) -> str:
        _may_talk(action)
        tool = self._find()
        try:
            return tool.run(script, answer)
        except Refused as refusal:
            raise _refusal(action, refusal) from None

    def _find(self) -> _Tool:
        if self._tool is None:
            try:
                self._tool = _Library(self._name)
            except OSError as error:
                self._tool = _command(str(error))
        return self._tool


def _refusal(action: str, refusal: Refused) -> KernelError:
    lines = str(refusal).strip().splitlines() or ["no reason given"]
    hint = f"is `nft` here at least 1.0.1, and does the kernel have {_MODULES}?"
    if "Operation not permitted" in lines[0]:
        hint = f"another process owns that table: stop it (nft list table inet {TABLE} names it)"
    return KernelError(action, lines[0].removeprefix("Error: "), hint)


def _command(missing: str) -> _Command:
    import shutil  # like subprocess below: 5 ms that only those pay who lack the library

    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    command = shutil.which("nft", path=path)
    if command is None:
        raise KernelError("talk to nftables", f"{missing}, and no nft command either", _INSTALL)
    return _Command(command)


def _may_talk(action: str) -> None:
    if linux.CAP_NET_ADMIN not in linux.capabilities():
        raise KernelError(action, "CAP_NET_ADMIN is missing", "run it as root, or give it that")
    try:
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER).close()
    except OSError as error:
        hint = f"this kernel seems to lack nftables: modprobe {_MODULES.replace(',', '')}"
        raise KernelError(action, error.strerror or str(error), hint) from None


# The two tools ------------------------------------------------------------------------------------


class _Tool(Protocol):
    def run(self, script: str, answer: bool) -> str: ...


class _Library:
    """libnftables.so.1: nftables/libnftables.h."""

    def __init__(self, name: str) -> None:
        self._name = name
        library = ctypes.CDLL(name)
        context = ctypes.c_void_p
        library.nft_ctx_new.restype = context
        library.nft_ctx_new.argtypes = [ctypes.c_uint32]
        for call in ("nft_ctx_buffer_output", "nft_ctx_buffer_error"):
            getattr(library, call).argtypes = [context]
        for call in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            getattr(library, call).argtypes = [context]
            getattr(library, call).restype = ctypes.c_char_p
        library.nft_ctx_output_set_flags.argtypes = [context, ctypes.c_uint]
        library.nft_run_cmd_from_buffer.argtypes = [context, ctypes.c_char_p]
        library.nft_ctx_free.argtypes = [context]
        self._library = library

    def __str__(self) -> str:
        return self._name

    def context(self) -> _Context:
        """One that is kept, with its socket."""
        return _Context(self._library)

    def run(self, script: str, answer: bool) -> str:
        # A context for each run: it caches what it has seen of the kernel, and holds a socket.
        context = self.context()
        try:
            return context.run(script, answer)
        finally:
            context.close()


class _Context:
    """struct nft_ctx, and the netlink socket that it opens."""

    def __init__(self, library: ctypes.CDLL) -> None:
        # It does not tell its socket; it is the lowest number that is free.
        self.fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
        os.close(self.fd)
        self._library = library
        self._context = library.nft_ctx_new(0)
        library.nft_ctx_buffer_output(self._context)
        library.nft_ctx_buffer_error(self._context)

    def run(self, script: str, answer: bool = False) -> str:
        library, context = self._library, self._context
        library.nft_ctx_output_set_flags(context, _OUTPUT_JSON if answer else 0)
        failed = library.nft_run_cmd_from_buffer(context, script.encode())
        output: bytes = library.nft_ctx_get_output_buffer(context)
        if failed:
            raise Refused(library.nft_ctx_get_error_buffer(context).decode(errors="replace"))
        return output.decode()

    def close(self) -> None:
        self._library.nft_ctx_free(self._context)


class _Command:
    """The nft command, once for each run."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __str__(self) -> str:
        return self._path

    def run(self, script: str, answer: bool) -> str:
        import subprocess

        arguments = ["-j", *script.split()] if answer else ["-f", "-"]
        done = subprocess.run(
            [self._path, *arguments],
            input=None if answer else script,
            stdin=subprocess.DEVNULL if answer else None,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
        if done.returncode != 0:
            raise Refused(done.stderr)
        return done.stdout
