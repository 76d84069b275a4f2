"""What istio-iptables does, in which order, and what it says; against a kernel that is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from tproxyd import cli, stdio
from tproxyd.errors import KernelError
from tproxyd.istio import run
from tproxyd.istio.invocation import Invocation
from tproxyd.istio.options import ALL, IstioOptions, Mode
from tproxyd.istio.run import Differs, Log, Outcome, carry_out

OPTIONS = IstioOptions(mode=Mode.TPROXY, inbound_ports=ALL)


@dataclass
class FakeKernel:
    """Holds the options that were installed last, and writes down what it was asked."""

    holds: tuple[IstioOptions, str] | None = None
    ipv6: bool = True
    asked: list[str] = field(default_factory=list)

    def has_ipv6(self) -> bool:
        return self.ipv6

    def install(self, options: IstioOptions, backend: str) -> Outcome:
        self.asked.append("install")
        changes = ("add everything",) if self.holds != (options, backend) else ()
        self.holds = options, backend
        return Outcome(changes, ("mind the gap",), installed=True)

    def differs(self, options: IstioOptions, backend: str) -> Outcome:
        self.asked.append("differs")
        changes = ("add everything",) if self.holds != (options, backend) else ()
        return Outcome(changes, installed=self.holds is not None)

    def rules(self, options: IstioOptions, backend: str) -> str:
        self.asked.append("rules")
        return f"# {options.mode} {backend}\n"

    def clean(self, options: IstioOptions) -> Outcome:
        self.asked.append("clean")
        changes = ("remove everything",) if self.holds else ()
        self.holds = None
        return Outcome(changes)

    def left(self, options: IstioOptions) -> Outcome:
        self.asked.append("left")
        return Outcome(("remove everything",) if self.holds else ())


def validated(options: IstioOptions, *, port: int, timeout_s: float) -> Iterator[str]:
    yield f"{options.mode} {port} {timeout_s:g}"


def carried_out(kernel: FakeKernel, level: str = "info", **asked: object) -> None:
    invocation = replace(Invocation(options=OPTIONS), **asked)  # type: ignore[arg-type]
    carry_out(invocation, kernel, Log(level), validated)


def test_installs_and_says_what_changed(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = FakeKernel()
    carried_out(kernel, backend="nft")
    assert kernel.holds == (OPTIONS, "nft")
    told = capsys.readouterr()
    assert told.out == "add everything\n"
    assert told.err == "mind the gap\n"


def test_twice_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = FakeKernel()
    carried_out(kernel)
    capsys.readouterr()
    carried_out(kernel)
    assert capsys.readouterr().out == "nothing to change\n"


@pytest.mark.parametrize("has", [True, False])
def test_ipv6_is_the_kernels_answer(has: bool) -> None:
    kernel = FakeKernel(ipv6=has)
    carried_out(kernel)
    assert kernel.holds == (replace(OPTIONS, ipv6=has), "auto")


def test_dry_run_prints_and_touches_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = FakeKernel()
    carried_out(kernel, dry_run=True, level="none")
    assert capsys.readouterr().out == "# TPROXY auto\n"
    assert kernel.asked == ["rules"]
    carried_out(kernel, dry_run=True, skip_rule_apply=True)
    assert capsys.readouterr().out == ""
    assert kernel.asked == ["rules"]


def test_cleanup_only(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = FakeKernel(holds=(OPTIONS, "nft"))
    carried_out(kernel, cleanup_only=True, dry_run=True)
    assert kernel.asked == ["left"]
    carried_out(kernel, cleanup_only=True)
    carried_out(kernel, cleanup_only=True)
    assert kernel.asked == ["left", "clean", "clean"]
    told = capsys.readouterr().out.splitlines()
    assert told == ["# remove everything", "remove everything", "nothing to remove"]


def test_validation_comes_last_and_alone_touches_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    kernel = FakeKernel()
    carried_out(kernel, run_validation=True, probe_port=7, probe_timeout_s=0.5)
    assert capsys.readouterr().out == "add everything\nvalidated: TPROXY 7 0.5\n"
    kernel = FakeKernel()
    carried_out(kernel, run_validation=True, skip_rule_apply=True)
    assert capsys.readouterr().out == "validated: TPROXY 15002 5\n"
    assert kernel.asked == []


def test_without_reconcile_other_rules_are_left_as_they_are() -> None:
    kernel = FakeKernel()
    carried_out(kernel, may_change=False)  # nothing stood there
    carried_out(kernel, may_change=False)  # the same stood there
    other = FakeKernel(holds=(IstioOptions(), "nft"))
    with pytest.raises(Differs, match="--reconcile=false forbids"):
        carried_out(other, may_change=False)
    assert other.asked == ["differs"]
    carried_out(other)  # the default is to heal
    assert other.holds == (OPTIONS, "auto")


def test_levels(capsys: pytest.CaptureFixture[str]) -> None:
    for level, told in {
        "none": "",
        "error": "",
        "warn": "mind the gap\n",
        "info": "add everything\nmind the gap\n",
        "debug": "# TPROXY auto\nadd everything\nmind the gap\n",
    }.items():
        carried_out(FakeKernel(), level=level)
        assert "".join(capsys.readouterr()) == told


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Log("info", as_json=True).write("info", "two\nlines")
    Log("info", as_json=True).failed(KernelError("do it", "no", "try"), 3)
    told = capsys.readouterr()
    line, error = json.loads(told.out), json.loads(told.err)
    assert (line["level"], line["msg"]) == ("info", "two\nlines")
    assert line["time"].endswith("Z")
    assert (error["level"], error["msg"]) == ("error", "can't do it: no; try")


# By its name, and what it ends with ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("called", "words"),
    [
        ("/usr/local/bin/istio-iptables", []),
        ("/usr/bin/tproxyd", ["istio-iptables"]),
        ("tproxyd/__main__.py", ["istio-iptables"]),
    ],
)
def test_called_by_either_name(
    called: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(stdio, "prepare", lambda: None)  # stdout is pytest's
    monkeypatch.setattr("sys.argv", [called, *words, "--help"])
    assert cli.main() == 0
    assert capsys.readouterr().out.startswith("usage: istio-iptables ")
    monkeypatch.setattr("sys.argv", [called, *words, "-m", "x", "--dry-run"])
    assert cli.main() == 2
    assert "-m: " in capsys.readouterr().err


def test_the_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "istio-iptables" in capsys.readouterr().out


def test_no_such_network_namespace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--network-namespace", "/nowhere"], {}) == 3
    assert "can't enter the network namespace /nowhere: No such file" in capsys.readouterr().err
