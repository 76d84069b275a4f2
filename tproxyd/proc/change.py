"""What a reload can change, and what is said where it can't be made."""

from __future__ import annotations

from collections.abc import Callable, Coroutine

from tproxyd.config import Config
from tproxyd.errors import ConfigError, KernelError, Problem

Change = Callable[[], Coroutine[object, object, str]]  # what it says when it is done


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


async def no_os_error(what: str, change: Change) -> str:
    """The kernel may refuse at any of its calls: no more files, say. KernelError then."""
    try:
        return await change()
    except OSError as error:
        why = error.strerror or str(error)
        raise KernelError(what, why, "what was before goes on; see tproxyd status") from error
