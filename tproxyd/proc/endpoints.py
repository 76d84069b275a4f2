"""Where a daemon is asked: its admin endpoint and its command socket, which come and go together.

Both belong to the address that the configuration gives the admin endpoint. In an upgrade that
address stays and changes hands: the listening socket is handed on, and `close` keeps a copy, for
the case that this process takes it back.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping

from tproxyd.addr import Endpoint
from tproxyd.config import Config
from tproxyd.errors import KernelError
from tproxyd.proc import admin, pages
from tproxyd.proc.ask import name_of
from tproxyd.proc.commands import BIND_PATIENCE_S, CommandServer, Handler

log = logging.getLogger("tproxyd")


class Endpoints:
    def __init__(
        self,
        config: Config,
        provider: pages.Provider,
        handlers: Mapping[str, Handler],
        before: socket.socket | None = None,
    ) -> None:
        """The address is taken now, and nobody answers yet; KernelError where it can't be.

        `before` is a socket that listens for us: a copy is taken over where it is there already,
        else the two are not in each other's way.
        """
        self._config, self._provider, self._handlers = config, provider, handlers
        self.socket = self._opened(before)
        self._admin: admin.Server | None = None
        self._commands: CommandServer | None = None

    def _opened(self, before: socket.socket | None) -> socket.socket | None:
        where = self._config.admin
        if where is None:
            return None
        if before is not None and Endpoint(*before.getsockname()[:2]) == where:
            return before.dup()
        return admin.open_socket(where, before)

    async def serve(self) -> None:
        """Also where another process has the name of the command socket: until that is free."""
        if self.socket is not None and self._admin is None:
            self._admin = await admin.Server.start(self.socket.dup(), self._provider)
        if self._commands is None:
            self._commands = CommandServer(name_of(self._config), self._handlers)
            # Several daemons may well live without an admin endpoint; one has the name of those.
            patience_s = 0.0 if self._config.admin is None else BIND_PATIENCE_S
            try:
                await self._commands.start(patience_s)
            except KernelError as error:
                level = logging.WARNING if self._config.admin is None else logging.ERROR
                without = "signals do without: SIGHUP reloads, SIGUSR2 upgrades"
                log.log(level, "%s; %s", error, without)
                self._commands.keep_trying()

    async def close(self) -> None:
        """Nobody answers, and the name is free; commands under way are still answered."""
        if self._commands is not None:
            self._commands.close()
            self._finishing = self._commands
            self._commands = None
        if self._admin is not None:
            server, self._admin = self._admin, None
            await server.close()

    async def finish(self) -> None:
        """At the very end: the address, too, is free."""
        finishing = self._commands or self._finishing
        await self.close()
        if finishing is not None:
            await finishing.finish()
        if self.socket is not None:
            self.socket.close()

    _finishing: CommandServer | None = None
