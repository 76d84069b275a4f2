"""TPROXYD_… variables: the common settings for containers, over what the file says.

A variable becomes the TOML value that it stands for, at that value's place, and is then read and
judged like any other: the same messages, only that they name the variable instead of the path. An
empty one is an empty value ("" or []), not an absent one. Pure: the caller reads the environment.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from tproxyd.errors import Problem

PREFIX = "TPROXYD_"
FILE = "TPROXYD_CONFIG"  # the path of the configuration; -c has precedence
LISTENER = "listener"  # the first word of the paths of the one listener's settings

Toml = dict[str, Any]


def _text(text: str) -> object:
    return text


def _number(text: str) -> object:
    """As TOML writes whole numbers; what is none stays text, and is refused as such."""
    try:
        return int(text, 0)
    except ValueError:
        return text


def _seconds(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _ports(text: str) -> object:
    return text if text == "*" else [_number(word) for word in _words(text)]


def _trusted(text: str) -> object:
    """10.0.0.5/32=require,10.0.0.0/8=optional: the first match wins, as in the file."""
    entries = []
    for word in _words(text):
        prefix, equals, policy = word.partition("=")
        if not equals:
            raise ValueError(f'"{word}" has no policy: write {word}=require')
        entries.append({"from": [prefix], "policy": policy})
    return entries


VARIABLES: dict[str, tuple[tuple[str, ...], Callable[[str], object]]] = {
    "TPROXYD_MARK": (("mark",), _number),
    "TPROXYD_TABLE": (("table",), _number),
    "TPROXYD_WORKERS": (("workers",), _number),
    "TPROXYD_ADMIN": (("admin",), _text),
    "TPROXYD_DRAIN_TIMEOUT_S": (("drain_timeout_s",), _seconds),
    "TPROXYD_RULES_BACKEND": (("rules", "backend"), _text),
    "TPROXYD_RULES_SCHEME": (("rules", "scheme"), _text),
    "TPROXYD_RULES_RETURN_PATH": (("rules", "return_path"), _text),
    "TPROXYD_RULES_GUARD": (("rules", "guard"), _text),
    "TPROXYD_RULES_ON_CRASH": (("rules", "on_crash"), _text),
    "TPROXYD_LOG_ACCESS": (("log", "access"), _text),
    "TPROXYD_LOG_FORMAT": (("log", "format"), _text),
    "TPROXYD_LOG_DAEMON_FORMAT": (("log", "daemon_format"), _text),
    "TPROXYD_PORT": ((LISTENER, "port"), _number),
    "TPROXYD_PORTS": ((LISTENER, "intercept", "ports"), _ports),
    "TPROXYD_EXCLUDE_PORTS": ((LISTENER, "intercept", "exclude_ports"), _ports),
    "TPROXYD_INTERFACES": ((LISTENER, "intercept", "interfaces"), _words),
    "TPROXYD_TRUSTED": ((LISTENER, "proxy_protocol"), _trusted),
    "TPROXYD_SEND_PROXY": ((LISTENER, "send_proxy"), _text),
    "TPROXYD_MAX_CONNECTIONS": ((LISTENER, "max_connections"), _number),
}
# What Kubernetes puts into every pod beside a Service that is named tproxyd.
_SERVICE_LINK = re.compile(r"TPROXYD_(SERVICE_(HOST|PORT.*)|PORT_[0-9]+_.*)")


def ours(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that are meant for us, but for the name of the file."""
    return {k: v for k, v in sorted(environ.items()) if k.startswith(PREFIX) and k != FILE}


class Overrides:
    """Variables laid over parsed TOML, and their names for the problems that they make."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        self._names: dict[str, str] = {}  # the path of a value -> the variable that it is from

    def lay_over(self, data: Toml, problems: list[Problem]) -> None:
        """Set in `data` what the variables say; what is wrong with themselves is noted."""
        for name, text in self._variables.items():
            if name not in VARIABLES:
                problems.append(Problem(name, _unknown(name)))
                continue
            path, read = VARIABLES[name]
            try:
                value = read(text)
                self._set(data, name, path, value)
            except ValueError as error:
                problems.append(Problem(name, str(error)))

    def _set(self, data: Toml, name: str, path: tuple[str, ...], value: object) -> None:
        table, place = data, ""
        if path[0] == LISTENER:
            index, table = _only_sidecar(data)
            path, place = path[1:], f"{LISTENER}[{index}]."
        for key in path[:-1]:
            inner = table.setdefault(key, {})
            if not isinstance(inner, dict):
                return  # the file has no table there, which is a problem of its own
            table = inner
        table[path[-1]] = value
        self._names[place + ".".join(path)] = name

    def rename(self, problem: Problem) -> Problem:
        """The same, with the variable's name where its value is what is wrong."""
        for path, name in self._names.items():
            rest = problem.path.removeprefix(path)
            if rest != problem.path and rest[:1] in ("", ".", "["):
                return Problem(name + rest, problem.text)
        return problem


def _only_sidecar(data: Toml) -> tuple[int, Toml]:
    """The one listener that intercepts what comes to this host; ValueError when it is not one."""
    listeners = data.setdefault(LISTENER, [{}])
    if not isinstance(listeners, list) or not all(isinstance(each, dict) for each in listeners):
        return 0, {}  # the file's own problem
    found = [i for i, each in enumerate(listeners) if _is_sidecar(each)]
    if len(found) != 1:
        raise ValueError(
            f"is for the one listener that takes connections to this host, and the file has"
            f" {len(found) or 'none'}: set it there"
        )
    return found[0], listeners[found[0]]


def _is_sidecar(listener: Toml) -> bool:
    intercept = listener.get("intercept")
    scope = intercept.get("scope", "local") if isinstance(intercept, dict) else "local"
    return not listener.get("bind") and scope == "local"


def _unknown(name: str) -> str:
    if _SERVICE_LINK.fullmatch(name):
        return (
            "unknown variable: Kubernetes makes it of a Service named tproxyd; rename that, or set"
            " enableServiceLinks: false"
        )
    known = [each.removeprefix(PREFIX) for each in (FILE, *VARIABLES)]
    near = difflib.get_close_matches(name.removeprefix(PREFIX), known, n=1)
    if near:
        return f"unknown variable; did you mean {PREFIX}{near[0]}?"
    return f"unknown variable; known are {PREFIX} and one of: {', '.join(known)}"
