"""What others have that may take the packets which our rules and routes would bring home, or would
translate them (`nat`).

The first is looked for when an answer does not come home though everything of ours stands as it
should:

- the route. The kernel is asked how it routes such a packet (RTM_GETROUTE); which policy rule of
  others is why, clashes.py says.
- base chains that can drop: by their policy, or by a rule that drops or rejects. Which one does,
  only a trace would show. What a map of verdicts drops is not seen.

Chains and rules are asked of the kernel too: older nft crashes on what a newer one has written, and
here it would be foreign tables that are listed.
"""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tproxyd.kernel import netlink, xtables
from tproxyd.kernel.firewall import Family, Table
from tproxyd.kernel.iptchains import PREFIX
from tproxyd.kernel.netlink import Netlink, attributes
from tproxyd.kernel.nftlang import MEANWHILE, TABLE

# Routes ------------------------------------------------------------------------------------------


def astray(client: str, own: str, mark: int, table: int) -> str:
    """How a packet with our mark from `own` to `client` is routed, in words; "": by our table.

    Raises OSError.
    """
    with contextlib.closing(Netlink()) as kernel:
        by = _routed(kernel, client, own, mark)
    if by == table:
        return ""
    return f"by table {by}" if isinstance(by, int) else f"nowhere ({by})"


def has_route(client: str, own: str) -> bool:
    """Whether any route leads from `own` toward `client`, without a mark. Raises OSError."""
    with contextlib.closing(Netlink()) as kernel:
        return isinstance(_routed(kernel, client, own, 0), int)


def _routed(kernel: Netlink, client: str, own: str, mark: int) -> int | str:
    """By which table; or why not."""
    try:
        return kernel.routed_by(client, own, mark)
    except OSError as error:
        return error.strerror or str(error)


# Base chains that can drop -----------------------------------------------------------------------

# include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h, nf_tables_compat.h, linux/netfilter.h
_NETLINK_NETFILTER = 12
_HEADER, _EVERY = 4, bytes(4)  # nfgenmsg, which begins with the family; of all of them
_GETCHAIN, _GETRULE = 10 << 8 | 4, 10 << 8 | 7
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY = 1, 3, 4, 5
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4
_HOOK_NUMBER = 1
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_IMMEDIATE_DATA, _DATA_VERDICT, _VERDICT_CODE, _VERDICT_CHAIN, _TARGET_NAME = 2, 2, 1, 2, 1
_DROP = 0  # NF_DROP
_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}
# Those that a packet over lo meets.
_HOOKS = {0: "prerouting", 1: "input", 3: "output", 4: "postrouting"}
_XTABLES = ("raw", "mangle", "nat", "filter", "security")

_Key = tuple[int, str, str]  # family, table, chain


class Dropper(NamedTuple):
    what: str
    remedy: str  # a command


class _Chain:
    def __init__(self) -> None:
        self.drops = False
        self.calls = set[str]()


def droppers(family: Family) -> list[Dropper]:
    """Who else can drop a packet of that IP version over lo; first who does it by policy.

    Raises OSError.
    """
    with contextlib.closing(Netlink(_NETLINK_NETFILTER)) as kernel:
        bases = kernel.dump(_GETCHAIN, _EVERY)
        chains = _chains(kernel.dump(_GETRULE, _EVERY))
    by_policy, by_rule = list[Dropper](), list[Dropper]()
    for body in bases:
        values = attributes(body, _HEADER)
        key = (body[0], _text(values[_CHAIN_TABLE]), _text(values[_CHAIN_NAME]))
        number = _hook_number(values.get(_CHAIN_HOOK, b""))
        others = _FAMILIES.get(key[0], "") in ("inet", {4: "ip", 6: "ip6"}[family])
        if number not in _HOOKS or not others or _is_ours(key):
            continue
        if values.get(_CHAIN_POLICY) == struct.pack(">I", _DROP):
            by_policy.append(_dropper(key, _HOOKS[number], "policy drop"))
        elif any(chains[each].drops for each in _reached(key, chains)):
            by_rule.append(_dropper(key, _HOOKS[number], "a rule drops or rejects"))
    if "filter" in xtables.names(family):
        tool = {4: "iptables-legacy", 6: "ip6tables-legacy"}[family]
        by_rule.append(Dropper(f"what {tool} -S shows", f"{tool} -I INPUT -i lo -j ACCEPT"))
    return by_policy + by_rule


def _dropper(key: _Key, hook: str, how: str) -> Dropper:
    family, table, chain = _FAMILIES[key[0]], *key[1:]
    out = hook in ("output", "postrouting")
    if family != "inet" and table in _XTABLES and chain == hook.upper():
        tool, way = {"ip": "iptables", "ip6": "ip6tables"}[family], "-o" if out else "-i"
        remedy = f"{tool} -t {table} -I {chain} {way} lo -j ACCEPT"
    else:
        remedy = f"nft insert rule {family} {table} {chain} {'o' if out else 'i'}ifname lo accept"
    return Dropper(f"chain {chain} of table {family} {table} ({how})", remedy)


def _is_ours(key: _Key) -> bool:
    family, table, chain = key
    return (_FAMILIES[family] == "inet" and table in (TABLE, MEANWHILE)) or chain.startswith(PREFIX)


def _hook_number(value: bytes) -> int | None:
    return int.from_bytes(attributes(value, 0)[_HOOK_NUMBER], "big") if value else None


def _chains(rules: Sequence[bytes]) -> dict[_Key, _Chain]:
    """What the rules of each chain do, of the chains that have any."""
    chains: dict[_Key, _Chain] = {}
    for body in rules:
        values = attributes(body, _HEADER)
        key = (body[0], _text(values[_RULE_TABLE]), _text(values[_RULE_CHAIN]))
        chain = chains.setdefault(key, _Chain())
        for name, data in _expressions(values.get(_RULE_EXPRESSIONS, b"")):
            if name == "immediate":
                value = attributes(data, 0).get(_IMMEDIATE_DATA, b"")
                verdict = attributes(attributes(value, 0).get(_DATA_VERDICT, b""), 0)
                chain.drops |= verdict.get(_VERDICT_CODE) == struct.pack(">i", _DROP)
                chain.calls.add(_text(verdict.get(_VERDICT_CHAIN, b"")))
            elif name == "target":  # of iptables-nft
                chain.drops |= _text(attributes(data, 0)[_TARGET_NAME]) in ("REJECT", "DROP")
            else:
                chain.drops |= name == "reject"
    return chains


def _expressions(value: bytes) -> Iterator[tuple[str, bytes]]:
    """Their names and their data: a list, whose elements all have one number."""
    for _, element in netlink.each(value, 0):
        inner = attributes(element, 0)
        yield _text(inner[_EXPRESSION_NAME]), inner.get(_EXPRESSION_DATA, b"")


def _reached(base: _Key, chains: dict[_Key, _Chain]) -> set[_Key]:
    """A chain and those that it calls, in the end, which have rules."""
    reached, todo = set[_Key](), [base]
    while todo:
        key = todo.pop()
        if key in chains and key not in reached and not _is_ours(key):
            reached.add(key)
            todo += [(*key[:2], name) for name in chains[key].calls]
    return reached


# Nat ----------------------------------------------------------------------------------------------

# include/uapi/linux/netfilter/nf_tables.h: NFTA_META_KEY, NFT_META_OIFNAME, NFTA_CMP_OP and _DATA,
# NFTA_DATA_VALUE, NFTA_NAT_TYPE; NFT_CMP_EQ and NFT_NAT_SNAT are 0.
_META_KEY, _OIFNAME, _CMP_OP, _CMP_DATA, _DATA_VALUE, _NAT_TYPE = 2, 7, 2, 3, 1, 1
_EQUAL = _SNAT = bytes(4)
_LO = b"lo".ljust(16, b"\0")  # IFNAMSIZ
_OF_SOURCES = ("MASQUERADE", "SNAT", "NETMAP")
_OF_DESTINATIONS = ("DNAT", "REDIRECT")
# By which Docker's resolver answers inside a container, and nothing else does.
_OF_RESOLVER = ("DOCKER_OUTPUT", "DOCKER_POSTROUTING")


class Nat(NamedTuple):
    """A table in which others translate."""

    table: str  # "ip nat"
    on_lo: bool  # maybe the source of what leaves by lo


def nat() -> tuple[Nat, ...]:
    """Those that there are: all but ours."""
    rules: Sequence[bytes] = ()
    with contextlib.suppress(OSError), contextlib.closing(Netlink(_NETLINK_NETFILTER)) as kernel:
        rules = kernel.dump(_GETRULE, _EVERY)
    found: dict[str, bool] = {}
    for body in rules:
        values = attributes(body, _HEADER)
        key = (body[0], _text(values[_RULE_TABLE]), _text(values[_RULE_CHAIN]))
        if key[0] not in _FAMILIES or _is_ours(key) or key[2] in _OF_RESOLVER:
            continue
        expressions = list(_expressions(values.get(_RULE_EXPRESSIONS, b"")))
        for target in filter(None, map(_translation, expressions)):
            table = f"{_FAMILIES[key[0]]} {key[1]}"
            found[table] = found.get(table, False) or (
                target in _OF_SOURCES and _may_leave_by_lo(expressions)
            )
    families: tuple[Family, ...] = (4, 6)
    for family in families:
        for each in _legacy(family):
            found["nat (legacy)"] = found.get("nat (legacy)", False) or (
                each.name in _OF_SOURCES and each.on_lo
            )
    return tuple(Nat(*each) for each in sorted(found.items()))


def _translation(expression: tuple[str, bytes]) -> str:
    """What iptables calls it; "" where it is none."""
    name, data = expression
    match name:
        case "nat":
            return "SNAT" if attributes(data, 0)[_NAT_TYPE] == _SNAT else "DNAT"
        case "masq":
            return "MASQUERADE"
        case "redir":
            return "REDIRECT"
        case "target":
            target = _text(attributes(data, 0)[_TARGET_NAME])
            return target if target in (*_OF_SOURCES, *_OF_DESTINATIONS) else ""
    return ""


def _may_leave_by_lo(expressions: list[tuple[str, bytes]]) -> bool:
    """Unless the rule itself names another interface; the way to it is not followed."""
    for (name, data), (then, compared) in itertools.pairwise(expressions):
        key = attributes(data, 0).get(_META_KEY) if name == "meta" else None
        if key == struct.pack(">I", _OIFNAME) and then == "cmp":
            values = attributes(compared, 0)
            is_lo = _LO.startswith(attributes(values[_CMP_DATA], 0)[_DATA_VALUE])
            if is_lo is not (values[_CMP_OP] == _EQUAL):
                return False
    return True


def _legacy(family: Family) -> Iterator[xtables.Target]:
    if Table.NAT in xtables.names(family):
        with contextlib.suppress(OSError):
            for each in xtables.targets(family, Table.NAT):
                ours = each.chain.startswith(PREFIX) or each.chain in _OF_RESOLVER
                if not ours and each.name in (*_OF_SOURCES, *_OF_DESTINATIONS):
                    yield each


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")
