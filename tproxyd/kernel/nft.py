"""The nft backend: owns `table inet tproxyd`, which is replaced whole in one transaction.

Four verbs: probe (which tool speaks nft here), read (what the table holds), apply (make it hold
this), render (the script that apply runs; `nft -f` accepts it unchanged).

libnftables through ctypes reads and applies in about a millisecond; the nft command, which is
started for each call when the library is missing, takes 10 to 30. Facts:

- `add table X; delete table X; table X {…}` in one transaction replaces atomically, whether X was
  there or not (nft ≥ 1.0.1). The script needs newlines; the library takes no `; }` on one line.
- Only our table is ever listed. Older nft crashes on expressions that a newer one has put into
  somebody else's table.
- Whether our table is there is asked with `list tables inet`: an error would have to be understood
  by its English text, since libnftables reports no errno.
- libnftables calls exit() when it gets no netlink socket, and writes to stderr when it lacks
  CAP_NET_ADMIN (being root is not needed). Both are looked at first.
- A script is not read from stdin together with `nft -j`: it comes back without an answer.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
from typing import Protocol

from tproxyd import linux
from tproxyd.errors import KernelError
from tproxyd.kernel.firewall import Firewall
from tproxyd.kernel.nftjson import Listing, lists_our_table, parse
from tproxyd.kernel.nftlang import TABLE, render

LIBRARY = "libnftables.so.1"
_INSTALL = "install it: apt install libnftables1 (or nftables)"
_MODULES = (
    "nf_tables, nft_tproxy, nft_socket, nft_fib_inet, nft_reject_inet, nft_ct, nft_redir,"
    " nft_chain_nat"
)

_NETLINK_NETFILTER = 12  # include/uapi/linux/netlink.h
_OUTPUT_JSON = 1 << 4  # nftables/libnftables.h, NFT_CTX_OUTPUT_JSON


class Nft:
    """The backend. One tool is looked for on first use and kept; not for use by two threads."""

    def __init__(self, library: str = LIBRARY) -> None:
        self._name = library
        self._tool: _Tool | None = None

    def probe(self) -> str:
        """Which tool will be used; KernelError where there is none."""
        return str(self._find())

    def read(self) -> Firewall:
        """What our table holds; () where it is not there."""
        action = f"read the nft table inet {TABLE}"
        if not lists_our_table(self._ask(action, "list tables inet")):
            return ()
        return parse(self._ask(action, f"list table inet {TABLE}"))

    def apply(self, firewall: Firewall) -> None:
        """Make the table hold exactly this; () removes it."""
        self._run(f"write the nft table inet {TABLE}", render(firewall), answer=False)

    def others(self, ip: str) -> list[tuple[str, str]]:
        """The tables of family `ip` or `ip6`, and their chains: those of iptables-nft among them.

        A table without a chain is there with "".
        """
        action = f"list the nft chains of {ip}"
        tables = [
            entry["table"] for entry in self._ask(action, f"list tables {ip}") if "table" in entry
        ]
        chains = [
            entry["chain"] for entry in self._ask(action, f"list chains {ip}") if "chain" in entry
        ]
        found = [(table["name"], "") for table in tables if table["family"] == ip]
        return found + [(each["table"], each["name"]) for each in chains if each["family"] == ip]

    def tables(self, ip: str) -> list[str]:
        listing = self._ask(f"list the nft tables of {ip}", f"list tables {ip}")
        return [entry["table"]["name"] for entry in listing if "table" in entry]

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
        except _Refused as refusal:
            lines = str(refusal).strip().splitlines() or ["no reason given"]
            hint = f"is `nft` here at least 1.0.1, and does the kernel have {_MODULES}?"
            raise KernelError(action, lines[0].removeprefix("Error: "), hint) from None

    def _find(self) -> _Tool:
        if self._tool is None:
            try:
                self._tool = _Library(self._name)
            except OSError as error:
                self._tool = _command(str(error))
        return self._tool


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


class _Refused(Exception):
    """nft said no; its words."""


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

    def run(self, script: str, answer: bool) -> str:
        library = self._library
        # A context for each run: it caches what it has seen of the kernel, and holds a socket.
        context = library.nft_ctx_new(0)
        try:
            library.nft_ctx_buffer_output(context)
            library.nft_ctx_buffer_error(context)
            library.nft_ctx_output_set_flags(context, _OUTPUT_JSON if answer else 0)
            failed = library.nft_run_cmd_from_buffer(context, script.encode())
            output: bytes = library.nft_ctx_get_output_buffer(context)
            if failed:
                raise _Refused(library.nft_ctx_get_error_buffer(context).decode(errors="replace"))
            return output.decode()
        finally:
            library.nft_ctx_free(context)


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
            raise _Refused(done.stderr)
        return done.stdout
