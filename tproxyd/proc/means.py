"""With what the keeper of the kernel state works: what it is asked, and the kernel it asks.

The real ones are made in its process only: nothing of tproxyd.kernel is imported anywhere else in
proc/. Tests have others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from tproxyd.config import Config


@dataclass(frozen=True, slots=True)
class Report:
    """A kernel.reconcile.Report as it comes over the socket; sentences, but for `return_path`."""

    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    installed: bool = False
    return_path: str = ""
    wrong: tuple[str, ...] = ()
    replaced: bool = False


class Verb(StrEnum):
    CLAIM = "claim"  # be the one who keeps the state here, or say who is
    INSTALL = "install"  # make the state; where the claim is ours, keep it so from now on
    GUARD = "guard"  # the same, but a failure is news, not the answer
    STOP_INTERCEPTING = "stop intercepting"
    CHECK = "check"
    CLEAN = "clean"
    MOVE = "move"  # to another configuration, or stay
    RELEASE = "release"  # keep it no longer, and leave it as it is
    LEAVE = "leave"  # the same, and end: there is no answer


# What the kernel side is asked: INSTALL, STOP_INTERCEPTING, CHECK, CLEAN, RELEASE.
Kernel = Callable[[Verb], Report]


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class News(Protocol):
    """kernel.watch.News"""

    @property
    def concerns_us(self) -> bool: ...
    @property
    def routing(self) -> bool: ...
    @property
    def authors(self) -> tuple[str, ...]: ...


class Outside(Protocol):
    """kernel.guard.Guard"""

    @property
    def hears(self) -> bool: ...
    def claim(self) -> None: ...
    def follow(self, config: Config) -> None: ...
    def files(self) -> Sequence[HasFileno]: ...
    def read(self) -> News: ...
    def changed(self) -> bool: ...
    def release(self) -> None: ...


def load_kernel(config: Config) -> Kernel:
    """The real one. Called in the child only."""
    from tproxyd.kernel import reconcile
    from tproxyd.kernel.machine import lasting
    from tproxyd.kernel.ownership import Own

    world = lasting()

    def do(verb: Verb) -> Report:
        match verb:
            case Verb.INSTALL:
                report = reconcile.keep(config, world)
            case Verb.STOP_INTERCEPTING:
                report = reconcile.keep(config, world, intercept=False)
            case Verb.CHECK:
                report = reconcile.check(config, world=world)
            case Verb.CLEAN:
                report = reconcile.clean(world=world)
            case Verb.RELEASE:
                world.own(Own.NOT)
                return Report()
            case _:
                raise AssertionError(verb)
        path = report.return_path or ""
        return Report(
            report.changed,
            report.notes,
            report.differs,
            report.installed,
            path,
            report.wrong,
            report.replaced,
        )

    return do


def prepare_to_install() -> None:
    """Let what the first install will need be loaded beside the rest. Called in the child only."""
    from tproxyd.kernel import routewriter

    routewriter.prepare()


def load_outside() -> Outside:
    """The real one. Called in the child only."""
    from tproxyd.kernel.guard import Guard

    return Guard()


@dataclass(frozen=True, slots=True)
class Means:
    """Both, by how they are made; and what is done ahead of that where install will be asked."""

    kernel: Callable[[Config], Kernel] = load_kernel
    outside: Callable[[], Outside] = load_outside
    prepare: Callable[[], None] = prepare_to_install
