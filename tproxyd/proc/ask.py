"""Asking a running daemon to do something: the client's end of its command socket.

An abstract unix socket (unix(7)), so it belongs to a network namespace, as the daemon does, needs
no directory that it may write to, and is gone with the process, however that ends. It is named
after the admin endpoint of the configuration: that is what tells the daemons of a namespace apart,
and `-c FILE` finds the one that FILE started.

A request is one JSON line with a "verb", an answer is one JSON line, and that is the end of the
connection. What the daemon refuses, a KernelError or a ConfigError, is raised here again with the
same words. Whom it lets ask, proc/commands.py says. Whether it is a daemon at all that has the
name is asked first: any user may take it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from typing import Any

from tproxyd import peer
from tproxyd.addr import Endpoint
from tproxyd.config import Config
from tproxyd.errors import ConfigError, KernelError, Problem, TproxydError, Unreachable

Request = dict[str, Any]
Answer = dict[str, Any]

# A thousand connections to end, by their ids, in one request.
MAX_REQUEST = 64 * 1024
TIMEOUT_S = 10.0


PREFIX = "\0tproxyd/command/"


def name_of(config: Config) -> str:
    """The abstract address; without an admin endpoint its last part is empty."""
    return f"{PREFIX}{config.admin or ''}"


def the_one(config: Config | None) -> str:
    """The name of the daemon that serves this configuration, or served it before it was edited:

    the one of its admin endpoint, else that of the only daemon there is. (None: it is wrong by now,
    and that daemon will say so.) Unreachable where that leaves a choice, or nothing.
    """
    running = daemons()
    if config is not None and name_of(config) in running:
        return name_of(config)
    if len(running) == 1:
        return running[0]
    if not running:
        why = "none runs in this network namespace"
        raise _unreachable(why, "start it with tproxyd run")
    asked = "the configuration is wrong" if config is None else f"none has {config.admin or 'none'}"
    have = ", ".join(name.removeprefix(PREFIX) or "none" for name in running)
    why = f"{len(running)} run here, with admin = {have}, and {asked}"
    raise _unreachable(why, "name the configuration of one with -c")


def daemons() -> list[str]:
    """The names of those in this network namespace (proc(5), /proc/net/unix: @ is the NUL)."""
    with open("/proc/self/net/unix", encoding="utf-8", errors="replace") as file:
        paths = {line.split()[-1] for line in file}
    return sorted("\0" + path[1:] for path in paths if path.startswith(f"@{PREFIX[1:]}"))


def ask(name: str, request: Request, timeout: float = TIMEOUT_S) -> Answer:
    """The daemon's answer; Unreachable, or what it refused with."""
    with socket.socket(socket.AF_UNIX) as sock:
        # Not settimeout(): a socket that does not block is told EAGAIN where the queue of those who
        # want to connect is full, however soon it would have room (unix_stream_connect).
        limit = struct.pack("@ll", int(timeout), int(timeout % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        try:
            sock.connect(name)
            if not (there := peer.of(sock)).believed:
                why = f"{there} has taken the place of its command socket"
                raise _unreachable(why, "end that process, or, if it is yours, ask as that user")
            line = json.dumps(request).encode() + b"\n"
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(line)  # or it has answered already: it does not let us ask
            text = _all_of(sock)
        except BlockingIOError:
            why = f"no answer within {timeout:g} s"
            raise _unreachable(why, "it may hang: see its log, and tproxyd status") from None
        except ConnectionRefusedError:
            why = "none runs with this configuration in this network namespace"
            hint = "start it with tproxyd run, or name its configuration with -c"
            raise _unreachable(why, hint) from None
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise _unreachable(why, "see its log") from None
    if not text.endswith(b"\n"):
        raise _unreachable("it hung up", "it is stopping, or busy with others: try again")
    answer: Answer = json.loads(text)
    if "error" in answer:
        raise _decoded(answer["error"])
    return answer


# What there is to be seen ------------------------------------------------------------------------


# What nobody else's answer there has.
_OURS = {"status": "workers", "connections": "silent", "history": "last"}


def look(config: Config, path: str, timeout: float = TIMEOUT_S) -> Any:  # noqa: ANN401 - JSON
    """What the daemon has at `path` (proc/pages.py), which is JSON: from its admin endpoint, which
    everybody may ask; where it has none, over the command socket. Raises Unreachable.
    """
    if config.admin is not None:
        return _get(config.admin, path, timeout)
    answer = ask(name_of(config), {"verb": "get", "path": path}, timeout)
    if answer["code"] != 200:
        raise _unreachable(answer["body"].strip(), "is it of this version?")
    return json.loads(answer["body"])


def _get(where: Endpoint, path: str, timeout: float) -> object:
    """By HTTP, which is here too plain for http.client and its 17 ms."""
    request = f"GET {path} HTTP/1.1\r\nHost: {where}\r\nConnection: close\r\n\r\n"
    try:
        with socket.create_connection(where, timeout=timeout) as sock:
            sock.sendall(request.encode())
            answer = b"".join(iter(lambda: sock.recv(1 << 18), b""))
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror
        raise Unreachable(
            f"can't ask the daemon at {where}: {why}; start it with tproxyd run,"
            " or name its configuration with -c"
        ) from None
    head, _, body = answer.decode(errors="replace").partition("\r\n\r\n")
    if not head.startswith("HTTP/1.1 200 "):
        raise _stranger(where, head.partition("\r\n")[0] or "nothing")
    with contextlib.suppress(ValueError):
        found = json.loads(body)
        if isinstance(found, dict) and _OURS[path.strip("/").partition("?")[0]] in found:
            return found
    raise _stranger(where, f"something else at {path}")


def _stranger(where: Endpoint, said: str) -> Unreachable:
    line = "".join(each if each.isprintable() else "?" for each in said[:76])
    return Unreachable(
        f"can't ask the daemon at {where}: it answered {line}; is that tproxyd? ss -ltnp"
    )


def _all_of(sock: socket.socket) -> bytes:
    text = b""
    with contextlib.suppress(ConnectionResetError):  # it did not read all that we had to say
        while data := sock.recv(1 << 18):
            text += data
    return text


def _unreachable(why: str, hint: str) -> Unreachable:
    return Unreachable(f"can't ask the daemon: {why}; {hint}")


# An error on its way ----------------------------------------------------------------------------


def encoded(error: TproxydError) -> dict[str, Any]:
    """As the value of "error" in an answer."""
    if isinstance(error, KernelError):
        return {"kernel": [error.action, error.why, error.hint]}
    if isinstance(error, ConfigError):
        return {"config": [error.origin, [list(problem) for problem in error.problems]]}
    return {"other": str(error)}


def _decoded(error: dict[str, Any]) -> TproxydError:
    match error:
        case {"kernel": [action, why, hint]}:
            return KernelError(action, why, hint)
        case {"config": [origin, problems]}:
            return ConfigError(origin, tuple(Problem(*each) for each in problems))
    return Unreachable(str(error.get("other", error)))
