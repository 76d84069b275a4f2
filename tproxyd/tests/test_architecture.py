"""Who may import whom, which modules are pure, and how long a file may be.

    cli -> doctor -> proc -> (flow | kernel, never each other) -> config -> addr, errors, …

Read from the sources with `ast`, so an import that only one path of the code reaches counts too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What a room may import, besides itself. A room is a package, or a module that is none.
ALLOWED = {
    "__init__": set[str](),
    "addr": set[str](),
    "errors": set[str](),
    "reader": {"addr", "errors"},
    "linux": {"addr"},
    "peer": set(),
    "child": set[str](),
    "stdio": set[str](),
    "config": {"addr", "reader"},
    "environment": {"errors"},
    "configchecks": {"config", "addr", "errors", "reader"},
    "configfile": {"config", "configchecks", "environment", "addr", "errors", "reader"},
    "configsource": {"config", "configfile", "environment", "errors"},
    "flow": {"config", "addr", "errors", "linux"},
    "istio": {"flow", "kernel", "config", "addr", "errors", "linux"},
    "kernel": {"config", "reader", "addr", "errors", "linux", "child", "peer"},
    "proc": {"flow", "config", "reader", "addr", "errors", "linux", "child", "peer"},
    "doctor": {"proc", "flow", "kernel", "config", "addr", "errors", "linux"},
    "arguments": {"configsource", "config", "environment", "addr", "proc"},
    "cli": {
        *("arguments", "stdio", "doctor", "istio", "proc", "flow", "kernel"),
        *("config", "configfile", "configsource", "environment", "addr", "errors", "linux"),
    },
    "__main__": {"cli"},
}
# Only inside a function: the reconciler runs in a child process of its own, and no worker carries
# netlink state.
ALLOWED_IN_FUNCTIONS = {"proc": {"kernel"}}
# Single modules of another room: the kernel has a scheme for what istio-iptables can be told.
ALLOWED_MODULES = {"kernel": {"istio.options"}}

PURE = {
    "addr",
    "config",
    "configchecks",
    "configfile",
    "environment",
    "errors",
    "reader",
    "istio.flags",
    "istio.invocation",
    "istio.options",
    "kernel.state",
    "kernel.firewall",
    "kernel.chains",
    "kernel.desired",
    "kernel.iptchains",
    "kernel.istio",
    "kernel.istioconfig",
    "kernel.iptlang",
    "kernel.iptread",
    "kernel.iptsave",
    "kernel.natchains",
    "kernel.nftjson",
    "kernel.nftlang",
    "kernel.ownership",
    "kernel.selectors",
    "kernel.words",
    "proc.pace",
    "proc.figures",
    "proc.picture",
    "proc.rows",
    "flow.proxyproto",
    "flow.tlv",
    "flow.policy",
    "flow.announce",
    "flow.balance",
    "flow.tally",
    "flow.stream",
    "flow.clients",
}
IMPURE = {"socket", "os", "asyncio", "subprocess", "ctypes"}

ONLY = {  # a third-party or dangerous module, and who alone may import it
    "pyroute2": {"kernel.routewriter"},
    "iptc": {"kernel.legacy"},
    "ctypes": {"linux", "kernel.nft"},
}

SOFT_LIMIT, HARD_LIMIT = 400, 600
LONG = {  # a file over the soft limit has to answer why
    "flow.relay": "the hot loop and the ends of a stream are one state machine",
    "proc.supervisor": "one life: start, changes, stop and their order; its parts are files",
}


class Import(NamedTuple):
    target: str  # "tproxyd.flow.relay", "os"
    line: int
    in_function: bool


def imports(source: str) -> Iterator[Import]:
    """Every import of a module; `from a import b` counts as a.b, which may be a module."""
    yield from _imports(ast.parse(source), in_function=False)


def _imports(node: ast.AST, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, in_function)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import"
            for alias in child.names:
                yield Import(f"{child.module}.{alias.name}", child.lineno, in_function)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, in_function or function)


def violations(module: str, source: str) -> list[str]:
    """What `module` ("flow.relay") imports though it must not."""
    room = module.partition(".")[0]
    allowed = ALLOWED[room] | {room}
    found = []
    for target, line, in_function in imports(source):
        top, *rest = target.split(".")
        where = f"{module}:{line} imports {target}"
        if top == "tproxyd":
            other = rest[0]
            if other == "tests":
                found.append(f"{where}: a test")
            elif other in ALLOWED and other not in allowed:
                lazy = in_function and other in ALLOWED_IN_FUNCTIONS.get(room, ())
                if not lazy and ".".join(rest[:2]) not in ALLOWED_MODULES.get(room, ()):
                    found.append(f"{where}: {room} may not import {other}")
            elif other not in ALLOWED and not other.startswith("__"):
                found.append(f"{where}: which room is that?")
        if module in PURE and top in IMPURE:
            found.append(f"{where}: {module} is pure")
        if top in ONLY and module not in ONLY[top]:
            found.append(f"{where}: only {', '.join(sorted(ONLY[top]))} may")
    return found


def modules() -> dict[str, Path]:
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    return {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): ROOT / path
        for path in paths
        if path.parts[0] != "tests"
    }


MODULES = modules()


def module_of(target: str) -> str | None:
    """The module of ours that an import reaches: tproxyd.flow.relay.Relay -> flow.relay."""
    name = target.removeprefix("tproxyd.")
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


# The sources --------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports(module: str) -> None:
    assert violations(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize("module", sorted(PURE & MODULES.keys()))
def test_a_pure_module_reaches_only_pure_ones(module: str) -> None:
    for target, line, _ in imports(MODULES[module].read_text()):
        if target.startswith("tproxyd."):
            assert module_of(target) in PURE, f"{module}:{line} imports {target}"


def test_every_pure_module_exists() -> None:
    assert MODULES.keys() >= PURE


def test_the_import_graph_has_no_circle() -> None:
    graph = {
        module: {
            reached
            for target, _, in_function in imports(path.read_text())
            if target.startswith("tproxyd.") and not in_function
            if (reached := module_of(target)) and reached != module
        }
        for module, path in MODULES.items()
    }
    while leaves := {module for module, reached in graph.items() if not reached}:
        graph = {
            module: reached - leaves for module, reached in graph.items() if module not in leaves
        }
    assert not graph, f"these import each other: {sorted(graph)}"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.name)
def test_no_file_is_too_long(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= HARD_LIMIT, f"{path} has {lines} lines"
    if "tests" not in path.relative_to(ROOT).parts:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert lines <= SOFT_LIMIT or name in LONG, f"{path} has {lines} lines; say why in LONG"
        assert lines > SOFT_LIMIT or name not in LONG, f"{name} is not long any more"


# The checker itself -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("flow.relay", "from tproxyd.flow.stream import Stream\nimport socket", ""),
        ("flow.relay", "from tproxyd.proc import worker", "flow may not import proc"),
        ("flow.relay", "import tproxyd.kernel.state", "flow may not import kernel"),
        ("flow.relay", "from tproxyd import kernel", "flow may not import kernel"),
        ("flow.relay", "def f():\n    import tproxyd.kernel", "flow may not import kernel"),
        ("kernel.state", "from tproxyd.flow.stream import Step", "kernel may not import flow"),
        ("kernel.routing", "from tproxyd.proc.keeper import serve", "kernel may not import proc"),
        ("kernel.routewriter", "import pyroute2", ""),
        ("kernel.legacy", "import iptc", ""),
        ("kernel.desired", "from tproxyd.istio.options import Mode", ""),
        ("kernel.desired", "from tproxyd.istio import flags", "kernel may not import istio"),
        ("kernel.nft", "from pyroute2 import NDB", "only kernel.routewriter may"),
        ("kernel.nft", "from iptc import Chain", "only kernel.legacy may"),
        ("kernel.nft", "import ctypes", ""),
        ("flow.listen", "import ctypes.util", "only kernel.nft, linux may"),
        ("linux", "from ctypes import CDLL", ""),
        ("proc.reconciler", "from tproxyd.kernel import nft", "proc may not import kernel"),
        ("proc.reconciler", "def f():\n    from tproxyd.kernel import nft", ""),
        ("proc.reconciler", "async def f():\n    from tproxyd.kernel import nft", ""),
        (
            "proc.reconciler",
            "class C:\n    from tproxyd.kernel import nft",
            "proc may not import kernel",
        ),
        (
            "proc.reconciler",
            "if TYPE_CHECKING:\n    from tproxyd.kernel import nft",
            "proc may not import kernel",
        ),
        (
            "proc.reconciler",
            "try:\n    import tproxyd.kernel\nexcept ImportError:\n    pass",
            "proc may not import kernel",
        ),
        ("proc.worker", "def f():\n    import tproxyd.cli", "proc may not import cli"),
        ("doctor", "from tproxyd import cli", "doctor may not import cli"),
        ("config", "from tproxyd import linux", "config may not import linux"),
        ("addr", "import tproxyd.errors", "addr may not import errors"),
        ("addr", "import socket", "addr is pure"),
        ("flow.policy", "from os import path", "flow.policy is pure"),
        ("flow.tally", "def f():\n    import asyncio", "flow.tally is pure"),
        ("kernel.desired", "import subprocess", "kernel.desired is pure"),
        ("flow.relay", "import tproxyd.tests.playbook", "a test"),
        ("flow.relay", "import tproxyd.attic", "which room is that?"),
        ("cli", "from tproxyd import __version__, config", ""),
    ],
)
def test_the_checker_finds(module: str, source: str, found: str) -> None:
    told = violations(module, source)
    assert len(told) == bool(found)
    assert not found or told[0].endswith(found)


def test_relative_imports_are_not_read_past() -> None:
    with pytest.raises(AssertionError, match="relative import"):
        list(imports("from . import relay"))
