"""Host names that mean something in one namespace only, and can change their meaning.

`ip netns exec` binds every file of /etc/netns/NAME over the one in /etc, for the process that it
starts (ip-netns(8)). What is bound is the file, not its name: a change has to be written into it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from lib.netns import Namespace

_LOCAL = "127.0.0.1 localhost\n::1 localhost\n"


class Names:
    """The hosts file of a namespace; every other name has no answer, at once."""

    def __init__(self, directory: Path) -> None:
        self._hosts = directory / "hosts"
        self.say({})
        # Nobody listens there: refused, where the machine's own name server would be waited for.
        (directory / "resolv.conf").write_text("nameserver 127.0.0.1\n")

    def say(self, names: dict[str, list[str]]) -> None:
        """From now on these are the addresses of these names, and no other name has any."""
        lines = [f"{host} {name}\n" for name, hosts in names.items() for host in hosts]
        with self._hosts.open("r+" if self._hosts.exists() else "w") as file:
            # One write: a reader sees the old file or the new one, the rest of either is comments.
            text = _LOCAL + "".join(lines)
            old = file.seek(0, 2)
            file.seek(0)
            file.write(text + "#" * max(0, old - len(text) - 1) + "\n")


@contextlib.contextmanager
def naming(namespace: Namespace) -> Iterator[Names]:
    """For what is started in `namespace` from now on."""
    every = Path("/etc/netns")
    directory = every / namespace.name
    directory.mkdir(parents=True)
    try:
        yield Names(directory)
    finally:
        shutil.rmtree(directory)
        with contextlib.suppress(OSError):  # others have theirs in it
            every.rmdir()
