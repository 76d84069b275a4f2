"""What istio-iptables' words mean.

The facts are those of istio/istio: defaults from tools/common/config/config.go, spellings from
tools/istio-iptables/pkg/cmd/root.go and pkg/flag, the way pflag and strconv read.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest

from tproxyd.errors import ConfigError
from tproxyd.istio import invocation
from tproxyd.istio.flags import FLAGS, REFUSED, VARIABLES, Flag, usage
from tproxyd.istio.invocation import Invocation, name_servers
from tproxyd.istio.options import ALL, IstioOptions, Mode

DEFAULT = Invocation()


class FakeHost:
    """Three users, two groups, two name servers."""

    users = {"envoy": 101, "istio-proxy": 1337, "app": 1000}  # noqa: RUF012
    groups = {"java": 202, "ftp": 21}  # noqa: RUF012

    def uid(self, name: str) -> int:
        return self.users[name]

    def gid(self, name: str) -> int:
        return self.groups[name]

    def resolv_conf(self) -> str:
        return "search example\nnameserver 10.96.0.10\nnameserver fd00::a\n"


def parse(*argv: str, **environ: str) -> Invocation:
    found = invocation.parse(argv, environ, FakeHost())
    assert found is not None
    return found


def problems(*argv: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        invocation.parse(argv, environ, FakeHost())
    return [str(each) for each in caught.value.problems]


def test_without_a_flag_it_is_istio_without_a_flag() -> None:
    assert parse() == DEFAULT
    options = DEFAULT.options
    assert (options.proxy_port, options.inbound_port, options.tunnel_port) == (15001, 15006, 15008)
    assert (options.mark, options.table) == (1337, 133)
    assert (DEFAULT.probe_port, DEFAULT.probe_timeout_s) == (15002, 5.0)
    assert options.mode is Mode.REDIRECT
    assert options.inbound_ports == () == options.outbound_ranges
    assert options.owner_groups is ALL
    assert str(options.loopback) == "127.0.0.1/32"
    assert options.proxy_uids == options.proxy_gids == (1337,)


# (words of the command line, the field of the options, its value): every flag, long and short.
SETTINGS: list[tuple[tuple[str, ...], str, Any]] = [
    (("-p", "15011"), "proxy_port", 15011),
    (("--envoy-port", "15011"), "proxy_port", 15011),
    (("--envoy-port=15011",), "proxy_port", 15011),
    (("-p15011",), "proxy_port", 15011),
    (("-p=15011",), "proxy_port", 15011),
    (("-p", "1", "-p", "15011"), "proxy_port", 15011),
    (("-z", "15016"), "inbound_port", 15016),
    (("--inbound-capture-port", "15016"), "inbound_port", 15016),
    (("-e", "15018"), "tunnel_port", 15018),
    (("--inbound-tunnel-port", "15018"), "tunnel_port", 15018),
    (("-u", "3,4", "-g", "3,4"), "proxy_uids", (3, 4)),
    (("--proxy-uid", "3"), "proxy_uids", (3,)),
    (("--proxy-gid", "1,2"), "proxy_gids", (1, 2)),
    (("-g", "java,7,"), "proxy_gids", (202, 7)),
    (("-m", "TPROXY"), "mode", Mode.TPROXY),
    (("-m", "REDIRECT"), "mode", Mode.REDIRECT),
    (("-m", ""), "mode", Mode.REDIRECT),
    (("--istio-inbound-interception-mode", "TPROXY"), "mode", Mode.TPROXY),
    (("-b", "*"), "inbound_ports", ALL),
    (("-b", "80,443"), "inbound_ports", ((80, 80), (443, 443))),
    (("-b", "8000:8100"), "inbound_ports", ((8000, 8100),)),
    (("-b", ""), "inbound_ports", ()),
    (("--istio-inbound-ports", "*"), "inbound_ports", ALL),
    (("-d", "15090,15021,"), "inbound_exclude_ports", ((15090, 15090), (15021, 15021))),
    (("--istio-local-exclude-ports", "15090"), "inbound_exclude_ports", ((15090, 15090),)),
    (("-c", "net1,net+"), "exclude_interfaces", ("net1", "net+")),
    (("--istio-exclude-interfaces", "net1"), "exclude_interfaces", ("net1",)),
    (("-i", "*"), "outbound_ranges", ALL),
    (("-i", "9.9.1.2/16"), "outbound_ranges", (ip_network("9.9.0.0/16"),)),
    (
        ("--istio-service-cidr", "10.0.0.0/8,2001:db8::/32"),
        "outbound_ranges",
        (ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")),
    ),
    (("-x", "1.1.0.0/16"), "outbound_exclude_ranges", (ip_network("1.1.0.0/16"),)),
    (("-x", ""), "outbound_exclude_ranges", ()),
    (
        ("--istio-service-exclude-cidr", "fd00::1"),
        "outbound_exclude_ranges",
        (ip_network("fd00::1/128"),),
    ),
    (("-q", "32000,31000"), "outbound_ports", ((32000, 32000), (31000, 31000))),
    (("--istio-outbound-ports", "80"), "outbound_ports", ((80, 80),)),
    (("-o", "25"), "outbound_exclude_ports", ((25, 25),)),
    (("--istio-local-outbound-ports-exclude", "25"), "outbound_exclude_ports", ((25, 25),)),
    (("-k", "eth0,eth1"), "virtual_interfaces", ("eth0", "eth1")),
    (("--kube-virt-interfaces", "eth0"), "virtual_interfaces", ("eth0",)),
    (("-t", "1400"), "mark", 1400),
    (("-t", "0x539"), "mark", 1337),
    (("--istio-inbound-tproxy-mark", "0XABC"), "mark", 0xABC),
    (("-r", "134"), "table", 134),
    (("--istio-inbound-tproxy-route-table", "0x86"), "table", 134),
    (("--drop-invalid",), "drop_invalid", True),
    (("--drop-invalid", "--drop-invalid=false"), "drop_invalid", False),
    (("--redirect-dns", "--capture-all-dns"), "capture_all_dns", True),
]


@pytest.mark.parametrize(("argv", "field", "value"), SETTINGS, ids=lambda each: str(each))
def test_a_flag_sets_its_value_and_nothing_else(
    argv: tuple[str, ...], field: str, value: object
) -> None:
    options = parse(*argv).options
    assert getattr(options, field) == value
    others = {"proxy_uids": {"proxy_gids"}, "capture_all_dns": {"redirect_dns"}}.get(field, set())
    names = {field, *others}
    rest = {name: getattr(options, name) for name in names}
    assert replace(IstioOptions(), **rest) == options


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["-n"], {"dry_run": True}),
        (["--dry-run"], {"dry_run": True}),
        (["--dry-run=T"], {"dry_run": True}),
        (["--dry-run=0"], {}),
        (["--skip-rule-apply", "--run-validation"], {"skip_rule_apply": True, "run_validation": 1}),
        (["--iptables-probe-port", "0x3a9b"], {"probe_port": 15003}),
        (["--probe-timeout", "1m30s"], {"probe_timeout_s": 90.0}),
        (["--probe-timeout=250ms"], {"probe_timeout_s": 0.25}),
        (["--reconcile"], {}),
        (["--reconcile=false"], {"may_change": False}),
        (["--cleanup-only"], {"cleanup_only": True}),
        (["--force-apply", "--dual-stack"], {}),
        (["--native-nftables"], {"backend": "nft"}),
        (["--force-iptables-binary", "nft"], {"backend": "iptables-nft"}),
        (["--force-iptables-binary=legacy"], {"backend": "iptables-legacy"}),
        (["--force-iptables-binary="], {}),
        (["--network-namespace", "/run/netns/x"], {"network_namespace": "/run/netns/x"}),
        (
            ["--cni-mode", "--network-namespace=/x"],
            {"cni_mode": True, "network_namespace": "/x"},
        ),
        (["--log_output_level=default:debug"], {"level": "debug"}),
        (["--log_output_level=ads:debug,all:error,default:info"], {"level": "error"}),
        (["--log_output_level=warn", "--log_as_json"], {"level": "warn", "as_json": True}),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_what_is_to_be_done(argv: list[str], expected: dict[str, Any]) -> None:
    assert parse(*argv) == replace(DEFAULT, **expected)


@pytest.mark.parametrize(
    "flag",
    [flag for flag in FLAGS if flag.short and not flag.switch],
    ids=lambda flag: flag.name,
)
def test_every_setting_has_its_variable(flag: Flag) -> None:
    by_flag = {words[0]: words for words, *_ in SETTINGS}
    words = by_flag[f"--{flag.name}"]
    assert flag.variables == (flag.name.upper().replace("-", "_"),)
    if len(words) == 1:
        words = f"--{flag.name}", words[0].partition("=")[2]
    for variable in flag.variables:
        assert parse(**{variable: words[1]}) == parse(*words) != DEFAULT


@pytest.mark.parametrize(
    ("variable", "text", "argv"),
    [
        ("ENVOY_PORT", "15011", ["-p", "15011"]),
        ("DRY_RUN", "true", ["-n"]),
        ("SKIP_RULE_APPLY", "1", ["--skip-rule-apply"]),
        ("RUN_VALIDATION", "t", ["--run-validation"]),
        ("CLEANUP_ONLY", "True", ["--cleanup-only"]),
        ("RECONCILE", "f", ["--reconcile=false"]),
        ("NATIVE_NFTABLES", "TRUE", ["--native-nftables"]),
        ("FORCE_IPTABLES_BINARY", "legacy", ["--force-iptables-binary", "legacy"]),
        ("NETWORK_NAMESPACE", "/x", ["--network-namespace", "/x"]),
        ("IPTABLES_PROBE_PORT", "15003", ["--iptables-probe-port", "15003"]),
        ("PROBE_TIMEOUT", "7s", ["--probe-timeout", "7s"]),
        ("DROP_INVALID", "true", ["--drop-invalid"]),
        ("INVALID_DROP", "true", ["--drop-invalid"]),
        ("REDIRECT_DNS", "true", ["--redirect-dns"]),
        ("ISTIO_META_DNS_CAPTURE", "true", ["--redirect-dns"]),
        ("FORCE_APPLY", "true", ["--force-apply"]),
        ("DUAL_STACK", "true", ["--dual-stack"]),
        ("ISTIO_DUAL_STACK", "false", ["--dual-stack=false"]),
        ("PROXY_UID", "", []),
        ("INBOUND_CAPTURE_PORT", "", []),
        ("DRY_RUN", "", []),
        ("UNRELATED", "x", []),
    ],
)
def test_a_variable_is_its_flag(variable: str, text: str, argv: list[str]) -> None:
    assert parse(**{variable: text}) == parse(*argv)


def test_a_flag_comes_before_a_variable_and_a_variable_before_the_default() -> None:
    environ = {"ISTIO_INBOUND_PORTS": "80", "ISTIO_INBOUND_TPROXY_MARK": "0x600", "DRY_RUN": "true"}
    options = parse("-b", "*", "-n=false", **environ).options
    assert options == replace(IstioOptions(), inbound_ports=ALL, mark=0x600)
    assert not parse("-n=false", **environ).dry_run
    assert parse("-b", "", **environ).options.inbound_ports == ()


def test_the_other_variable_of_a_switch_comes_first() -> None:
    assert not parse(REDIRECT_DNS="true", ISTIO_META_DNS_CAPTURE="false").options.redirect_dns
    assert parse(DROP_INVALID="false", INVALID_DROP="true").options.drop_invalid


def test_variables_without_a_flag() -> None:
    def options(**environ: str) -> IstioOptions:
        return parse(**environ).options

    assert options(ISTIO_OUTBOUND_OWNER_GROUPS="java,7").owner_groups == (202, 7)
    assert options(ISTIO_OUTBOUND_OWNER_GROUPS="").owner_groups == ()  # nobody's, not everybody's
    assert options(ISTIO_OUTBOUND_OWNER_GROUPS="*").owner_groups is ALL
    assert options(ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE="888,ftp").owner_groups_exclude == (888, 21)
    loopback = options(ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR="127.0.0.1/8").loopback
    assert str(loopback) == "127.0.0.0/8"


def test_the_proxy_is_the_user_of_envoy() -> None:
    assert parse(ENVOY_USER="envoy").options.proxy_uids == (101,)
    assert parse(ENVOY_USER="envoy").options.proxy_gids == (101,)  # the number, as with -u
    assert parse("-u", "7,app").options.proxy_gids == (7, 1000)
    assert parse("-u", "7", ENVOY_USER="envoy").options.proxy_uids == (7,)


def test_what_is_captured() -> None:
    """Exclusions count for lists of ports as well, which there they don't."""

    def inbound(*argv: str) -> tuple[bool, object]:
        options = parse(*argv).options
        return options.captures_inbound, options.inbound_list

    assert inbound() == (False, ())
    assert inbound("-b", "*", "-d", "80") == (True, ())
    assert inbound("-b", "80,8080", "-d", "8080") == (True, ((80, 80),))
    assert inbound("-b", "8080", "-d", "8080") == (False, ())
    assert inbound("-b", "1:10,3:4", "-d", "10,5:6,2") == (
        True,
        ((1, 1), (3, 4), (7, 9), (3, 4)),
    )


def test_routes_are_for_inbound_tproxy_only() -> None:
    assert parse("-b", "*", "-m", "TPROXY").options.needs_routes
    assert not parse("-b", "*").options.needs_routes
    assert not parse("-m", "TPROXY").options.needs_routes


def test_ranges_fall_into_families() -> None:
    options = parse("-i", "10.0.0.0/8,fd00::/8", "-x", "::/0").options
    assert options.outbound_of(4) == (ip_network("10.0.0.0/8"),)
    assert options.outbound_of(6) == (ip_network("fd00::/8"),)
    assert options.outbound_exclude_of(4) == ()
    assert options.outbound_exclude_of(6) == (ip_network("::/0"),)
    assert parse("-i", "*").options.outbound_of(6) is ALL
    assert not options.takes_loopback
    assert not parse("-i", "*").options.takes_loopback
    assert parse("-i", "127.1.2.3/32").options.takes_loopback
    assert parse("-i", "10.0.0.0/8,::1/128").options.takes_loopback


def test_dns_goes_to_the_servers_of_this_host() -> None:
    options = parse("--redirect-dns").options
    assert options.dns_servers_v4 == ("10.96.0.10",)
    assert options.dns_servers_v6 == ("fd00::a",)
    assert options.redirects_dns
    every = parse("--redirect-dns", "--capture-all-dns").options
    assert (every.dns_servers_v4, every.dns_servers_v6, every.redirects_dns) == ((), (), True)
    assert not parse("--capture-all-dns").options.redirects_dns


def test_name_servers() -> None:
    text = "# nameserver 1.1.1.1\nnameserver\n\nnameserver fe80::1%eth0\nnameserver x\n"
    assert list(name_servers(text + " nameserver 9.9.9.9 # mine")) == ["fe80::1", "9.9.9.9"]


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "path", "said"),
    [
        (["-m", "NONE"], "-m", "neither TPROXY nor REDIRECT"),
        (["-m", "tproxy"], "-m", "meant TPROXY?"),
        (["-p", "0"], "-p", "a port"),
        (["-z", "65536"], "-z", "a port"),
        (["-z", "http"], "-z", "a port"),
        (["-b", "80,*"], "-b", "stands alone"),
        (["-d", "*"], "-d", "stands alone"),
        (["-b", "90:80"], "-b", "the low port comes first"),
        (["-i", "10.0.0.0/8,*"], "-i", "stands alone"),
        (["-x", "*"], "-x", "stands alone"),
        (["-x", "10.0.0.0/33"], "-x", "not a CIDR"),
        (["-t", "1338"], "-t", "take another"),
        (["-t", "0"], "-t", "not a mark"),
        (["-t", "0x1/0xff"], "-t", "mask"),
        (["-t", "0x1ffffffff"], "-t", "not a mark"),
        (["-r", "254"], "-r", "the system needs"),
        (["-r", "main"], "-r", "not a routing table"),
        (["-u", "nobody-here"], "-u", "neither a number nor a name"),
        (["-u", "4294967295"], "-u", "neither a number nor a name"),
        (["-c", "eth0 eth1"], "-c", "not an interface name"),
        (["-k", "averyverylongname"], "-k", "not an interface name"),
        (["--dry-run=yes"], "-n", "neither true nor false"),
        (["--dry-run", "true"], "true", "is not a flag"),
        (["-i", "10.0.0.0/8", "etc"], "etc", "is not a flag"),
        (["--", "-n"], "-n", "is not a flag"),
        (["--probe-timeout", "5"], "--probe-timeout", "not a time"),
        (["--probe-timeout", "0s"], "--probe-timeout", "not a time"),
        (["--force-iptables-binary", "xyz"], "--force-iptables-binary", "neither nft nor legacy"),
        (["--native-nftables", "--force-iptables-binary=nft"], "--force-iptables-binary", "no ipt"),
        (["--redirect-dsn"], "--redirect-dsn", "did you mean --redirect-dns?"),
        (["--iptables-trace-logging"], "--iptables-trace-logging", "is not supported: no rule"),
        (["--log_target", "/x"], "--log_target", "is not supported"),
        (["--log_output_level=loud"], "--log_output_level", "not a level"),
        (["-f"], "-f", "no such flag"),
        (["-nf"], "-f", "no such flag"),
        (["-p"], "-p", "needs a value"),
        (["--cleanup-only", "--skip-rule-apply"], "--skip-rule-apply", "--cleanup-only"),
        (["--cleanup-only", "--run-validation"], "--run-validation", "nothing to validate"),
        (["-n", "--run-validation"], "--run-validation", "nothing to validate"),
        (["--cni-mode"], "--cni-mode", "--network-namespace"),
        (
            ["--cni-mode", "--network-namespace=/x", "--redirect-dns"],
            "--redirect-dns",
            "--capture-all-dns",
        ),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else None,
)
def test_what_cannot_be_done_is_refused(argv: list[str], path: str, said: str) -> None:
    found = problems(*argv)
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}: ")
    assert said in found[0]


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("DRY_RUN", "yes"),
        ("ISTIO_META_DNS_CAPTURE", "on"),
        ("ISTIO_INBOUND_INTERCEPTION_MODE", "NONE"),
        ("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "10.0.0.0/8"),
        ("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "127.0.0.1"),
        ("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "127.0.0.1/7"),
        ("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", ""),
        ("ISTIO_OUTBOUND_OWNER_GROUPS", "java,cobol"),
        ("ISTIO_OUTBOUND_OWNER_GROUPS", ",".join(map(str, range(65)))),
        ("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "*"),
        ("ENVOY_USER", "nobody-here"),
    ],
)
def test_a_wrong_variable_is_refused_by_its_name(variable: str, text: str) -> None:
    assert [each.partition(":")[0] for each in problems(**{variable: text})] == [variable]


def test_everything_that_is_wrong_is_said_at_once() -> None:
    found = problems("-m", "x", "--no-flag", "-b", "y", DRY_RUN="z")
    assert sorted(each.partition(":")[0] for each in found) == ["--no-flag", "-b", "-m", "DRY_RUN"]


def test_no_server_to_redirect_dns_to() -> None:
    class NoServers(FakeHost):
        def resolv_conf(self) -> str:
            return "# empty\n"

    class NoFile(FakeHost):
        def resolv_conf(self) -> str:
            raise FileNotFoundError(2, "No such file or directory")

    for host in NoServers(), NoFile():
        with pytest.raises(ConfigError, match="add --capture-all-dns"):
            invocation.parse(["--redirect-dns"], {}, host)
        assert invocation.parse(["--redirect-dns", "--capture-all-dns"], {}, host)


def test_help_names_every_flag_and_variable() -> None:
    assert invocation.parse(["-h", "--no-such-flag"], {}, FakeHost()) is None
    assert invocation.parse(["--help"], {}, FakeHost()) is None
    text = usage()
    for flag in FLAGS:
        assert f"--{flag.name}\n" in text
    for variable in VARIABLES:
        assert f"  {variable}\n" in text
    assert not {flag.name for flag in FLAGS} & REFUSED.keys()
