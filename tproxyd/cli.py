"""The command line: verbs change state, nouns only read.

    run exec install clean reload upgrade kill
    rules check doctor status top
    istio-iptables

The last one is Istio's tool of that name, with its flags, its messages and its exit codes
(istio/run.py); who calls this program by that name gets it without saying so again.

Exit codes, given in one place (`main`): 0 fine; 1 a problem found; 2 usage or configuration; 3 the
kernel refused. An expected failure is one sentence on stderr, "can't <do>: <why>; <what to try>",
and never a traceback. What a command needs it imports itself: `tproxyd check` answers in tens of
milliseconds because neither uvloop nor ctypes is ever loaded for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tproxyd import __version__, environment
from tproxyd.addr import parse_prefix
from tproxyd.config import Backend, Config
from tproxyd.configfile import only_admin
from tproxyd.configsource import DEFAULT_FILE, origin, read_config
from tproxyd.errors import ConfigError, KernelError, TproxydError, Unreachable
from tproxyd.proc.rows import LIMIT, MAX_LIMIT, Sort

if TYPE_CHECKING:
    from tproxyd.proc.run_command import User

ISTIO_IPTABLES = "istio-iptables"

FINE, FOUND, USAGE, REFUSED = 0, 1, 2, 3
_INTERRUPTED, _PIPE_CLOSED = 128 + 2, 128 + 13  # as a shell reports SIGINT and SIGPIPE

# A reload waits for names, workers and the kernel, an upgrade at most 30 s; for one before it, too.
_CHANGE_TIMEOUT_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    words = _words() if argv is None else list(argv)
    try:
        if words[:1] == [ISTIO_IPTABLES]:
            code = istio_iptables(words[1:])
        else:
            args = _arguments().parse_args(words)
            command: Callable[[argparse.Namespace], int] = args.command
            code = command(args)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        return _failed(error, USAGE)
    except KernelError as error:
        return _failed(error, REFUSED)
    except Unreachable as error:
        return _failed(error, FOUND)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Who read our output has seen enough (| head). The interpreter would flush once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED


def _words() -> list[str]:
    called, *words = sys.argv
    return [ISTIO_IPTABLES, *words] if os.path.basename(called) == ISTIO_IPTABLES else words


def _failed(error: TproxydError, code: int) -> int:
    print(f"tproxyd: {error}", file=sys.stderr)
    return code


def _stopped(error: KernelError, code: int) -> int:
    """The daemon could not start, or not end in order: its own log says so, once there is one."""
    from tproxyd.proc import startup

    return code if startup.say(error) else _failed(error, code)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tproxyd",
        description="A transparent proxy that keeps the client's source address.",
        epilog="Exit codes: 0 fine; 1 a problem found; 2 usage or configuration; "
        "3 the kernel refused.",
    )
    parser.add_argument("--version", action="version", version=f"tproxyd {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int], what: str) -> argparse.ArgumentParser:
        name = run.__name__
        each = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
        each.set_defaults(command=run)
        each.add_argument(
            "-c",
            "--config",
            metavar="FILE",
            help=f"the configuration; by default ${environment.FILE}, {DEFAULT_FILE}, or the"
            " built-in defaults",
        )
        return each

    serving = command(run, "serve in the foreground")
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
    beside = command(exec, "serve, and run a program beside it, with whose exit code it ends")
    beside.add_argument(
        "--user",
        metavar="USER[:GROUP]",
        type=_user,
        help="names or numbers: whom CMD runs as; by default as tproxyd, without a capability",
    )
    beside.add_argument("argv", nargs="+", metavar="-- CMD", help="it starts when the rules stand")
    for each in (
        command(install, "make the kernel state: rules, routes, firewall"),
        command(rules, "print what install would make"),
    ):
        each.add_argument(
            "--backend",
            choices=[str(one) for one in Backend],
            help="instead of the one in the configuration",
        )
    command(reload, "serve by the configuration as it is now; open connections live on")
    command(upgrade, "hand over to a new process of the program, as it is installed now")
    command(clean, "remove all kernel state of tproxyd, whatever configuration made it")
    command(check, "check the configuration only")
    command(doctor, "find out why it does not work").add_argument("--json", action="store_true")
    shown = command(status, "show the running daemon")
    shown.add_argument("--json", action="store_true")
    shown.add_argument(
        "--connections",
        nargs="?",
        type=_limit,
        const=LIMIT,
        metavar="N",
        help=f"and what is open: the first N, by default {LIMIT}",
    )
    live = command(top, "show the running daemon, live; its last line names the keys")
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
    ended = command(kill, "end connections of the running daemon, by RST to both sides")
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
    commands.add_parser(ISTIO_IPTABLES, help="what Istio's tool of that name does; see its --help")
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


# Verbs -------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    config = read_config(args.config)
    from tproxyd.proc import startup

    startup.do_without_openssl()  # which importing the supervisor would load
    from tproxyd.proc import supervisor

    try:
        supervisor.serve(
            config,
            install=args.install,
            guard=args.guard,
            reread=functools.partial(read_config, args.config),
            keep_sockets=args.keep_sockets,
        )
    except KernelError as error:
        return _stopped(error, REFUSED)
    return FINE


def exec(args: argparse.Namespace) -> int:
    config = read_config(args.config)
    from tproxyd.proc import startup

    startup.do_without_openssl()
    from tproxyd.proc import supervisor
    from tproxyd.proc.run_command import Command

    command = Command(args.argv, args.user)
    try:
        command.check()
        reread = functools.partial(read_config, args.config)
        supervisor.serve(config, install=True, reread=reread, command=command)
    except KernelError as error:
        return _stopped(error, command.code if command.started else REFUSED)
    return command.code


def reload(args: argparse.Namespace) -> int:
    """The daemon reads its own file: ours only says which daemon, and may be what is wrong."""
    from tproxyd.proc.ask import ask, the_one

    try:
        config = read_config(args.config, only_admin)
    except ConfigError:
        config = None
    print(ask(the_one(config), {"verb": "reload"}, _CHANGE_TIMEOUT_S)["said"])
    return FINE


def upgrade(args: argparse.Namespace) -> int:
    from tproxyd.proc.ask import ask, name_of

    config = read_config(args.config)
    print(ask(name_of(config), {"verb": "upgrade"}, _CHANGE_TIMEOUT_S)["said"])
    return FINE


def install(args: argparse.Namespace) -> int:
    config = _with_backend(args)
    from tproxyd.kernel import claim, reconcile

    claim.refuse_beside("install the kernel state")
    report = reconcile.install(config)
    for line in (*report.changed, *report.notes) if report.changed else ("nothing to change",):
        print(line)
    return FINE


def clean(_: argparse.Namespace) -> int:
    """The configuration is not read: what is ours says so itself, and a broken file must not
    keep anybody from removing it.
    """
    from tproxyd.kernel import claim, reconcile

    claim.refuse_beside("remove the kernel state")
    for line in reconcile.clean().changed or ("nothing to remove",):
        print(line)
    return FINE


def istio_iptables(words: list[str]) -> int:
    from tproxyd.istio import run

    return run.main(words, os.environ)


def kill(args: argparse.Namespace) -> int:
    """An answer that names what was not ended is a problem found, and goes to stderr."""
    config = read_config(args.config)
    from tproxyd.proc.ask import ask, name_of

    told = ask(name_of(config), {"verb": "kill", "ids": args.ids, "clients": args.client})
    plural = "s"[: told["killed"] != 1]
    if told["killed"]:
        print(f"ended {told['killed']} connection{plural}")
    problems = [f"{each} is no open connection (any more)" for each in told["missing"]]
    problems += [
        f"worker {pid} does not answer: it may end its own later" for pid in told["silent"]
    ]
    if not (told["killed"] or problems):
        problems = [f"no open connection is of {' or '.join(args.client)}"]
    for each in problems:
        print(f"tproxyd: {each}; see tproxyd status --connections", file=sys.stderr)
    return FOUND if problems else FINE


# Nouns -------------------------------------------------------------------------------------------


def rules(args: argparse.Namespace) -> int:
    config = _with_backend(args)
    from tproxyd.kernel import reconcile

    print(reconcile.rules(config, facts=reconcile.facts()), end="")
    return FINE


def check(args: argparse.Namespace) -> int:
    config = read_config(args.config)
    listeners = [f"{each.name} on port {each.port}" for each in config.listeners]
    plural = "s" if len(listeners) > 1 else ""
    print(f"{origin(args.config)}: fine: {len(listeners)} listener{plural}: {', '.join(listeners)}")
    return FINE


def doctor(args: argparse.Namespace) -> int:
    config = read_config(args.config)
    from tproxyd import doctor

    checks = doctor.run(config)
    if args.json:
        print(json.dumps([dataclasses.asdict(each) for each in checks], indent=2))
    else:
        width = max(len(each.name) for each in checks)
        for each in checks:
            print(f"{each.verdict:<4}  {each.name:<{width}}  {each.detail}")
            if each.remedy:
                print(f"{'':6}{'':{width}}  → {each.remedy}")
    return FOUND if any(each.verdict == "fail" for each in checks) else FINE


def status(args: argparse.Namespace) -> int:
    config = read_config(args.config)
    from tproxyd.proc.ask import look

    snapshot, listing = json.loads(look(config, "/status")), None
    if args.connections is not None:
        path = f"/connections?sort={args.sort}&limit={args.connections}"
        listing = json.loads(look(config, path))
    if args.json:
        print(json.dumps(snapshot | ({"open": listing} if listing else {}), indent=2))
        return FINE
    from tproxyd.proc.status import draw

    print(draw(snapshot, listing), end="")
    return FINE


def top(args: argparse.Namespace) -> int:
    config = read_config(args.config)
    try:
        from tproxyd.proc import top
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        raise Unreachable(
            "can't draw top: the package rich is not installed; try pip install 'tproxyd[top]',"
            " or tproxyd status --connections"
        ) from None
    top.run(config, Sort(args.sort), once=args.once, as_json=args.json)
    return FINE


# What they share ---------------------------------------------------------------------------------


def _with_backend(args: argparse.Namespace) -> Config:
    config = read_config(args.config)
    if args.backend is None:
        return config
    chosen = dataclasses.replace(config.rules, backend=Backend(args.backend))
    return dataclasses.replace(config, rules=chosen)
