"""The configuration: what is read, what each mistake is told, and that none hides another."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxyd.addr import Endpoint, PrefixSet, is_name, parse_prefix
from tproxyd.config import (
    Backend,
    Config,
    HeaderPolicy,
    Intercept,
    Listener,
    Log,
    LogFormat,
    ProxyProtocol,
    ReturnPath,
    Rules,
    SendProxy,
    SendTlvs,
    SourceKind,
    Via,
)
from tproxyd.configfile import LARGEST_HEADER, parse
from tproxyd.errors import ConfigError
from tproxyd.reader import EVERY_PORT, merge_ranges


def problems(text: str) -> dict[str, str]:
    """What is wrong with it: path -> text. Each path is told once."""
    with pytest.raises(ConfigError) as caught:
        parse(text, "test.toml")
    found = caught.value.problems
    assert str(caught.value) == "can't use the configuration test.toml:" + "".join(
        f"\n  {each}" for each in found
    )
    told = {each.path: each.text for each in found}
    assert len(told) == len(found), f"a path is told twice: {found}"
    return told


def nets(*prefixes: str) -> PrefixSet:
    return PrefixSet(map(parse_prefix, prefixes))


# What is read -------------------------------------------------------------------------------------


def test_no_file_and_an_empty_one_are_one_sidecar_that_trusts_nobody() -> None:
    assert parse("", "x") == parse("[[listener]]", "x") == Config()
    (listener,) = Config().listeners
    assert (listener.name, listener.port) == ("inbound", 15006)
    assert listener.proxy_protocol == ()
    assert listener.source is SourceKind.CLIENT


def test_everything_has_a_key() -> None:
    text = """
    mark = 0x100
    table = 200
    workers = 3
    admin = "[::1]:9999"
    drain_timeout_s = 0

    [rules]
    backend = "nft"
    scheme = "lean"
    return_path = "conntrack"

    [log]
    access = "/var/log/tproxyd.log"
    format = "text"

    [[listener]]
    name = "a"
    port = 1
    intercept.ports = [80, "8000-8100", 81]
    intercept.exclude_ports = []
    intercept.interfaces = ["veth*", "eth0"]
    upstream = "original"
    source = "proxy"
    send_proxy = "v2"
    send_tlvs.forward = [0x02, 0xEA]
    send_tlvs.own = [{ type = 0xE4, value = "x" }]
    send_tlvs.authority = "example.org"
    send_tlvs.unique_id = true
    send_tlvs.crc32c = true
    max_connections = 5
    max_header_bytes = 107
    header_timeout_s = 0.5
    connect_timeout_s = 1
    idle_timeout_s = 0
    half_close_timeout_s = 2.5

    [[listener.proxy_protocol]]
    from = ["10.0.0.0/9", "10.128.0.0/9"]
    policy = "optional"

    [[listener.proxy_protocol]]
    from = []
    policy = "reject"

    [[listener]]
    name = "b"
    port = 2
    intercept.sources = ["::ffff:10.0.0.0/104"]
    intercept.destinations = ["fd00::1"]
    send_proxy = "v2"
    send_tlvs.forward = "all"
    """
    first = Listener(
        name="a",
        port=1,
        intercept=Intercept(
            ports=((80, 81), (8000, 8100)), exclude_ports=(), interfaces=("eth0", "veth*")
        ),
        source=SourceKind.PROXY,
        send_proxy=SendProxy.V2,
        send_tlvs=SendTlvs(frozenset((0x02, 0xEA)), ((0xE4, b"x"),), "example.org", True, True),
        max_connections=5,
        max_header_bytes=107,
        header_timeout_s=0.5,
        connect_timeout_s=1.0,
        idle_timeout_s=0.0,
        half_close_timeout_s=2.5,
        proxy_protocol=(
            ProxyProtocol(nets("10.0.0.0/8"), HeaderPolicy.OPTIONAL),
            ProxyProtocol(nets(), HeaderPolicy.REJECT),
        ),
    )
    second = Listener(
        name="b",
        port=2,
        intercept=Intercept(sources=nets("10.0.0.0/8"), destinations=nets("fd00::1/128")),
        send_proxy=SendProxy.V2,
        send_tlvs=SendTlvs(forward=None),
    )
    assert parse(text, "x") == Config(
        mark=0x100,
        table=200,
        workers=3,
        admin=Endpoint("::1", 9999),
        drain_timeout_s=0.0,
        rules=Rules(Backend.NFT, return_path=ReturnPath.CONNTRACK),
        log=Log("/var/log/tproxyd.log", LogFormat.TEXT),
        listeners=(first, second),
    )


def test_a_configuration_is_frozen_and_hashable() -> None:
    assert hash(Config()) == hash(parse("", "x"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().mark = 1  # type: ignore[misc]


def test_no_admin() -> None:
    assert parse('admin = ""', "x").admin is None


def test_the_listener_has_a_mark_of_its_own() -> None:
    config = parse("mark = 0xfffffffe", "x")
    assert config.listener_mark == 0xFFFFFFFF != config.mark


def test_every_port() -> None:
    config = parse('[[listener]]\nintercept = { ports = "*", exclude_ports = [] }', "x")
    assert config.listeners[0].intercept.ports == EVERY_PORT


# Ranges of ports ----------------------------------------------------------------------------------

ranges = st.lists(
    st.tuples(st.integers(1, 80), st.integers(0, 9)).map(lambda r: (r[0], r[0] + r[1]))
)


@given(ranges)
def test_merged_ranges_hold_the_same_ports_and_touch_nowhere(some: list[tuple[int, int]]) -> None:
    merged = merge_ranges(some)
    assert {p for low, high in merged for p in range(low, high + 1)} == {
        p for low, high in some for p in range(low, high + 1)
    }
    assert all(one[1] + 1 < next_[0] for one, next_ in pairwise(merged))


def test_one_range_inside_another() -> None:
    assert merge_ranges([(1, 10), (2, 3), (11, 12), (14, 15)]) == ((1, 12), (14, 15))


def test_a_gateway() -> None:
    text = """
[[listener]]
bind = "::ffff:10.0.0.1"
port = 8000
upstream = ["10.0.0.5:80", "[FD00::5]:80", "App.Example:80", "unix:/run/a:b.sock", "10.0.0.5:80"]
"""
    (listener,) = parse(text, "x").listeners
    assert listener.bind == "10.0.0.1"
    assert not listener.intercepts
    assert list(map(str, listener.upstream)) == [
        "10.0.0.5:80",
        "[fd00::5]:80",
        "app.example:80",
        "unix:/run/a:b.sock",
    ]
    assert [is_name(each) for each in listener.upstream] == [False, False, True, False]
    # Toward other hosts the client's address needs routes that a beginner does not have.
    assert listener.source is SourceKind.PROXY
    assert not parse(text, "x").transparent
    asked = text.replace("unix:/run/a:b.sock", "10.0.0.6:80") + 'source = "client-port"'
    assert parse(asked, "x").listeners[0].source is SourceKind.CLIENT_PORT
    assert parse(asked, "x").transparent


@pytest.mark.parametrize("name", ["localhost", "a_b.c-d.example.", "1.2.3.4.example", "x" * 63])
def test_names(name: str) -> None:
    (listener,) = parse(f'[[listener]]\nupstream = ["{name}:80"]', "x").listeners
    assert listener.upstream == (Endpoint(name, 80),)


@pytest.mark.parametrize("name", ["", "a..b", "-a", "a-", "a b", "1.2.3", "x" * 64, "a.1", "ä.b"])
def test_what_is_no_name(name: str) -> None:
    assert "listener[0].upstream[0]" in problems(f'[[listener]]\nupstream = ["{name}:80"]')


def test_what_other_scopes_take_for_granted() -> None:
    text = """
[[listener]]
name = "a"
intercept.scope = "forward"
[[listener]]
name = "b"
port = 15001
intercept.scope = "outbound"
"""
    forward, outbound = (each.intercept for each in parse(text, "x").listeners)
    assert forward.exclude_ports == outbound.exclude_ports == ()  # Istio's probes go to this host
    assert (forward.via, outbound.via) == (Via.TPROXY, Via.REDIRECT)
    assert parse(text, "x").outbound
    assert not Config().outbound


def test_two_on_one_port_of_different_addresses() -> None:
    two = """
[[listener]]
name = "a"
bind = "10.0.0.1"
upstream = ["10.0.0.5:80"]
[[listener]]
name = "b"
bind = "{}"
upstream = ["10.0.0.5:80"]
"""
    assert len(parse(two.format("10.0.0.2"), "x").listeners) == 2
    for same in ("10.0.0.1", "*", "0.0.0.0"):
        assert "listener[1].port" in problems(two.format(same))


# What is wrong ------------------------------------------------------------------------------------


def test_no_toml() -> None:
    (text,) = problems("mark = = 1").values()
    assert text.startswith("not TOML: ")
    assert "line 1" in text


TOP = [
    ("mark = 0", "mark", "0 is not a whole number from 1 to 4294967294"),
    ("mark = 0xffffffff", "mark", "4294967295 is not a whole number"),
    ('mark = "0x539"', "mark", '"0x539" is not a whole number'),
    ("mark = true", "mark", "true is not a whole number"),
    ("mark = 1.0", "mark", "1.0 is not a whole number"),
    ("table = 0", "table", "0 is not a whole number"),
    ("table = 253", "table", "253 is one of the kernel's own tables"),
    ("table = 254", "table", "254 is one of the kernel's own tables"),
    ("table = 255", "table", "255 is one of the kernel's own tables"),
    ("workers = -1", "workers", "-1 is not a whole number from 0 to 1024"),
    ("workers = 1025", "workers", "1025 is not"),
    ('admin = "localhost:9133"', "admin", '"localhost" is not an IP address'),
    ('admin = "9133"', "admin", "is not ADDRESS:PORT"),
    ("admin = 9133", "admin", "9133 is not a text in quotes"),
    ("drain_timeout_s = -1", "drain_timeout_s", "-1 is not a number of seconds, more than 0, or 0"),
    ("drain_timeout_s = inf", "drain_timeout_s", "inf is not a number of seconds"),
    ("drain_timeout_s = nan", "drain_timeout_s", "nan is not a number of seconds"),
    ("rules = 1", "rules", "1 is not a table"),
    (
        "[rules]\nbackend = 1",
        "rules.backend",
        "1 is not one of: auto, nft, iptables-nft, iptables-legacy",
    ),
    ('[rules]\nbackend = "ntf"', "rules.backend", 'did you mean "nft"?'),
    ('[rules]\nscheme = "fat"', "rules.scheme", '"fat" is not one of: lean, istio'),
    ('[rules]\nreturn_path = "accept_mark"', "rules.return_path", 'did you mean "accept-mark"?'),
    ("log = []", "log", "[] is not a table"),
    ("[log]\naccess = true", "log.access", "true is not a text in quotes"),
    ('[log]\nformat = "xml"', "log.format", '"xml" is not one of: json, text'),
    ("[log]\ndaemon_format = 1", "log.daemon_format", "1 is not"),
    ('[log]\naccess = "journal"\nformat = "text"', "log.format", "means nothing in the journal"),
    ("listener = []", "listener", "there must be at least one [[listener]]"),
    ("listener = 1", "listener", "is not a list of tables; write [[listener]] above each"),
    ("[listener]\nport = 1", "listener", "is not a list of tables"),
]

V2 = 'send_proxy = "v2"\n'
LISTENER = [
    ('name = ""', "name", '"" must be a-z'),
    ('name = "Inbound"', "name", "a letter first"),
    ('name = "1st"', "name", "a letter first"),
    (f'name = "{"a" * 32}"', "name", "31 at most"),
    ('name = "a b"', "name", "must be a-z"),
    ("name = 1", "name", "1 is not a text in quotes"),
    ("port = 0", "port", "0 is not a whole number from 1 to 65535"),
    ("port = 65536", "port", "65536 is not"),
    ("port = 9133", "port", "9133 is the admin port too"),
    ('upstream = "10.0.0.1:80"', "upstream", 'is not a list, for example ["10.0.0.5:80", "app.'),
    ("upstream = []", "upstream", "is empty; name one"),
    ('upstream = ["10.0.0.1"]', "upstream[0]", "is not ADDRESS:PORT, NAME:PORT or unix:/PATH"),
    ('upstream = ["10.0.0.300:80"]', "upstream[0]", "is not ADDRESS:PORT, NAME:PORT"),
    ('upstream = ["app.example:0"]', "upstream[0]", "a port is a number from 1 to 65535"),
    ('upstream = ["app.example:65536"]', "upstream[0]", "a port is a number from 1 to 65535"),
    ('upstream = ["fd00::5:80"]', "upstream[0]", 'or "[fd00::5]:80"'),
    ('upstream = ["unix:app.sock"]', "upstream[0]", "begins with / and has at most 107 bytes"),
    (f'upstream = ["unix:/{"a" * 107}"]', "upstream[0]", "at most 107 bytes"),
    ("upstream = [80]", "upstream[0]", "80 is not a text in quotes"),
    ('upstream = ["unix:/a"]', "source", "a unix socket shows no address"),
    ('bind = "*"', "upstream", "a listener with `bind` needs one"),
    ('bind = "eth0"\nupstream = ["a.b:1"]', "bind", "neither an IP address nor"),
    (
        'bind = "*"\nupstream = ["a.b:1"]\nintercept.ports = [80]',
        "intercept",
        "is an ordinary one and intercepts nothing",
    ),
    ('balance = "source-hash"', "balance", "means nothing without a list"),
    ("max_connect_attempts = 2", "max_connect_attempts", "means nothing without a list"),
    ("max_connect_attempts = 0", "max_connect_attempts", "0 is not a whole number from 1 to 100"),
    ("eject_after = 1", "eject_after", "means nothing without a list"),
    ("eject_s = 2", "eject_s", "means nothing without a list"),
    ("eject_s = 0", "eject_s", "0 is not a number of seconds, more than 0"),
    ("resolve_every_s = 2", "resolve_every_s", "means nothing without a list"),
    ("health_check.interval_s = 2", "health_check", "means nothing without a list"),
    ("health_check.interval_s = -1", "health_check.interval_s", "more than 0, or 0 (no checks)"),
    ("health_check.rise = 0", "health_check.rise", "0 is not a whole number from 1"),
    ("health_check.every = 1", "health_check.every", "unknown key; known: interval_s"),
    ("per_client.max_connections = -1", "per_client.max_connections", "-1 is not a whole"),
    ("per_client.max_new = 1", "per_client.max_new", 'did you mean "max_new_per_s"?'),
    ('source = "client-port"', "source", "on one host the client's own port is taken"),
    (
        'intercept.scope = "outbound"\nsource = "client-port"',
        "source",
        "on one host the client's own port is taken",
    ),
    ('intercept.scope = "routed"', "intercept.scope", "is not one of: local, forward, outbound"),
    ('intercept = { scope = "forward", via = "redirect" }', "intercept.via", 'by "tproxy" only'),
    ('intercept = { scope = "outbound", via = "tproxy" }', "intercept.via", 'by "redirect" only'),
    (
        'intercept = { scope = "outbound", interfaces = ["eth0"] }',
        "intercept.interfaces",
        "outbound connections arrive at none",
    ),
    ("intercept.exclude_uids = [1337]", "intercept.exclude_uids", "only outbound connections"),
    ('intercept.exclude_gids = ["root"]', "intercept.exclude_gids[0]", "is not the number of a"),
    ('source = "clent"', "source", 'did you mean "client"?'),
    ('send_proxy = "V2"', "send_proxy", '"V2" is not one of: off, v1, v2'),
    ("send_tlvs.crc32c = true", "send_tlvs", 'only a v2 header has TLVs: send_proxy = "v2"'),
    (f'{V2}send_tlvs.forward = "some"', "send_tlvs.forward", 'is not a list, for example "all" or'),
    (f"{V2}send_tlvs.forward = [256]", "send_tlvs.forward[0]", "256 is not a TLV type"),
    (f"{V2}send_tlvs.forward = [true]", "send_tlvs.forward[0]", "true is not a TLV type"),
    (f"{V2}send_tlvs.forward = [3]", "send_tlvs.forward", "crc32c = true makes one"),
    (
        V2 + f'[[listener.send_tlvs.own]]\ntype = 0xE4\nvalue = "{"a" * 1000}"\n' * 9,
        "send_tlvs.own",
        "more than 8192 bytes together",
    ),
    (f"{V2}send_tlvs.crc32c = 1", "send_tlvs.crc32c", "1 is neither true nor false"),
    (f'{V2}send_tlvs.authority = "{"a" * 256}"', "send_tlvs.authority", "longer than 255 bytes"),
    (f"{V2}send_tlvs.own = [1]", "send_tlvs.own", "write [[listener.send_tlvs.own]] above each"),
    (f'{V2}send_tlvs.own = [{{ value = "x" }}]', "send_tlvs.own[0].type", "is missing"),
    (f"{V2}send_tlvs.own = [{{ type = 0xE4 }}]", "send_tlvs.own[0].value", "is missing"),
    (
        f'{V2}send_tlvs.own = [{{ type = 5, value = "x" }}]',
        "send_tlvs.own[0].type",
        "5 is not a whole number from 224 to 247",
    ),
    (
        f'{V2}send_tlvs.own = [{{ type = 0xE4, value = "{"a" * 1025}" }}]',
        "send_tlvs.own[0].value",
        "longer than 1024 bytes",
    ),
    ("max_connections = -1", "max_connections", "-1 is not"),
    ("max_header_bytes = 106", "max_header_bytes", f"a whole number from 107 to {LARGEST_HEADER}"),
    ("max_header_bytes = 65552", "max_header_bytes", "65552 is not"),
    ("header_timeout_s = 0", "header_timeout_s", "0 is not a number of seconds, more than 0"),
    ("connect_timeout_s = 0.0", "connect_timeout_s", "0.0 is not a number of seconds"),
    ('connect_timeout_s = "5s"', "connect_timeout_s", '"5s" is not a number of seconds'),
    ("connect_timeout_s = true", "connect_timeout_s", "true is not a number of seconds"),
    ("idle_timeout_s = -0.1", "idle_timeout_s", "more than 0, or 0 (never)"),
    ("idle_timeout_s = 31536000", "idle_timeout_s", "31536000 is not a number of seconds"),
    ("half_close_timeout_s = 0", "half_close_timeout_s", "more than 0"),
    ("intercept = []", "intercept", "[] is not a table"),
    ("intercept.ports = []", "intercept.ports", "is empty, so nothing would be taken"),
    ("intercept.ports = 80", "intercept.ports", '80 is not a list, for example "*" or [80'),
    ('intercept.ports = "80"', "intercept.ports", '"80" is not a list'),
    ("intercept.ports = [0]", "intercept.ports[0]", "0 is not within 1 to 65535"),
    ("intercept.ports = [65536]", "intercept.ports[0]", "65536 is not within"),
    ('intercept.ports = [1, "9-8"]', "intercept.ports[1]", '"9-8" is not within'),
    ('intercept.ports = ["80-"]', "intercept.ports[0]", '"80-" is not a port or a range'),
    ("intercept.ports = [true]", "intercept.ports[0]", "true is not a port"),
    ("intercept.ports = [80.0]", "intercept.ports[0]", "80.0 is not a port"),
    ('intercept.exclude_ports = ["x"]', "intercept.exclude_ports[0]", '"x" is not a port'),
    ('intercept.sources = "10.0.0.0/8"', "intercept.sources", "is not a list"),
    ('intercept.sources = ["10.0.0.1/8"]', "intercept.sources[0]", 'meant "10.0.0.0/8"?'),
    ("intercept.sources = [10]", "intercept.sources[0]", "10 is not a text in quotes"),
    ('intercept.destinations = ["x"]', "intercept.destinations[0]", '"x" is not an IP prefix'),
    ('intercept.interfaces = ["a b"]', "intercept.interfaces[0]", "is not an interface name"),
    ('intercept.interfaces = [""]', "intercept.interfaces[0]", '"" is not an interface name'),
    ('intercept.interfaces = ["*eth"]', "intercept.interfaces[0]", "is not an interface name"),
    ('intercept.interfaces = ["a/b"]', "intercept.interfaces[0]", "is not an interface name"),
    ('intercept.interfaces = ["abcdefghijklmnop"]', "intercept.interfaces[0]", "interface name"),
    ("intercept.interfaces = [1]", "intercept.interfaces[0]", "1 is not an interface name"),
    ("proxy_protocol = 1", "proxy_protocol", "write [[listener.proxy_protocol]] above"),
    (
        '[[listener.proxy_protocol]]\npolicy = "require"',
        "proxy_protocol[0].from",
        "is missing; say both",
    ),
    ("[[listener.proxy_protocol]]\nfrom = []", "proxy_protocol[0].policy", "is missing; say both"),
    (
        '[[listener.proxy_protocol]]\nfrom = ["10.0.0.0/8", "x"]\npolicy = "reject"',
        "proxy_protocol[0].from[1]",
        '"x" is not an IP prefix',
    ),
    (
        '[[listener.proxy_protocol]]\nfrom = "10.0.0.0/8"\npolicy = "reject"',
        "proxy_protocol[0].from",
        "is not a list",
    ),
    (
        '[[listener.proxy_protocol]]\nfrom = []\npolicy = "required"',
        "proxy_protocol[0].policy",
        'did you mean "require"?',
    ),
]


@pytest.mark.parametrize(
    ("text", "path", "why"),
    [
        *TOP,
        *((f"[[listener]]\n{text}", f"listener[0].{path}", why) for text, path, why in LISTENER),
    ],
)
def test_a_bad_value(text: str, path: str, why: str) -> None:
    """One mistake is one problem, at its path."""
    told = problems(text)
    assert told.keys() == {path}
    assert why in told[path]


@pytest.mark.parametrize(
    ("text", "path", "hint"),
    [
        ("marks = 1", "marks", 'did you mean "mark"?'),
        ("[rule]", "rule", 'did you mean "rules"?'),
        ("[[listeners]]", "listeners", 'did you mean "listener"?'),
        ("zzz = 1", "zzz", "known: rules, log, listener, mark, table, workers, admin"),
        ('[rules]\nbackends = "nft"', "rules.backends", 'did you mean "backend"?'),
        ('[log]\nfile = "x"', "log.file", "known: access, format, daemon_format"),
        ("[[listener]]\nidle_timeout = 5", "listener[0].idle_timeout", '"idle_timeout_s"?'),
        (
            "[[listener]]\nintercept.exclude_port = [1]",
            "listener[0].intercept.exclude_port",
            '"exclude_ports"?',
        ),
        (
            '[[listener]]\n[[listener.proxy_protocol]]\nfrom = []\npolicy = "reject"\npeers = []',
            "listener[0].proxy_protocol[0].peers",
            "known: from, policy",
        ),
    ],
)
def test_an_unknown_key(text: str, path: str, hint: str) -> None:
    told = problems(text)
    assert told.keys() == {path}
    assert told[path].startswith("unknown key; ")
    assert hint in told[path]


def test_every_problem_at_once() -> None:
    told = problems("""
    mark = 0
    adnim = ""
    [rules]
    backend = "x"
    [log]
    formt = "json"
    [[listener]]
    port = 0
    name = "a"
    intercept = { ports = ["x", 80, 0], source = [] }
    [[listener]]
    port = 7
    name = "a"
    [[listener.proxy_protocol]]
    from = ["x"]
    [[listener]]
    port = 7
    name = "c"
    """)
    assert set(told) == {
        "mark",
        "adnim",
        "rules.backend",
        "log.formt",
        "listener[0].port",
        "listener[0].intercept.ports[0]",
        "listener[0].intercept.ports[2]",
        "listener[0].intercept.source",
        "listener[1].name",
        "listener[1].proxy_protocol[0].from[0]",
        "listener[1].proxy_protocol[0].policy",
        "listener[2].port",
    }
    assert told["listener[1].name"] == '"a" is also the name of listener[0]'
    assert told["listener[2].port"] == "7 is also the port of listener[1]"


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 70_000).map(lambda i: i)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["*", "", "auto", "10.0.0.0/8", "8000-8100", "x y"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


def toml(value: object) -> str:
    if value is None:
        return "{}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return repr(value)


@given(
    st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(Config)] + ["listener", "x"]), values
    ),
    st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(Listener)] + ["x"]), values
    ),
    st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(Intercept)] + ["x"]), values
    ),
)
def test_no_toml_raises_anything_but_config_error(
    top: dict[str, object], listener: dict[str, object], intercept: dict[str, object]
) -> None:
    top.pop("listener", None)
    listener.pop("intercept", None)
    lines = [f"{key} = {toml(value)}" for key, value in top.items()]
    lines += ["[[listener]]", *(f"{key} = {toml(value)}" for key, value in listener.items())]
    lines += [f"intercept.{key} = {toml(value)}" for key, value in intercept.items()]
    found = None
    try:
        assert len(parse("\n".join(lines), "x").listeners) == 1
    except ConfigError as error:
        found = error.problems
    assert found is None or (found and all(each.path for each in found))
