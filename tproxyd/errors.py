"""Who was at fault, and how a connection ended.

Four families, so that the place where an error surfaces never has to guess whose fault it was:
ConfigError (the operator's words), KernelError (the kernel refused), PeerError (bytes from
downstream), UpstreamError (the host we dialled). Anything else that escapes is our own bug.

Messages read "can't <do>: <why>; <what to try>".
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class CloseReason(StrEnum):
    """Why a connection ended, in one word: the same word in the access log and in the metrics.

    A closed set: dashboards and alerts are written against it. The first four are the ordinary
    ends; the rest name the party or the limit that ended the connection before its time.
    """

    DOWNSTREAM_FIN = "downstream_fin"  # both sides finished; the client finished first
    UPSTREAM_FIN = "upstream_fin"  # both sides finished; the application finished first
    DOWNSTREAM_RESET = "downstream_reset"  # the client sent RST; it was passed on
    UPSTREAM_RESET = "upstream_reset"  # the application sent RST; it was passed on
    IDLE_TIMEOUT = "idle_timeout"  # no byte either way for idle_timeout_s
    HALF_CLOSE_TIMEOUT = "half_close_timeout"  # one side finished, the other fell silent
    HEADER_TIMEOUT = "header_timeout"  # no whole PROXY header within header_timeout_s
    HEADER_MISSING = "header_missing"  # a header was required, other bytes or EOF came
    HEADER_INVALID = "header_invalid"  # malformed PROXY header
    HEADER_REJECTED = "header_rejected"  # a header from a peer whose policy is "reject"
    CLIENT_REFUSED = "client_refused"  # the header names an address that nobody may claim
    LOOP = "loop"  # the original destination is our own listener
    OVERLOAD = "overload"  # max_connections was reached
    CLIENT_OVERLOAD = "client_overload"  # one of the limits per client was reached
    NO_UPSTREAM = "no_upstream"  # every upstream is down, ejected, or not resolved yet
    UPSTREAM_REFUSED = "upstream_refused"  # connect: ECONNREFUSED
    UPSTREAM_UNREACHABLE = "upstream_unreachable"  # connect: no route, or prohibited
    UPSTREAM_TIMEOUT = "upstream_timeout"  # connect: no answer within connect_timeout_s
    NO_SOURCE_PORT = "no_source_port"  # every source port we tried was taken
    DRAIN_TIMEOUT = "drain_timeout"  # still open when the drain deadline of a stop passed
    KILLED = "killed"  # by `tproxyd kill`
    INTERNAL = "internal"  # a bug of ours, or the kernel refused an ordinary request


NO_MEMORY = "out of memory"  # the detail of an INTERNAL end: a MemoryError says nothing itself


class TproxydError(Exception):
    """Base of everything that tproxyd raises on purpose."""


class Problem(NamedTuple):
    """One thing wrong with a configuration: `path` is its TOML path ("" for the file itself)."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}" if self.path else self.text


class ConfigError(TproxydError):
    """The configuration cannot be used. Carries every problem that was found, not the first."""

    def __init__(self, origin: str, problems: tuple[Problem, ...]) -> None:
        """`origin` names the source ("/etc/tproxyd/tproxyd.toml")."""
        self.origin = origin
        self.problems = problems
        lines = "".join(f"\n  {problem}" for problem in problems)
        super().__init__(f"can't use the configuration {origin}:{lines}")


class KernelError(TproxydError):
    """The kernel, or the tool that speaks to it for us, refused.

    `action` continues "can't …"; `hint` says what to try and is never empty. `wrote`: the kernel
    state may be another one than before.
    """

    def __init__(self, action: str, why: str, hint: str, *, wrote: bool = False) -> None:
        self.action, self.why, self.hint, self.wrote = action, why, hint, wrote
        super().__init__(f"can't {action}: {why}; {hint}")


class Unreachable(TproxydError):
    """There is no running daemon to ask, or it does not do what it is asked for."""


class _ConnectionFailure(TproxydError):
    """One connection ends here: `reason` is what is counted, `detail` what is logged."""

    def __init__(self, reason: CloseReason, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


class PeerError(_ConnectionFailure):
    """The downstream peer sent something that ends its connection."""


class UpstreamError(_ConnectionFailure):
    """The upstream could not be reached as planned."""
