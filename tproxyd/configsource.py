"""Where the configuration comes from: a file, the default one or none, and the environment."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping

from tproxyd import environment
from tproxyd.config import Config
from tproxyd.configfile import parse
from tproxyd.errors import ConfigError, Problem

DEFAULT_FILE = "/etc/tproxyd/tproxyd.toml"

Parse = Callable[[str, str, Mapping[str, str]], Config]  # configfile.parse, only_admin


def read_config(path: str | None, parse: Parse = parse) -> Config:
    """The Config in the file that was asked for, or in the default one, or the defaults.

    A file that was named must be there; the default one may be absent, which is said. One that is
    there and can't be read is an error in both cases: it could hold a trust list. TPROXYD_…
    variables are laid over each of them.
    """
    variables = environment.ours(os.environ)
    path = named(path)
    try:
        with open(path or DEFAULT_FILE, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        if path is None:
            sys.stderr.write(f"tproxyd: no {DEFAULT_FILE}: using the built-in defaults\n")
            return parse("", "of the environment", variables)
        raise ConfigError(path, (Problem("", "there is no such file"),)) from None
    except OSError as error:
        why = f"can't be read: {error.strerror}"
        raise ConfigError(path or DEFAULT_FILE, (Problem("", why),)) from None
    except UnicodeDecodeError as error:
        why = f"not UTF-8, which TOML is: byte {error.start}"
        raise ConfigError(path or DEFAULT_FILE, (Problem("", why),)) from None
    return parse(text, path or DEFAULT_FILE, variables)


def command_line(verb: str, path: str | None) -> str:
    """The shell command of `verb` with the configuration that read_config(path) has read."""
    path = named(path)
    variables = environment.ours(os.environ).items()
    words = [f"{name}={shlex.quote(text)}" for name, text in variables]
    return " ".join([*words, "tproxyd", verb, *(["-c", shlex.quote(path)] if path else [])])


def named(path: str | None) -> str | None:
    """The file that was asked for, by -c or by the variable; None for the default one."""
    return path or os.environ.get(environment.FILE) or None


def origin(path: str | None) -> str:
    """What read_config(path) reads, for people."""
    return named(path) or (DEFAULT_FILE if os.path.exists(DEFAULT_FILE) else "built-in defaults")
