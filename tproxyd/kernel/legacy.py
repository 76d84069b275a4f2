"""The iptables-legacy backend: the older tables of the kernel, through python-iptables.

The only importer of iptc, and it imports it in a child process only. What is built on, and around:

- One process cannot do TPROXY for IPv4 and for IPv6: the library keeps one set of extensions. And
  its import runs ldconfig, for 140 ms. So each reading or writing has a short-lived process of its
  own, in the same network namespace, that speaks JSON. (Where setuptools is, the import takes 250
  ms: for a thing of distutils it loads that package's own, unless told to take the standard one.)
- It takes no lock. Beside another writer 8 of 60 rules were lost without a word, and none of 60
  while we held the lock of the iptables commands, /run/xtables.lock.
- With autocommit it swallows errors. A table is committed once, by hand, and read back.
- It asks every table that there could be for a target's name, and that creates them: it is told of
  the one table that is being changed only.
- Of IPv6 it gets two things wrong, which _mend puts right.
- A table, once it is there, stays (iptables -t mangle -L makes one): we leave an empty one behind.

It is given the script that iptables-restore would be given (iptsave.py), and says it in the
library's words; all that ours say can be said so. Before any of that, xtables.py looks whether
there is anything of ours, and whether it has changed since it was last read.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tproxyd.config import Backend
from tproxyd.errors import KernelError
from tproxyd.kernel import xtables
from tproxyd.kernel.firewall import Family, Firewall, Table
from tproxyd.kernel.iptables import refuse_strangers
from tproxyd.kernel.iptchains import PREFIX
from tproxyd.kernel.iptsave import ISTIO_PREFIX, OWNER, Listing, ours, script
from tproxyd.kernel.state import Tables
from tproxyd.linux import CAP_NET_ADMIN, CAP_NET_RAW, CAPABILITY_NAMES, capabilities

# iptables/xshared.h, XT_LOCK_NAME; older ones had it in /var/run, which is the same. As for those
# commands, the variable XTABLES_LOCKFILE names another one.
LOCK = "/run/xtables.lock"
LOCK_PATIENCE_S = 5.0
_CHILD = "from tproxyd.kernel.legacy import child; child()"
_INSTALL = "scripts/install --with legacy, which takes a C compiler and Python's headers"
_MODULES: dict[Family, str] = {
    4: "ip_tables, iptable_mangle, iptable_nat, xt_TPROXY, xt_socket, xt_connmark, xt_addrtype",
    6: "ip6_tables, ip6table_mangle, ip6table_nat, xt_TPROXY, xt_socket, xt_connmark, xt_addrtype",
}
# What stands in a table that has anything of ours: the name of a chain, or the comment of a rule.
_SIGNS = (PREFIX.encode(), f"{OWNER}\0".encode())

Foreign = Any  # the library and its objects: it has no types

# By the content of a whole table: a daemon that checks every few seconds starts no processes while
# nothing changes. A few contents of each, the last ones: what was healed is as it was before.
_known: dict[tuple[Family, Table], dict[bytes, Listing]] = {}
_KEPT = 4


class Legacy:
    """The backend, for one IP version at a time. Not for use by two threads."""

    def __init__(self, *, adopt: int | None = None) -> None:
        """`adopt`: see iptsave.Listing."""
        self._adopt = adopt
        self._signs = (*_SIGNS, ISTIO_PREFIX.encode()) if adopt is not None else _SIGNS

    def read(self, family: Family) -> Tables | None:
        """Ours; None where there is nothing."""
        return ours(
            self._list(family, _contents(family, self._signs)), Backend.IPTABLES_LEGACY, family
        )

    def apply(self, family: Family, chains: Firewall) -> None:
        """Make our part of the tables exactly this."""
        have = self._list(family, _contents(family, (*_SIGNS, ISTIO_PREFIX.encode())))
        refuse_strangers(have, chains, family)
        text = script(have, chains, family)
        _ask(f"write the IPv{family} legacy tables", family, {"script": text})

    def _list(self, family: Family, tables: dict[Table, bytes]) -> dict[Table, Listing]:
        """What is not known yet is asked for."""
        known = {
            table: _known[family, table][content]
            for table, content in tables.items()
            if content in _known.get((family, table), ())
        }
        unknown = [table for table in tables if table not in known]
        if unknown:
            answer = _ask(f"read the IPv{family} legacy tables", family, {"tables": unknown})
            for name, fields in answer.items():
                table = Table(name)
                known[table] = Listing(**fields)
                contents = _known.setdefault((family, table), {})
                contents[tables[table]] = known[table]
                if len(contents) > _KEPT:
                    del contents[next(iter(contents))]
        return {table: replace(known[table], adopt=self._adopt) for table in known}


def _contents(family: Family, signs: tuple[bytes, ...]) -> dict[Table, bytes]:
    """The tables in which one of these stands, with all that they hold."""
    found = {}
    for name in xtables.names(family):
        if name not in tuple(Table):
            continue
        try:
            content = xtables.content(family, name)
        except OSError as error:
            action = f"read the IPv{family} legacy table {name}"
            hint = "run it as root, or give it CAP_NET_ADMIN"
            raise KernelError(action, error.strerror or str(error), hint) from error
        if any(sign in content for sign in signs):
            found[Table(name)] = content
    return found


def _ask(action: str, family: Family, request: dict[str, object]) -> dict[str, Any]:
    """What the child answers."""
    import subprocess

    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps({"family": family, **request}),
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "LC_ALL": "C",
            "SETUPTOOLS_USE_DISTUTILS": "stdlib",
        },
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"its process ended: {done.returncode}"]
        hint = f"does the kernel have {_MODULES[family]}?"
        raise KernelError(action, f"python-iptables: {lines[-1]}", hint) from None
    if refusal := answer.get("refusal"):
        why, hint = refusal
        raise KernelError(action, why, hint)
    return dict(answer["answer"])


# In the child -------------------------------------------------------------------------------------


def child() -> None:
    """Answer the one request on stdin."""
    request = json.load(sys.stdin)
    family: Family = request["family"]
    answer: dict[str, object]
    try:
        with _locked():
            try:
                import iptc
            except ImportError as error:
                raise _Refusal(f"python-iptables: {error}", _INSTALL) from None
            except Exception as error:  # it looks for libraries and a compiler, in many ways
                why = f"python-iptables cannot be loaded: {error}"
                raise _Refusal(why, f"apt install iptables gcc, then {_INSTALL}") from None
            try:
                if "script" in request:
                    _change(iptc, family, request["script"])
                    answer = {"answer": {}}
                else:
                    lists = {name: _listing(iptc, family, name) for name in request["tables"]}
                    answer = {"answer": lists}
            except iptc.IPTCError as error:
                raise _Refusal(*_in_words(str(error), family)) from None
    except _Refusal as refusal:
        answer = {"refusal": refusal.args}
    print("\n" + json.dumps(answer))  # noqa: T201 -- to the parent; the library may print, too


class _Refusal(Exception):
    """Why, and what to try."""


def _in_words(error: str, family: Family) -> tuple[str, str]:
    """Of what iptc says, which shows bytes: can't initialize mangle: b'Permission denied (…)'."""
    why = re.sub(r"b'(.*)'", r"\1", error)
    # Its sockets are raw ones, so it takes more than the kernel asks for.
    if missing := {CAP_NET_ADMIN, CAP_NET_RAW} - capabilities():
        names = " and ".join(sorted(CAPABILITY_NAMES[each] for each in missing))
        return why, f"run it as root, with {names}"
    return why, f"does the kernel have {_MODULES[family]}?"


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """The lock of the iptables commands, which wait for it with -w."""
    path = os.environ.get("XTABLES_LOCKFILE", LOCK)
    try:
        fd = os.open(path, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        hint = "run it as root: the lock of legacy iptables is a file of root's"
        raise _Refusal(f"{path}: {error.strerror}", hint) from None
    try:
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    why = f"another program has held {path} for {LOCK_PATIENCE_S:g} s"
                    raise _Refusal(why, f"fuser {path} names it") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _table(iptc: Foreign, family: Family, name: str) -> Foreign:
    kind = iptc.Table if family == 4 else iptc.Table6
    kind.ALL = [name]
    table = kind(name)
    table.autocommit = False
    table.refresh()
    return table


def _listing(iptc: Foreign, family: Family, name: str) -> dict[str, dict[str, object]]:
    """The fields of a Listing."""
    table = _table(iptc, family, name)
    kernels, users, policies = {}, {}, {}
    for chain in table.chains:
        lines = [_line(rule) for rule in chain.rules]
        if table.builtin_chain(chain):
            kernels[chain.name] = lines
            policies[chain.name] = table.get_policy(chain)[0].name
        else:
            users[chain.name] = lines
    return {"kernels": kernels, "users": users, "policies": policies}


def _change(iptc: Foreign, family: Family, text: str) -> None:
    """What iptables-restore --noflush does with a script."""
    table: Foreign = None
    for line in text.splitlines():
        verb, *words = shlex.split(line, comments=True) or [""]
        if verb.startswith("*"):
            table = _table(iptc, family, verb[1:])
        elif verb.startswith(":"):
            name = verb[1:]
            if table.is_chain(name):
                table.flush_entries(name)
            else:
                table.create_chain(name)
        elif verb == "COMMIT":
            table.commit()
            table.refresh()
        elif verb == "-X":
            table.delete_chain(words[0])
        elif verb in ("-A", "-I"):
            chain = _chain(iptc, table, words[0])
            rule = _rule(iptc, family, chain, words[2 if verb == "-I" else 1 :])
            (chain.append_rule if verb == "-A" else chain.insert_rule)(rule)
        elif verb == "-D":
            chain = _chain(iptc, table, words[0])
            (rule, *_) = [each for each in chain.rules if shlex.split(_line(each)) == words[1:]]
            chain.delete_rule(rule)
        elif verb:
            raise AssertionError(line)


def _chain(iptc: Foreign, table: Foreign, name: str) -> Foreign:
    return iptc.Chain(table, name)


_IP6T_F_PROTO = 0x01  # include/uapi/linux/netfilter_ipv6/ip6_tables.h
_NAMES = {"-i": "iniface", "-o": "outiface"}
_FIELDS = {"-s": "src", "-d": "dst", "-i": "in_interface", "-o": "out_interface", "-p": "protocol"}


def _rule(iptc: Foreign, family: Family, chain: Foreign, words: list[str]) -> Foreign:
    """A rule of the library's from words of iptables-restore."""
    rule = (iptc.Rule if family == 4 else iptc.Rule6)(chain=chain)
    of: Foreign = None
    negate = ""
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "!":
            negate = "!"
            continue
        values = []
        while at < len(words) and words[at] != "!" and not words[at].startswith("-"):
            values.append(words[at])
            at += 1
        if word in _FIELDS:
            value = {"ipv6-icmp": "icmpv6"}.get(values[0], values[0])
            setattr(rule, _FIELDS[word], negate + value)
            entry = rule.entry.ip if family == 4 else rule.entry.ipv6
            if value.endswith("+"):  # as the commands have it; only the mask means anything
                setattr(entry, _NAMES[word], value.encode())
            if family == 6:
                _mend(entry, word)
        elif word == "-m":
            of = rule.create_match(values[0])
        elif word in ("-j", "-g"):
            of = rule.create_target(values[0], goto=word == "-g")
        elif negate:
            of.set_parameter(word[2:], ["!", *values])
        else:
            of.set_parameter(word[2:], values)
        negate = ""
    return rule


def _mend(entry: Foreign, option: str) -> None:
    """What the library (1.2.0) gets wrong of IPv6, and no listing shows.

    Without the flag the kernel does not look at the protocol at all: `! -p tcp` is everything. And
    where the mask of an interface is 1, not 255, only the lowest bit of each letter counts: "p1" is
    "lo".
    """
    if option == "-p":
        entry.flags |= _IP6T_F_PROTO
    elif option == "-i":
        entry.iniface_mask = b"\xff" * len(entry.iniface_mask)
    elif option == "-o":
        entry.outiface_mask = b"\xff" * len(entry.outiface_mask)


def _line(rule: Foreign) -> str:
    """A rule of the library's as iptables-save writes one; "" where it can't tell itself.

    A name of xt_recent with a quote in it is a ValueError there. None of ours has one.
    """
    try:
        return shlex.join(_words(rule))
    except ValueError:
        return ""


def _words(rule: Foreign) -> list[str]:
    words: list[str] = []
    for option, name in _FIELDS.items():
        value = getattr(rule, name)
        if value is None or value in ("all", "ip"):
            continue
        negate, value = value.startswith("!"), value.removeprefix("!")
        if option in ("-s", "-d"):
            network = ipaddress.ip_network(value)
            if not network.prefixlen and not negate:
                continue
            value = str(network)
        words += [*["!"] * negate, option, value]
    for match in rule.matches:
        words += ["-m", match.name, *_parameters(match)]
    if target := rule.target:
        standard = target.standard_target if target.name in ("", "standard") else target.name
        words += ["-g" if target.goto else "-j", standard, *_parameters(target)]
    return words


def _parameters(of: Foreign) -> list[str]:
    words: list[str] = []
    for name, values in of.get_all_parameters().items():
        negate = values[:1] == ["!"]
        words += [*["!"] * negate, f"--{name}", *values[negate:]]
    return words
