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
import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence

from tproxyd import arguments, stdio
from tproxyd.arguments import ISTIO_IPTABLES
from tproxyd.config import Backend, Config
from tproxyd.configfile import only_admin
from tproxyd.configsource import command_line, named, origin, read_config
from tproxyd.errors import ConfigError, KernelError, TproxydError, Unreachable
from tproxyd.proc.rows import Sort

FINE, FOUND, USAGE, REFUSED = 0, 1, 2, 3
_INTERRUPTED, _PIPE_CLOSED = 128 + 2, 128 + 13  # as a shell reports SIGINT and SIGPIPE

# A reload waits for names, workers and the kernel, an upgrade at most 30 s; for one before it, too.
_CHANGE_TIMEOUT_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    if argv is None:
        stdio.prepare()
        argv = _words()
    try:
        try:
            return _command(argv)
        finally:  # argparse ends by SystemExit
            sys.stdout.flush()
    except ConfigError as error:
        return _failed(error, USAGE)
    except KernelError as error:
        return _failed(error, REFUSED)
    except Unreachable as error:
        return _failed(error, FOUND)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except stdio.StdoutError as error:
        stdio.forget()
        if error.errno == errno.EPIPE:
            return _PIPE_CLOSED  # who read our output has seen enough (| head)
        why = (error.strerror or str(error)).lower()
        return _failed(f"can't write to stdout: {why}; see where it goes", FOUND)


def _command(words: Sequence[str]) -> int:
    if words[:1] == [ISTIO_IPTABLES]:
        return istio_iptables(list(words[1:]))
    args = _arguments().parse_args(words)
    command: Callable[[argparse.Namespace], int] = args.command
    return command(args)


def _words() -> list[str]:
    called, *words = sys.argv
    return [ISTIO_IPTABLES, *words] if os.path.basename(called) == ISTIO_IPTABLES else words


def _failed(error: TproxydError | str, code: int) -> int:
    print(f"tproxyd: {error}", file=sys.stderr)
    return code


def _stopped(error: KernelError, code: int) -> int:
    """The daemon could not start, or not end in order: its own log says so, once there is one."""
    from tproxyd.proc import startup

    return code if startup.say(error) else _failed(error, code)


def _arguments() -> argparse.ArgumentParser:
    verbs = (run, exec, install, clean, reload, upgrade, kill)
    nouns = (rules, check, doctor, status, top)
    return arguments.parser({each.__name__: each for each in (*verbs, *nouns)})


# Verbs -------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    from tproxyd.proc import startup

    startup.hold_signals()
    config = read_config(args.config)
    startup.do_without_openssl()  # which importing the supervisor would load
    from tproxyd.proc import supervisor

    try:
        supervisor.serve(
            config,
            install=args.install,
            guard=args.guard,
            reread=functools.partial(read_config, args.config),
            origin=functools.partial(origin, args.config),
            keep_sockets=args.keep_sockets,
        )
    except KernelError as error:
        return _stopped(error, REFUSED)
    return FINE


def exec(args: argparse.Namespace) -> int:
    from tproxyd.proc import startup

    startup.hold_signals()
    config = read_config(args.config)
    startup.do_without_openssl()
    from tproxyd.proc import supervisor
    from tproxyd.proc.run_command import Command

    command = Command(args.argv, args.user)
    try:
        command.check()
        supervisor.serve(
            config,
            install=True,
            reread=functools.partial(read_config, args.config),
            origin=functools.partial(origin, args.config),
            command=command,
        )
    except KernelError as error:
        return _stopped(error, command.code if command.started else REFUSED)
    return command.code


def reload(args: argparse.Namespace) -> int:
    """The daemon reads its own file: ours only says which daemon, and may be what is wrong.

    One that was named has to be there, and to be the daemon's.
    """
    from tproxyd.proc.ask import ask, the_one

    file = named(args.config)
    try:
        config = read_config(args.config, only_admin)
    except ConfigError:
        if file and not os.path.exists(file):
            raise
        config = None
    request = {"verb": "reload"} | ({"file": os.path.realpath(file)} if file else {})
    print(ask(the_one(config), request, _CHANGE_TIMEOUT_S)["said"])
    return FINE


def upgrade(args: argparse.Namespace) -> int:
    from tproxyd.proc.ask import ask, the_one

    config = read_config(args.config, only_admin)
    print(ask(the_one(config), {"verb": "upgrade"}, _CHANGE_TIMEOUT_S)["said"])
    return FINE


def install(args: argparse.Namespace) -> int:
    config = _with_backend(args)
    from tproxyd.kernel import claim, reconcile

    claim.refuse_beside("install the kernel state")
    report = reconcile.install(config)
    for line in (*report.changed, *report.notes) if report.changed else ("nothing to change",):
        print(line)
    for port in _unserved(config):
        print(
            f"tproxyd: nobody listens on {port}, where these rules send connections; has the daemon"
            " that runs here another configuration? Name it with -c",
            file=sys.stderr,
        )
    return FINE


def _unserved(config: Config) -> list[int]:
    """The ports that a daemon here does not serve; none where none runs yet, which is usual."""
    from tproxyd.kernel.listening import listening
    from tproxyd.proc.ask import daemons

    ports = [each.port for each in config.listeners if each.intercepts] if daemons() else []
    try:
        return [port for port in ports if port not in listening()]
    except OSError:  # the kernel does not tell
        return []


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
    config = read_config(args.config, only_admin)
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

    checks = doctor.run(config, functools.partial(command_line, path=args.config))
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

    snapshot, listing = look(config, "/status"), None
    if args.connections is not None:
        path = f"/connections?sort={args.sort}&limit={args.connections}"
        listing = look(config, path)
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
            "can't draw top: the package rich is not installed; try scripts/install --with top,"
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
