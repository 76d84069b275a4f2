"""TPROXYD_… variables: what each sets, that it wins over the file, and how it is told off."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tproxyd import cli, configsource
from tproxyd.addr import Endpoint, PrefixSet, parse_prefix
from tproxyd.config import Config, HeaderPolicy, LogFormat, ProxyProtocol, ReturnPath, SendProxy
from tproxyd.configfile import parse
from tproxyd.environment import VARIABLES, ours
from tproxyd.errors import ConfigError


def problems(variables: dict[str, str], text: str = "") -> dict[str, str]:
    with pytest.raises(ConfigError) as told:
        parse(text, "x", variables)
    return dict(told.value.problems)


# What they set ------------------------------------------------------------------------------------


def test_every_one_is_heard() -> None:
    """The same as a file that says it all; in the file everything is otherwise."""
    said = {
        "TPROXYD_MARK": "0x77",
        "TPROXYD_TABLE": "7",
        "TPROXYD_WORKERS": "3",
        "TPROXYD_ADMIN": "0.0.0.0:9134",
        "TPROXYD_DRAIN_TIMEOUT_S": "2.5",
        "TPROXYD_RULES_BACKEND": "nft",
        "TPROXYD_RULES_SCHEME": "lean",
        "TPROXYD_RULES_RETURN_PATH": "conntrack",
        "TPROXYD_RULES_GUARD": "owner",
        "TPROXYD_RULES_ON_CRASH": "open",
        "TPROXYD_LOG_ACCESS": "/log",
        "TPROXYD_LOG_FORMAT": "text",
        "TPROXYD_LOG_DAEMON_FORMAT": "json",
        "TPROXYD_PORT": "15007",
        "TPROXYD_PORTS": "80, 443, 8000-8100",
        "TPROXYD_EXCLUDE_PORTS": "8080",
        "TPROXYD_INTERFACES": "eth0,veth*",
        "TPROXYD_TRUSTED": "10.0.0.5/32=require, fd00::/8=optional",
        "TPROXYD_SEND_PROXY": "v2",
        "TPROXYD_MAX_CONNECTIONS": "9",
    }
    assert said.keys() == VARIABLES.keys()
    file = """
        mark = 0x77
        table = 7
        workers = 3
        admin = "0.0.0.0:9134"
        drain_timeout_s = 2.5
        rules = { backend = "nft", return_path = "conntrack", guard = "owner", on_crash = "open" }
        log = { access = "/log", format = "text", daemon_format = "json" }
        [[listener]]
        port = 15007
        intercept.ports = [80, 443, "8000-8100"]
        intercept.exclude_ports = [8080]
        intercept.interfaces = ["eth0", "veth*"]
        send_proxy = "v2"
        max_connections = 9
        [[listener.proxy_protocol]]
        from = ["10.0.0.5/32"]
        policy = "require"
        [[listener.proxy_protocol]]
        from = ["fd00::/8"]
        policy = "optional"
    """
    other = """
        mark = 1
        table = 2
        workers = 3
        admin = ""
        drain_timeout_s = 4
        rules = { backend = "auto", return_path = "accept-mark" }
        log = { access = "-", format = "json", daemon_format = "text" }
        [[listener]]
        port = 5
        intercept = { ports = [6], exclude_ports = [7], interfaces = ["eth8"] }
        send_proxy = "v1"
        max_connections = 10
        proxy_protocol = [{ from = ["::/0"], policy = "reject" }]
    """
    want = parse(file, "file")
    assert parse("", "x", said) == want
    assert parse(other, "x", said) == want
    assert want.rules.return_path is ReturnPath.CONNTRACK
    assert want.log.format is LogFormat.TEXT
    assert want.listeners[0].send_proxy is SendProxy.V2
    assert want.admin == Endpoint("0.0.0.0", 9134)


def test_what_they_do_not_name_stays_as_in_the_file() -> None:
    text = '[[listener]]\nname = "x"\nintercept = { ports = [80], interfaces = ["eth0"] }\n'
    config = parse(text, "x", {"TPROXYD_PORTS": "*"})
    assert config == parse(text.replace("[80]", '"*"'), "x")


def test_an_empty_one_is_an_empty_value() -> None:
    text = '[[listener]]\nproxy_protocol = [{ from = ["10.0.0.0/8"], policy = "optional" }]\n'
    names = ("TRUSTED", "EXCLUDE_PORTS", "ADMIN", "LOG_ACCESS")
    config = parse(text, "x", {f"TPROXYD_{name}": "" for name in names})
    assert config.listeners[0].proxy_protocol == ()
    assert config.listeners[0].intercept.exclude_ports == ()
    assert config.admin is None
    assert config.log.access == ""


def test_the_sidecar_beside_other_listeners_is_meant() -> None:
    text = """
        [[listener]]
        name = "web"
        bind = "*"
        port = 8000
        upstream = ["10.0.0.5:80"]
        [[listener]]
        name = "out"
        port = 15001
        intercept.scope = "outbound"
        [[listener]]
    """
    config = parse(text, "x", {"TPROXYD_TRUSTED": "10.0.0.0/8=reject"})
    entry = ProxyProtocol(PrefixSet([parse_prefix("10.0.0.0/8")]), HeaderPolicy.REJECT)
    assert [each.proxy_protocol for each in config.listeners] == [(), (), (entry,)]


# What is wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "path", "why"),
    [
        ("MARK", "", "", '"" is not a whole number from 1 to'),
        ("MARK", "0", "", "0 is not a whole number from 1 to"),
        ("WORKERS", "many", "", '"many" is not a whole number from 0 to 1024'),
        ("TABLE", "254", "", "254 is one of the kernel's own tables"),
        ("ADMIN", "here", "", '"here"'),
        ("DRAIN_TIMEOUT_S", "-1", "", "-1.0 is not a number of seconds"),
        ("RULES_BACKEND", "nftt", "", '"nftt" is not one of: '),
        ("LOG_FORMAT", "jason", "", 'did you mean "json"?'),
        ("PORT", "9133", "", "9133 is the admin port too"),
        ("PORTS", "", "", "is empty, so nothing would be taken"),
        ("PORTS", "80,http", "[1]", '"http" is not a port'),
        ("EXCLUDE_PORTS", "70000", "[0]", "70000 is not within 1 to 65535"),
        ("INTERFACES", "a/b", "[0]", '"a/b" is not an interface name'),
        ("TRUSTED", "10.0.0.0/8", "", "has no policy: write 10.0.0.0/8=require"),
        ("TRUSTED", "10.0.0.0/8=yes", "[0].policy", '"yes" is not one of: require, '),
        ("TRUSTED", "::/0=reject,10.0.0.1/8=require", "[1].from[0]", "10.0.0.0/8"),
    ],
)
def test_the_variable_is_named(name: str, text: str, path: str, why: str) -> None:
    [(where, said)] = problems({f"TPROXYD_{name}": text}).items()
    assert where == f"TPROXYD_{name}{path}"
    assert why in said


def test_everything_at_once_each_with_its_own_name() -> None:
    said = problems(
        {"TPROXYD_MARK": "x", "TPROXYD_MARC": "1", "TPROXYD_PORT": "0"},
        'table = 0\n[[listener]]\nmax_connections = -1\nsource = "me"\n',
    )
    listed = {"TPROXYD_MARK", "TPROXYD_MARC", "TPROXYD_PORT", "table"}
    assert said.keys() == {*listed, "listener[0].max_connections", "listener[0].source"}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("TPROXYD_EXCLUDED_PORTS", "unknown variable; did you mean TPROXYD_EXCLUDE_PORTS?"),
        ("TPROXYD_CONFIGS", "unknown variable; did you mean TPROXYD_CONFIG?"),
        ("TPROXYD_X", "unknown variable; known are TPROXYD_ and one of: CONFIG, MARK, "),
        ("TPROXYD_SERVICE_HOST", "Kubernetes makes it of a Service named tproxyd"),
        ("TPROXYD_PORT_9133_TCP_ADDR", "Kubernetes makes it of a Service named tproxyd"),
    ],
)
def test_unknown_ones(name: str, why: str) -> None:
    assert why in problems({name: "x"})[name]


SIDECAR = "[[listener]]\n"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (f"{SIDECAR}{SIDECAR}name = 'b'\nport = 2\n", "2"),
        (f"{SIDECAR}bind = '*'\nupstream = ['10.0.0.5:80']\n", "none"),
        (f"{SIDECAR}intercept.scope = 'forward'\n", "none"),
    ],
)
def test_whose_listener(text: str, count: str) -> None:
    said = problems({"TPROXYD_PORTS": "80"}, text)
    assert said.keys() == {"TPROXYD_PORTS"}
    assert f"the file has {count}: set it there" in said["TPROXYD_PORTS"]


@pytest.mark.parametrize("text", ["listener = 1", "listener = [1]", "rules = 1"])
def test_a_file_that_is_wrong_where_they_belong(text: str) -> None:
    said = problems({"TPROXYD_PORTS": "80", "TPROXYD_RULES_BACKEND": "nft"}, text)
    assert set(said) <= {"listener", "rules"}


# From the command line ----------------------------------------------------------------------------


def test_which_are_ours() -> None:
    environ = {"TPROXYD_MARK": "1", "TPROXYD_CONFIG": "/x", "tproxyd_mark": "2", "PATH": "/bin"}
    assert ours(environ) == {"TPROXYD_MARK": "1"}


def test_the_file_they_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text("table = 7\n")
    two.write_text("table = 8\n")
    monkeypatch.setenv("TPROXYD_CONFIG", str(one))
    monkeypatch.setenv("TPROXYD_WORKERS", "2")
    assert configsource.read_config(None) == Config(table=7, workers=2)
    assert configsource.read_config(str(two)) == Config(table=8, workers=2)
    assert cli.main(["check"]) == 0
    assert capsys.readouterr().out.startswith(f"{one}: fine")


def test_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configsource, "DEFAULT_FILE", "/nonexistent/tproxyd.toml")
    monkeypatch.setenv("TPROXYD_TABLE", "7")
    assert configsource.read_config(None) == Config(table=7)
    monkeypatch.setenv("TPROXYD_TABLE", "x")
    said = "can't use the configuration of the environment:\n  TPROXYD_TABLE: "
    with pytest.raises(ConfigError, match=re.escape(said)):
        configsource.read_config(None)
