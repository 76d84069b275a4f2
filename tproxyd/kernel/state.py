"""What the kernel holds for us, as plain values; the difference of two states; their text.

`desired` makes a state out of a Config, routing and nft read one out of the kernel, `diff` says
what lies between the two, reconcile applies it. There is no second list of deletions: clean is
the way to EMPTY.

Whose is it? The nft table `inet tproxyd` is ours by its name. In the tables of iptables, chains are
by theirs, and rules in the kernel's own chains by a comment (iptsave.py). A state that was read has
what any backend holds, a wish at most one: what another has left is removed. Rules and local routes
are ours by their routing protocol number (rtm_protocol, FRA_PROTOCOL: a byte that the kernel only
stores), so that they are found whatever table, mark or priority the configuration of their day gave
them.

Sysctls have no owner field, and clean must give them back without a file or a process that
remembers. So the same byte remembers them: our number is 133 plus a bit for each of MARK_SYSCTLS
that was 0 before us and is to be put back to 0,

    133   ours; nothing to give back
    134   … and net.ipv4.tcp_fwmark_accept was 0
    135   … and net.ipv4.fwmark_reflect was 0
    137   … and net.ipv6.fwmark_reflect was 0      (140: all three were)

and all our rules and routes carry the same one, so any survivor can tell. A sysctl that was set
before we came has no bit and stays set. The memory is written before the sysctl and dropped after
it (see Stage), so a crash between any two steps loses nothing.

All rules and routes may go at once: systemd-networkd, restarted, removes what it does not know. So
the sysctls, of which the kernel only asks whether they are 0, are not set to 1 but to 133, and tell
by themselves whose they are; a kernel that takes only 1 has the numbers. A state that was *read*
therefore contains a sysctl only while it is 133 or some survivor has its bit. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from tproxyd.config import Backend
from tproxyd.kernel.firewall import Family, Firewall
from tproxyd.kernel.words import in_words

FWMARK_ACCEPT = "net.ipv4.tcp_fwmark_accept"
REFLECT_V4, REFLECT_V6 = "net.ipv4.fwmark_reflect", "net.ipv6.fwmark_reflect"
MARK_SYSCTLS = (FWMARK_ACCEPT, REFLECT_V4, REFLECT_V6)

# 133 as our routing table, and as the value of our sysctls. None of these is in iproute2's list
# (/etc/iproute2/rt_protos).
OURS = 133
NUMBERS = range(OURS, OURS + (1 << len(MARK_SYSCTLS)))


def number_for(sysctls: Iterable[str]) -> int:
    """Our protocol number when these are to be given back."""
    return OURS + sum(1 << MARK_SYSCTLS.index(name) for name in sysctls)


def remembered(number: int | None) -> frozenset[str]:
    """The sysctls that an item with this protocol number says are to be given back."""
    if number is None or number not in NUMBERS:
        return frozenset()
    bits = number - OURS
    return frozenset(name for i, name in enumerate(MARK_SYSCTLS) if bits >> i & 1)


@dataclass(frozen=True, slots=True)
class Sysctl:
    name: str
    value: int

    @property
    def slot(self) -> tuple[object, ...]:
        return (self.name,)

    @property
    def command(self) -> str:
        return f"sysctl -w {self}"

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


@dataclass(frozen=True, slots=True)
class Route:
    """`local … dev lo`: packets to there that come to this table are delivered on this host."""

    family: Family
    table: int
    protocol: int
    destination: str = "default"  # or a prefix

    @property
    def slot(self) -> tuple[object, ...]:
        return (self.family, self.table, self.destination)

    @property
    def command(self) -> str:
        return str(self).replace(" route ", " route add ")

    def __str__(self) -> str:
        return (
            f"ip -{self.family} route local {self.destination} dev lo"
            f" table {self.table} proto {self.protocol}"
        )


@dataclass(frozen=True, slots=True)
class Address:
    """An IPv6 address of lo."""

    address: str
    protocol: int

    @property
    def slot(self) -> tuple[object, ...]:
        return ("address", self.address)

    @property
    def command(self) -> str:
        return str(self).replace(" addr ", " addr add ")

    def __str__(self) -> str:
        return f"ip -6 addr {self.address}/128 dev lo proto {self.protocol}"


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """Packets whose mark is `mark` under `mask` are routed by `table`."""

    family: Family
    priority: int
    mark: int
    mask: int
    table: int
    protocol: int

    @property
    def slot(self) -> tuple[object, ...]:
        return (self.family, self.priority, self.mark, self.mask, self.table)

    @property
    def command(self) -> str:
        return str(self).replace(" rule ", " rule add ")

    def __str__(self) -> str:
        return (
            f"ip -{self.family} rule priority {self.priority} fwmark {self.mark:#x}/{self.mask:#x}"
            f" lookup {self.table} protocol {self.protocol}"
        )


@dataclass(frozen=True, slots=True)
class UnknownRoute:
    """A route with a number of ours and of another shape: it can only be removed."""

    family: Family
    text: str
    slot: None = None

    @property
    def command(self) -> str:
        return f"# {self}"

    def __str__(self) -> str:
        return f"ip -{self.family} route {self.text}"


@dataclass(frozen=True, slots=True)
class UnknownRule:
    """A policy rule with a number of ours and of another shape: it can only be removed."""

    family: Family
    text: str
    slot: None = None

    @property
    def command(self) -> str:
        return f"# {self}"

    def __str__(self) -> str:
        return f"ip -{self.family} rule {self.text}"


@dataclass(frozen=True, slots=True)
class Tables:
    """Ours in the tables of iptables for one IP version; sorted by table and name."""

    backend: Backend  # iptables-nft or iptables-legacy: the kernel keeps them apart
    family: Family
    chains: Firewall = ()

    @property
    def slot(self) -> tuple[object, ...]:
        return (self.backend, self.family)

    @property
    def command(self) -> str:
        return f"# {self}"

    def __str__(self) -> str:
        return f"the firewall rules ({self.backend}, IPv{self.family})"


Item = Sysctl | Route | UnknownRoute | Address | PolicyRule | UnknownRule | Tables


@dataclass(frozen=True, slots=True)
class KernelState:
    """Everything of ours. Order matters within a chain only; `diff` compares, not `==`."""

    sysctls: tuple[Sysctl, ...] = ()
    routes: tuple[Route | UnknownRoute, ...] = ()
    rules: tuple[PolicyRule | UnknownRule, ...] = ()
    firewall: Firewall = ()  # of nft
    iptables: tuple[Tables, ...] = ()
    addresses: tuple[Address, ...] = ()


EMPTY = KernelState()


def holder(state: KernelState) -> Backend | None:
    """Who has rules of ours, if anybody."""
    if state.firewall:
        return Backend.NFT
    return state.iptables[0].backend if state.iptables else None


# The way from one state to another ----------------------------------------------------------------


class Stage(IntEnum):
    """The order of changes.

    On the way up the interception comes last, when everything that brings answers home stands; on
    the way down it goes first. A number is written before the sysctls that it remembers (in the
    routes, the first up) and dropped after them (in the rules too: they may be the survivor).
    """

    ADD_ROUTE = 0
    ADD_SYSCTL = 1
    ADD_RULE = 2
    SET_FIREWALL = 3
    DROP_FIREWALL = 4
    DROP_SYSCTL = 5
    DROP_RULE = 6
    DROP_ROUTE = 7

    @property
    def builds(self) -> bool:
        return self <= Stage.SET_FIREWALL


@dataclass(frozen=True, slots=True)
class Change:
    """One write. Without `old` an addition, without `new` a removal, with both a replacement."""

    stage: Stage
    old: Item | Firewall | None
    new: Item | Firewall | None

    def __str__(self) -> str:
        if isinstance(self.old, tuple) or isinstance(self.new, tuple):
            verb = "replace" if self.old and self.new else "add" if self.new else "remove"
            return f"{verb} the firewall rules (nft table inet tproxyd)"
        if isinstance(self.old or self.new, Tables):
            verb = "replace" if self.old and self.new else "add" if self.new else "remove"
            return f"{verb} {self.old or self.new}"
        if isinstance(self.new, Sysctl):
            return f"set {self.new}"
        if isinstance(self.old, Sysctl):
            return f"put {self.old.name} back to 0"
        if self.old is not None and self.new is not None:
            return f"replace {self.old} by {self.new}"
        return f"remove {self.old}" if self.new is None else f"add {self.new}"

    @property
    def symptom(self) -> str:
        """What was wrong that this puts right."""
        match self.old, self.new:
            case (tuple(), _) | (_, tuple()):
                what = "the firewall rules (nft table inet tproxyd)"
                return f"{what} were {_fared(self.old, self.new)}"
            case (Tables(), _) | (_, Tables()):
                return f"{self.old or self.new} were {_fared(self.old, self.new)}"
            case Sysctl(), Sysctl():
                return f"{self.old} instead of {self.new}"
            case _, Sysctl() as new:
                return f"{new} was not set"
            case _, None:
                return f"too much: {self.old}"
            case None, _:
                return f"missing: {self.new}"
            case _:
                return f"{self.old} instead of {self.new}"


def _fared(old: object, new: object) -> str:
    return "changed" if old and new else "gone" if new else "too much"


def diff(have: KernelState, want: KernelState) -> tuple[Change, ...]:
    """The changes that lead from `have` to `want`, in the order in which to make them."""
    changes = [
        *_paired(have.sysctls, want.sysctls),
        *_paired(have.routes, want.routes),
        *_paired(have.rules, want.rules),
        *_paired(have.iptables, want.iptables),
        *_paired(have.addresses, want.addresses),
    ]
    if Counter(have.firewall) != Counter(want.firewall):
        stage = Stage.SET_FIREWALL if want.firewall else Stage.DROP_FIREWALL
        changes.append(Change(stage, have.firewall, want.firewall))
    return tuple(sorted(changes, key=lambda change: change.stage))


def _paired(have: Sequence[Item], want: Sequence[Item]) -> list[Change]:
    """Additions and removals; those that share a slot (all but the protocol) as replacements.

    Counted, because the kernel keeps two equal policy rules if it is asked to.
    """
    spare = list((Counter(have) - Counter(want)).elements())
    changes: list[Change] = []
    for new in (Counter(want) - Counter(have)).elements():
        old = next((item for item in spare if item.slot == new.slot), None)
        if old is not None:
            spare.remove(old)
            between = _remembering_both(old, new)
            if between is not None:
                changes.append(Change(_stage(old, between), old, between))
                old = between
        changes.append(Change(_stage(old, new), old, new))
    return [*changes, *(Change(_stage(old, None), old, None) for old in spare)]


def _remembering_both(old: Item, new: Item) -> Item | None:
    """A step between, where the new number remembers a sysctl and forgets another."""
    if isinstance(old, Route | PolicyRule) and isinstance(new, Route | PolicyRule):
        both = number_for(remembered(old.protocol) | remembered(new.protocol))
        if both not in (old.protocol, new.protocol):
            return replace(new, protocol=both)
    return None


def _stage(old: Item | None, new: Item | None) -> Stage:
    """Where a change stands; a replacement that drops the memory of a sysctl is a removal."""
    forgets = False
    if isinstance(old, Route | PolicyRule) and isinstance(new, Route | PolicyRule):
        forgets = not remembered(old.protocol) <= remembered(new.protocol)
    builds = new is not None and not forgets
    match new or old:
        case Sysctl():
            return Stage.ADD_SYSCTL if builds else Stage.DROP_SYSCTL
        case Route() | UnknownRoute() | Address():
            return Stage.ADD_ROUTE if builds else Stage.DROP_ROUTE
        case Tables():
            return Stage.SET_FIREWALL if builds else Stage.DROP_FIREWALL
        case _:
            return Stage.ADD_RULE if builds else Stage.DROP_RULE


# Text ---------------------------------------------------------------------------------------------


def made_by(state: KernelState) -> list[str]:
    """What a shell would run for all but the firewall."""
    parts = (*state.routes, *state.addresses, *state.sysctls, *state.rules)
    return [item.command for item in parts]


def render(state: KernelState) -> str:
    """The state for people: the commands that would make it, then the firewall in words."""
    lines = made_by(state)
    for tables in state.iptables:
        lines += [tables.command, *in_words(tables.chains)]
    lines += in_words(state.firewall)
    return "".join(f"{line}\n" for line in lines)
