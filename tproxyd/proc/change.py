"""Reloads and upgrades as such: who asks for one, one at a time, and what can't be changed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine

from tproxyd.config import Config
from tproxyd.errors import ConfigError, KernelError, Problem, TproxydError
from tproxyd.proc.ask import Answer, Request
from tproxyd.proc.background import told
from tproxyd.proc.commands import Handler

Change = Callable[[], Coroutine[object, object, str]]  # what it says when it is done


class Changes:
    """Those that are under way, or wait for their turn.

    One that waits is for all who ask until it begins: it finds things as they are then.
    """

    def __init__(self, stop: asyncio.Event, **kinds: Change) -> None:
        """By the names of what can be asked for; each tells the log how it went."""
        self.turn = asyncio.Lock()
        self._stop, self._kinds = stop, kinds
        self._tasks: set[asyncio.Task[str]] = set()
        self._waiting: dict[str, asyncio.Task[str]] = {}

    def begin(self, what: str) -> None:
        """A signal asks for it, and is owed no answer."""
        self._asked(what)

    def handler(self, what: str) -> Handler:
        """A command that asks for it, and answers how it went."""

        async def handler(_: Request) -> Answer:
            task = self._asked(what)
            await asyncio.wait([task])
            if task.cancelled():
                raise _stopping(what)
            return {"said": task.result()}

        return handler

    def _asked(self, what: str) -> asyncio.Task[str]:
        if what not in self._waiting:
            task = told(asyncio.ensure_future(self._alone(what)), TproxydError)
            self._waiting[what] = task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return self._waiting[what]

    async def _alone(self, what: str) -> str:
        """One change at a time, and none once there is to be a stop: KernelError then."""
        async with self.turn:
            del self._waiting[what]
            if self._stop.is_set():
                raise _stopping(what)
            return await self._kinds[what]()

    async def end(self) -> None:
        """What is under way ends where it waits, and undoes what it has done."""
        for each in self._tasks:
            each.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _stopping(what: str) -> KernelError:
    return KernelError(what, "the daemon is stopping", "start it again")


def check(old: Config, new: Config) -> None:
    """ConfigError for what can't change: above all, how packets of open connections find home."""
    fixed = (
        ("mark", old.mark, new.mark),
        ("rules.backend", old.rules.backend, new.rules.backend),
        ("rules.scheme", old.rules.scheme, new.rules.scheme),
        ("rules.return_path", old.rules.return_path, new.rules.return_path),
        ("log.daemon_format", old.log.daemon_format, new.log.daemon_format),
    )
    problems = tuple(
        Problem(path, f"stays {was} as long as this process runs; a restart makes it {wish}")
        for path, was, wish in fixed
        if was != wish
    )
    if problems:
        raise ConfigError("by a reload", problems)


def of_its_file(reload: Handler, origin: Callable[[], str]) -> Handler:
    """As `reload`, for a daemon that reads `origin`; who names another file is told so."""

    async def handler(request: Request) -> Answer:
        _same_file(request.get("file"), origin())
        return await reload(request)

    return handler


def _same_file(asked: str | None, reads: str) -> None:
    if asked is not None and asked != os.path.realpath(reads):
        text = f"was not read: the daemon that runs reads {reads}"
        raise ConfigError(asked, (Problem("", text),))


async def no_os_error(what: str, change: Change) -> str:
    """The kernel may refuse at any of its calls: no more files, say. KernelError then."""
    try:
        return await change()
    except OSError as error:
        why = error.strerror or str(error)
        raise KernelError(what, why, "what was before goes on; see tproxyd status") from error
