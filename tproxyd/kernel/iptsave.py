"""What iptables-save lists: whose it is, what it means; and the script that changes it.

Ours in a table of iptables are

- the chains TPROXYD_*, and every rule in one of the kernel's own chains (PREROUTING, OUTPUT) that
  goes to one of ours or has the comment "tproxyd";
- the chains ISTIO_* of the istio scheme, but only beside the empty chain TPROXYD_ISTIO: without it
  they are those of istio-iptables;
- TPROXYD_MADE_*, empty too: the kernel's own chain of that name was not there before us. Only the
  nft variant has such (its tables and chains come with the first rule), so only there it can be
  given back.

One table is changed in one commit, which is atomic: chains that are wanted are emptied and filled,
our rules in the kernel's chains are taken out and put in, what is left over goes. A packet meets
the old rules or the new ones. Other programs' rules are not in the script at all. Pure.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tproxyd.config import Backend
from tproxyd.istio.options import OUTBOUND_MARK
from tproxyd.kernel.firewall import (
    FULL_MASK,
    Chain,
    ConnMark,
    DestinationIn,
    Family,
    Firewall,
    Jump,
    MadeBy,
    OutInterface,
    PacketMark,
    RestoreMark,
    Rule,
    SaveMark,
    SetPacketMark,
    Table,
    Tcp,
    Unknown,
    Verdict,
)
from tproxyd.kernel.iptchains import HOOKS, PREFIX, sorted_chains
from tproxyd.kernel.iptlang import words
from tproxyd.kernel.iptread import parse
from tproxyd.kernel.state import Tables

OWNER = "tproxyd"
ISTIO_MARKER = f"{PREFIX}ISTIO"
MADE = f"{PREFIX}MADE_"
ISTIO_PREFIX = "ISTIO_"
ISTIO_CHAINS = {
    f"{ISTIO_PREFIX}{name}"
    for name in ("INBOUND", "DIVERT", "TPROXY", "DROP", "REDIRECT", "IN_REDIRECT", "OUTPUT")
} | {f"{ISTIO_PREFIX}OUTPUT_DNS"}
_COMMENT = f"-m comment --comment {OWNER}"


@dataclass(slots=True)
class Listing:
    """One table: the rules of each chain, without "-A CHAIN"."""

    kernels: dict[str, list[str]] = field(default_factory=dict)  # PREROUTING, INPUT, …
    users: dict[str, list[str]] = field(default_factory=dict)
    policies: dict[str, str] = field(default_factory=dict)
    # Of istio-iptables, where its chains, and its rules without a chain, are ours.
    adopt: int | None = None

    def is_our_chain(self, name: str) -> bool:
        ours = self.adopt is not None or ISTIO_MARKER in self.users
        by_istio = name in ISTIO_CHAINS and ours
        return name in self.users and (name.startswith(PREFIX) or by_istio)

    def is_our_rule(self, table: Table, chain: str, line: str) -> bool:
        """Of a chain of the kernel's."""
        try:
            tokens = shlex.split(line)
        except ValueError:  # iptables-save does not quote every name: --name it's
            return False
        pairs = list(itertools.pairwise(tokens))
        if ("--comment", OWNER) in pairs:
            return True
        if self.adopt is not None and table is Table.MANGLE and _is_istios(chain, line, self.adopt):
            return True
        return any(flag in ("-j", "-g") and self.is_our_chain(to) for flag, to in pairs)

    @property
    def made(self) -> list[str]:
        """The chains of the kernel's that came with us."""
        return [name.removeprefix(MADE) for name in self.users if name.startswith(MADE)]


def _is_istios(chain: str, line: str, mark: int) -> bool:
    """One of the four that istio-iptables puts into the kernel's own chains of mangle, without a
    chain of its own, whatever user its proxy was to have. Whoever else saves and restores marks has
    others. What it says for excluded interfaces could be anybody's.
    """
    rule = parse(line, 6 if "::" in line else 4)
    if isinstance(rule, Unknown):
        return False
    matches = set(rule.matches)
    lo, marked = OutInterface("lo"), PacketMark(mark, FULL_MASK)
    match chain, rule.action:
        case "PREROUTING", SaveMark():
            return matches == {Tcp(), marked}
        case "OUTPUT", Verdict.RETURN:
            return matches == {Tcp(), lo, marked}
        case "OUTPUT", SetPacketMark(value, mask):
            kinds = {type(match) for match in matches - {lo}}
            call = lo in matches and kinds == {Tcp, DestinationIn, MadeBy}
            return call and (value, mask) == (OUTBOUND_MARK, FULL_MASK)
        case "OUTPUT", RestoreMark():
            return matches == {Tcp(), ConnMark(mark, FULL_MASK)}
    return False


def read_save(text: str, *, adopt: int | None = None) -> dict[Table, Listing]:
    """The tables that we know, of what iptables-save printed."""
    found: dict[Table, Listing] = {}
    listing = Listing()
    for line in text.splitlines():
        if line.startswith("*"):
            name = line[1:].strip()
            listing = Listing(adopt=adopt)
            if name in tuple(Table):
                found[Table(name)] = listing
        elif line.startswith(":"):
            name, policy, *_ = line[1:].split()
            if policy == "-":
                listing.users[name] = []
            else:
                listing.kernels[name], listing.policies[name] = [], policy
        elif match := re.match(r"-A (\S+) ?(.*)", line):
            rules = listing.users if match[1] in listing.users else listing.kernels
            rules[match[1]].append(match[2])
    return found


def ours(listings: Mapping[Table, Listing], backend: Backend, family: Family) -> Tables | None:
    """What of it is ours; None where nothing is."""
    chains: list[Chain] = []
    found = False
    for table, listing in listings.items():
        for name, lines in listing.users.items():
            if not listing.is_our_chain(name):
                continue
            found = True
            if not name.startswith(MADE):
                rules = tuple(parse(line, family) for line in lines)
                chains.append(Chain(name, None, rules, table))
        for name, lines in listing.kernels.items():
            rules = tuple(
                _owned(line, family) for line in lines if listing.is_our_rule(table, name, line)
            )
            if rules:
                found = True
                chains.append(Chain(name, HOOKS.get((table, name)), rules, table))
    return Tables(backend, family, sorted_chains(chains)) if found else None


def _owned(line: str, family: Family) -> Rule | Unknown:
    """A rule without the comment that says that it is ours; one that lacks it is not as it was."""
    plain = re.sub(rf' ?-m comment --comment "?{OWNER}"?( |$)', r"\1", line).strip()
    return parse(plain, family) if plain != line else Unknown(f"rule without a comment: {line}")


def strangers(listings: Mapping[Table, Listing], want: Firewall) -> list[str]:
    """Chains of others that have the names of wanted ones."""
    wanted = {(chain.table, chain.name) for chain in want if isinstance(chain, Chain)}
    return [
        f"{name} ({table})"
        for table, listing in listings.items()
        for name in listing.users
        if (table, name) in wanted and not listing.is_our_chain(name)
    ]


# Scripts ------------------------------------------------------------------------------------------


def render(wanted: Sequence[Tables]) -> str:
    """The script that makes it where there is nothing of ours, for iptables-restore and, the same
    text, for ip6tables-restore: each passes over the lines that begin with the other's -4 or -6.
    """
    scripts = [script({}, each.chains, each.family) for each in wanted]
    if len(scripts) == 1:
        return scripts[0]
    lines: list[str] = []
    both = [dict(_blocks(text)) for text in scripts]
    for table in Table:
        blocks = [each.get(table, {}) for each in both]
        if not any(blocks):
            continue
        names = sorted({name for block in blocks for name in block})
        lines += [f"*{table}", *(f":{name} - [0:0]" for name in names if _is_user(name))]
        for name in names:
            one, other = (block.get(name, []) for block in blocks)
            if one == other:
                lines += one
            else:
                lines += [*_only_for(4, one), *_only_for(6, other)]
        lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines)


def _is_user(name: str) -> bool:
    return not any(name == kernels for _, kernels in HOOKS)


def _only_for(family: Family, lines: list[str]) -> list[str]:
    return [line if line.startswith("#") else f"-{family} {line}" for line in lines]


def _blocks(text: str) -> Iterator[tuple[Table, dict[str, list[str]]]]:
    """By table and chain, the lines of a script that only adds."""
    block: dict[str, list[str]] = {}
    said: list[str] = []
    for line in text.splitlines():
        if line.startswith("*"):
            block = {}
            yield Table(line[1:]), block
        elif line.startswith(":"):
            block[line[1:].split()[0]] = []
        elif line.startswith("#"):
            said.append(line)
        elif line.startswith("-"):
            block.setdefault(line.split()[1], []).extend([*said, line])
            said = []


def script(
    have: Mapping[Table, Listing],
    want: Firewall,
    family: Family,
    made: Iterable[tuple[Table, str]] = (),
) -> str:
    """For iptables-restore --noflush: from what is there to `want`, a commit for each table.

    `made`: chains of the kernel's that this creates.
    """
    lines: list[str] = []
    for table in Table:
        wanted = [chain for chain in want if isinstance(chain, Chain) and chain.table is table]
        created = [name for where, name in made if where is table]
        changes = _changes(table, have.get(table, Listing()), wanted, family, created)
        if changes:
            lines += [f"*{table}", *changes, "COMMIT"]
    return "".join(f"{line}\n" for line in lines)


def _changes(
    table: Table, have: Listing, want: list[Chain], family: Family, made: list[str]
) -> list[str]:
    chains = [chain for chain in want if chain.hook is None]
    keep = {chain.name for chain in chains}
    keep |= {f"{MADE}{name}" for name in (*made, *have.made)} if want else set()
    gone = [name for name in have.users if have.is_our_chain(name) and name not in keep]
    lines = [f":{name} - [0:0]" for name in (*sorted(keep), *gone)]
    for chain in chains:
        lines += _filled(chain, family)
    for name, rules in have.kernels.items():
        lines += [f"-D {name} {line}" for line in rules if have.is_our_rule(table, name, line)]
    for chain in want:
        if chain.hook is not None:
            lines += _hung(chain, family)
    return [*lines, *(f"-X {name}" for name in gone)]


def _filled(chain: Chain, family: Family) -> list[str]:
    lines: list[str] = []
    said = ""
    for rule in chain.rules:
        assert isinstance(rule, Rule), "only what is wanted is written"
        if rule.comment not in ("", said):
            said = rule.comment
            lines.append(f"# {said}")
        lines.append(f"-A {chain.name} {words(rule, family)}")
    return lines


def _hung(chain: Chain, family: Family) -> list[str]:
    """Ours in a chain of the kernel's. To the lean scheme's chains before all others': what comes
    first there may accept, and so end the walk.
    """
    lines: list[str] = []
    for rule in chain.rules:
        assert isinstance(rule, Rule), "only what is wanted is written"
        first = isinstance(rule.action, Jump) and rule.action.chain.startswith(PREFIX)
        where = f"-I {chain.name} 1" if first else f"-A {chain.name}"
        matches, target = _split(words(rule, family))
        lines.append(" ".join(filter(None, [where, matches, _COMMENT, target])))
    return lines


def _split(line: str) -> tuple[str, str]:
    """Its matches, its target."""
    at = re.search(r"(^| )-[jg] ", line)
    assert at is not None, line
    return line[: at.start()], line[at.start() :].strip()
