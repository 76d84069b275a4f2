"""Make the kernel hold what it should: lock, read, diff, apply, read back, report.

The entry points of the control plane: install, clean, check, and rules (text only). All of them
read the kernel and keep no memory of what they did, so they work after SIGKILL at any point,
without the configuration that installed, and twice in a row. `clean` is `reconcile(EMPTY)`.

What happens when a step fails:

- On the way up nothing is built on it: the stages behind it are left out. Interception, the last of
  them, never stands without the way home, and an older state that works keeps working.
- On the way down interception keeps what it stands on: where it cannot be read or removed, the way
  home stays. Other removals go on, so that clean removes what can be removed; except that when the
  sysctl cannot be given back, the rules and routes that remember it stay (state.py).
- The KernelError says what was done all the same and what is still to do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from tproxyd.config import Backend, Config, ReturnPath, Rules
from tproxyd.errors import KernelError
from tproxyd.istio.options import IstioOptions
from tproxyd.kernel.clashes import Clash
from tproxyd.kernel.desired import (
    PRIORITY,
    BackendChoice,
    Facts,
    backend,
    desired,
    desired_istio,
    dials_here,
    notes,
    return_path,
)
from tproxyd.kernel.firewall import Firewall
from tproxyd.kernel.machine import Machine
from tproxyd.kernel.nftlang import render
from tproxyd.kernel.ownership import ownership
from tproxyd.kernel.routing import Routing
from tproxyd.kernel.state import EMPTY, Change, KernelState, Stage, Tables, diff, holder, made_by


@dataclass(frozen=True, slots=True)
class Report:
    """What a call did and found, in words."""

    changed: tuple[str, ...] = ()  # the writes, in their order
    differs: tuple[
        str, ...
    ] = ()  # what is still not as it should be: the changes that would fix it
    notes: tuple[str, ...] = ()  # what the operator should hear
    wrong: tuple[str, ...] = ()  # of what was there, where it was changed
    installed: bool = False  # the kernel holds something of ours
    return_path: ReturnPath | None = None  # how answers on this host find home, if there are any
    replaced: bool = False  # what was changed stood before, and was another


class World(Protocol):
    """The kernel, as reconcile sees it."""

    def lock(self) -> AbstractContextManager[None]: ...

    def facts(self) -> Facts: ...

    def read_routing(self) -> KernelState:
        """Everything of ours but the firewall."""
        ...

    def read_firewall(self) -> Firewall:
        """Of nft."""
        ...

    def read_tables(self) -> tuple[Tables, ...]:
        """Of iptables, both variants."""
        ...

    def apply(self, change: Change) -> None: ...


def install(config: Config, *, intercept: bool = True, world: World | None = None) -> Report:
    """Make the state that `config` asks for; without `intercept` the part that a drain needs."""
    return _install(config, intercept, world or Machine())


def keep(config: Config, world: Machine, *, intercept: bool = True) -> Report:
    """As install, by the process that keeps this state: its table is its own, if asked for."""
    return _install(config, intercept, world, keeper=world)


def _install(
    config: Config, intercept: bool, world: World, *, keeper: Machine | None = None
) -> Report:
    with world.lock():
        have = _read(world)
        facts = _facts(world, have)
        said = notes(config, facts)
        if keeper is not None:
            own, more = ownership(config, facts)
            if keeper.own(own):
                have = _read(world)  # a table that is not our own is not as it should be
            said = (*said, *more)
        want = desired(config, facts=facts, intercept=intercept)
        if want.routes and not facts.lo_up:
            why = "lo is down, and answers come home through it"
            raise KernelError("install the kernel state", why, "ip link set lo up")
        report = _reconcile(have, want, world, said, _chosen(config, facts))
        if keeper is not None:
            keeper.settle(backend(config, facts).backend, return_path(config, facts).path)
        return report


def _facts(world: World, have: KernelState) -> Facts:
    """AUTO stays with what there is: rules that others make later must not move ours, and with them
    the way home of open connections.
    """
    facts = world.facts()
    return replace(facts, backend=facts.backend or holder(have))


def _chosen(config: Config, facts: Facts) -> ReturnPath | None:
    return return_path(config, facts).path if dials_here(config, facts) else None


def clean(*, world: World | None = None) -> Report:
    """Remove everything of ours."""
    return reconcile(EMPTY, world or Machine())


def check(config: Config, *, intercept: bool = True, world: World | None = None) -> Report:
    """Read only: `differs` is what `install` would change."""
    world = world or Machine()
    with world.lock():
        have = _read(world)
        facts = _facts(world, have)
    said, chosen = notes(config, facts), _chosen(config, facts)
    want = desired(config, facts=facts, intercept=intercept)
    differs = tuple(map(str, diff(have, want)))
    return Report((), differs, said, (), have != EMPTY, chosen)


def rules(config: Config, *, facts: Facts) -> str:
    """What install would do, as a script for `nft -f`, or one for iptables-restore and
    ip6tables-restore; the commands beside it are comments.
    """
    want = desired(config, facts=facts)
    lines = [f"# {note}" for note in notes(config, facts)]
    return _text(want, backend(config, facts).backend, lines)


def _text(want: KernelState, chosen: Backend, said: list[str]) -> str:
    head = "".join(f"{line}\n" for line in (*said, *(f"# {each}" for each in made_by(want)), ""))
    if chosen is Backend.NFT:
        return head + render(want.firewall)
    from tproxyd.kernel import iptsave

    commands = {4: "iptables", 6: "ip6tables"}
    variant = "nft" if chosen is Backend.IPTABLES_NFT else "legacy"
    tools = [f"{commands[each.family]}-{variant}-restore --noflush -w" for each in want.iptables]
    return f"{head}# {' and '.join(tools)}\n{iptsave.render(want.iptables)}"


# The scheme of istio-iptables, by that tool's own options -----------------------------------------


Asked = Backend | BackendChoice  # of whoever has chosen already, and says why
# What must go before the first write, and not before it is known what to write; in words.
MakeRoom = Callable[[], Sequence[str]]


def install_istio(
    options: IstioOptions,
    asked: Asked = Backend.AUTO,
    *,
    make_room: MakeRoom | None = None,
    world: World | None = None,
) -> Report:
    """Make the state that istio-iptables is told to make, in the place of what it may have made."""
    world = world or Machine(adopt=options.mark)
    with world.lock():
        have = _read(world)
        facts = _facts(world, have)
        chosen = _asked(asked, facts)
        if not facts.lo_up:
            why = "lo is down, and answers come home through it"
            raise KernelError("install the kernel state", why, "ip link set lo up")
        want = desired_istio(options, chosen.backend)
        return _reconcile(have, want, world, (chosen.why,), make_room=make_room)


def check_istio(
    options: IstioOptions, asked: Asked = Backend.AUTO, *, world: World | None = None
) -> Report:
    """Read only: `differs` is what install_istio would change."""
    world = world or Machine(adopt=options.mark)
    with world.lock():
        have = _read(world)
        chosen = _asked(asked, _facts(world, have))
    differs = diff(have, desired_istio(options, chosen.backend))
    return Report((), tuple(map(str, differs)), (chosen.why,), (), have != EMPTY)


def clean_istio(options: IstioOptions, *, world: World | None = None) -> Report:
    """Remove everything of ours, and what istio-iptables has made by these options."""
    return reconcile(EMPTY, world or Machine(adopt=options.mark))


def left_istio(options: IstioOptions, *, world: World | None = None) -> Report:
    """Read only: `differs` is what clean_istio would change."""
    world = world or Machine(adopt=options.mark)
    with world.lock():
        return Report(differs=tuple(map(str, diff(_read(world), EMPTY))))


def rules_istio(options: IstioOptions, asked: Asked = Backend.AUTO, *, facts: Facts) -> str:
    """What install_istio would do, as `rules` has it."""
    chosen = _asked(asked, facts)
    return _text(desired_istio(options, chosen.backend), chosen.backend, [f"# {chosen.why}"])


def _asked(asked: Asked, facts: Facts) -> BackendChoice:
    if isinstance(asked, BackendChoice):
        return asked
    return backend(Config(rules=Rules(backend=asked)), facts)


# This machine -------------------------------------------------------------------------------------


def facts() -> Facts:
    """What this machine is, as far as the state depends on it."""
    machine = Machine()
    with machine.lock():
        return _facts(machine, _read(machine, []))


def clashes(config: Config) -> tuple[Clash, ...]:
    """What other programs have where we want to be."""
    routing = Routing()
    with contextlib.closing(routing):
        return routing.clashes(config.mark, config.table, PRIORITY)


def reconcile(want: KernelState, world: World) -> Report:
    """Make the kernel hold exactly `want` of ours; KernelError when it does not in the end."""
    errors: list[KernelError] = []
    failed: set[Stage] = set()
    with world.lock():
        # Install must not write over what it cannot read; clean cleans what can be read.
        have = _read(world, errors if want == EMPTY else None, failed)
        return _reconcile(have, want, world, errors=errors, failed=failed)


def _reconcile(
    have: KernelState,
    want: KernelState,
    world: World,
    said: tuple[str, ...] = (),
    chosen: ReturnPath | None = None,
    *,
    make_room: MakeRoom | None = None,
    errors: Sequence[KernelError] = (),
    failed: Set[Stage] = frozenset(),
) -> Report:
    """`errors` and `failed` are of reading what it has."""
    errors, failed = [*errors], {*failed}
    wrong: list[str] = []
    replaced = False
    before, changes = have, diff(have, want)
    changed = [] if make_room is None else [*make_room()]
    for change in changes:
        if _is_left_out(change.stage, failed):
            continue
        try:
            world.apply(change)
        except KernelError as error:
            errors.append(error)
            failed.add(change.stage)
        else:
            changed.append(str(change))
            wrong.append(change.symptom)
            replaced = replaced or bool(change.old)
    if changed or failed:
        have = _read(world, errors)
    left = tuple(map(str, diff(have, want)))
    if errors or left:
        wrote = bool(changed or diff(before, have))  # one that failed may have come halfway
        raise _failure(errors, changed, left, wrote=wrote)
    return Report(tuple(changed), (), said, tuple(wrong), have != EMPTY, chosen, replaced)


def _is_left_out(stage: Stage, failed: set[Stage]) -> bool:
    unbuilt = any(earlier.builds and earlier < stage for earlier in failed)
    intercepted = Stage.DROP_FIREWALL in failed and stage > Stage.DROP_FIREWALL
    unreturned = Stage.DROP_SYSCTL in failed and stage > Stage.DROP_SYSCTL
    return unbuilt or intercepted or unreturned


def _read(
    world: World,
    errors: list[KernelError] | None = None,
    failed: set[Stage] | None = None,
) -> KernelState:
    """Everything of ours. With a list for the errors, what cannot be read counts as absent."""
    state, firewall, tables = EMPTY, EMPTY.firewall, EMPTY.iptables
    with _noted(errors):
        state = world.read_routing()
    with _noted(errors, failed):
        firewall = world.read_firewall()
    with _noted(errors, failed):
        tables = world.read_tables()
    return replace(state, firewall=firewall, iptables=tables)


@contextlib.contextmanager
def _noted(errors: list[KernelError] | None, failed: set[Stage] | None = None) -> Iterator[None]:
    """A refusal to be read, written down where there is a list; `failed`: interception's."""
    try:
        yield
    except KernelError as error:
        if errors is None:
            raise
        errors.append(error)
        if failed is not None:
            failed.add(Stage.DROP_FIREWALL)  # who knows what stands


def _failure(
    errors: list[KernelError], changed: list[str], left: tuple[str, ...], *, wrote: bool
) -> KernelError:
    """One error that tells everything: what was refused, what was done, what is missing."""
    told = dict.fromkeys(map(str, errors))
    lines = [("also", text) for text in [*told][1:]]
    lines += [("done all the same", change) for change in changed]
    lines += [("still to do", change) for change in left]
    more = "".join(f"\n  {label}: {text}" for label, text in dict.fromkeys(lines))
    if not errors:
        why, hint = "what was written reads back differently", "does another program change it?"
        return KernelError("make the kernel state", why, hint + more, wrote=wrote)
    failure = KernelError(errors[0].action, errors[0].why, errors[0].hint + more, wrote=wrote)
    failure.__cause__ = ExceptionGroup("every refusal", errors)
    return failure
