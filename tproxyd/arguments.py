"""The words of the command line: each command, its options, and what --help says of them.

The man page and the completions of shells are made from this (scripts/lib/manual.py).
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NoReturn

from tproxyd import __version__, environment
from tproxyd.addr import parse_prefix
from tproxyd.config import Backend
from tproxyd.configsource import DEFAULT_FILE
from tproxyd.proc.rows import LIMIT, MAX_LIMIT, Sort

if TYPE_CHECKING:
    from tproxyd.proc.run_command import User

ISTIO_IPTABLES = "istio-iptables"

Command = Callable[[argparse.Namespace], int]  # its exit code

_BY_DEFAULT = f"; by default ${environment.FILE}, {DEFAULT_FILE}, or the built-in defaults"
# What -c is to those that do not use the configuration itself.
_WHICH = "the configuration of the daemon that is meant, found by its admin endpoint"
_FILE = {
    "reload": f"{_WHICH}; another one than it reads is refused",
    "upgrade": _WHICH,
    "kill": _WHICH,
    "clean": "not read: what is tproxyd's says so itself",
}


class _Parser(argparse.ArgumentParser):
    """Its errors say what may have been meant, as those of the configuration do."""

    def error(self, message: str) -> NoReturn:
        if file := re.fullmatch(r"unrecognized arguments: ([^-]\S*[./]\S*)", message):
            message += f"; did you mean -c {file[1]}?"
        if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            words = re.findall(r"[\w-]+", choice[2])
            near = difflib.get_close_matches(choice[1], words, n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        super().error(message)


def parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """For `tproxyd COMMAND …`; `args.command` is the one of `commands` that was asked for."""
    parser = _Parser(
        prog="tproxyd",
        description="A transparent proxy that keeps the client's source address.",
        epilog="Exit codes: 0 fine; 1 a problem found; 2 usage or configuration; "
        "3 the kernel refused.",
    )
    parser.add_argument("--version", action="version", version=f"tproxyd {__version__}")
    listed = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, what: str) -> argparse.ArgumentParser:
        each = listed.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
        each.set_defaults(command=commands[name])
        each.add_argument(
            "-c",
            "--config",
            metavar="FILE",
            help=_FILE.get(name, "the configuration") + ("" if name == "clean" else _BY_DEFAULT),
        )
        return each

    serving = command("run", "serve in the foreground")
    kept = serving.add_mutually_exclusive_group()
    kept.add_argument(
        "--install",
        action="store_true",
        help="make the kernel state once the workers accept, heal it whenever another program"
        " changes it, and remove it at the end",
    )
    kept.add_argument(
        "--guard",
        action="store_true",
        help="heal the kernel state that `tproxyd install` has made, and leave it at the end;"
        " without either of these two, drift is only reported",
    )
    serving.add_argument(
        "--keep-sockets",
        action="store_true",
        help="under systemd with FileDescriptorStoreMax=: a stop may be a restart, so leave the"
        " listening sockets to systemd, and open connections to the workers",
    )
    beside = command("exec", "serve, and run a program beside it, with whose exit code it ends")
    beside.add_argument(
        "--user",
        metavar="USER[:GROUP]",
        type=_user,
        help="names or numbers: whom CMD runs as; by default as tproxyd, without a capability",
    )
    beside.usage = "%(prog)s [-h] [-c FILE] [--user USER[:GROUP]] -- CMD [ARG ...]"
    beside.add_argument("argv", nargs="+", metavar="-- CMD", help="it starts when the rules stand")
    for each in (
        command("install", "make the kernel state: rules, routes, firewall"),
        command("rules", "print what install would make"),
    ):
        each.add_argument(
            "--backend",
            choices=[str(one) for one in Backend],
            help="instead of the one in the configuration",
        )
    command("reload", "serve by the configuration as it is now; open connections live on")
    command("upgrade", "hand over to a new process of the program, as it is installed now")
    command("clean", "remove all kernel state of tproxyd, whatever configuration made it")
    command("check", "check the configuration only")
    examined = command("doctor", "find out why it does not work")
    examined.add_argument("--json", action="store_true", help="a list of objects, one a check")
    shown = command("status", "show the running daemon")
    shown.add_argument("--json", action="store_true", help="all that there is to show, and more")
    shown.add_argument(
        "--connections",
        nargs="?",
        type=_limit,
        const=LIMIT,
        metavar="N",
        help=f"and what is open: the first N, by default {LIMIT}",
    )
    live = command("top", "show the running daemon, live; its last line names the keys")
    live.add_argument("--json", action="store_true", help="an object a line, one a second")
    live.add_argument(
        "--once", action="store_true", help="one frame, as where the output is no terminal"
    )
    for each in (shown, live):
        each.add_argument(
            "--sort",
            choices=[*Sort],
            default=str(Sort.BYTES),
            help="what stands first: the most, the oldest, the longest; by default %(default)s",
        )
    ended = command("kill", "end connections of the running daemon, by RST to both sides")
    which = ended.add_mutually_exclusive_group(required=True)
    which.add_argument("ids", nargs="*", default=[], metavar="ID", help="as status shows them")
    which.add_argument(
        "--client",
        action="append",
        default=[],
        type=_prefix,
        metavar="CIDR",
        help="all of these clients; may be given again",
    )
    # Only so that it is listed: its command line is not argparse's to read.
    listed.add_parser(ISTIO_IPTABLES, help="what Istio's tool of that name does; see its --help")
    return parser


def _user(text: str) -> User:
    from tproxyd.proc.run_command import user

    try:
        return user(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _limit(text: str) -> int:
    if text.isdecimal() and int(text) <= MAX_LIMIT:
        return int(text)
    raise argparse.ArgumentTypeError(f'"{text}" is no number up to {MAX_LIMIT}')


def _prefix(text: str) -> str:
    try:
        parse_prefix(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
