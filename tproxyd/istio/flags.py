"""The flags and the variables of istio-iptables, in the spelling that it has.

A value comes from a flag, else from a variable, else it is the default. The spelling is that of
Go's pflag, which is not getopt's: --flag=value and --flag value; -p 15001, -p15001 and -p=15001;
a switch takes a value only behind "=" (--dry-run=false); the last of several counts. The variable
of --probe-timeout is PROBE_TIMEOUT, and so on; some flags have another one, which then comes first,
and four settings have no flag at all. ENVOY_PORT is one that older versions of it read, and the
last ones pass over.

What it passes over, a word that is no flag, is refused here. What the values mean is the affair of
invocation.py. Pure.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tproxyd.errors import Problem


class Flag(NamedTuple):
    name: str
    short: str
    help: str
    switch: bool = False
    also: tuple[str, ...] = ()  # variables that come before the one made from its name

    @property
    def variables(self) -> tuple[str, ...]:
        return (*self.also, self.name.upper().replace("-", "_"))


FLAGS = (
    Flag("envoy-port", "p", "where outbound TCP goes (15001)"),
    Flag("inbound-capture-port", "z", "where inbound TCP goes (15006)"),
    Flag("inbound-tunnel-port", "e", "the port of tunnels, which comes in as it is (15008)"),
    Flag("proxy-uid", "u", "users whose traffic is left alone (that of ENVOY_USER, or 1337)"),
    Flag("proxy-gid", "g", "groups whose traffic is left alone (the numbers of -u)"),
    Flag("istio-inbound-interception-mode", "m", "REDIRECT or TPROXY (REDIRECT)"),
    Flag("istio-inbound-ports", "b", 'inbound ports that are taken; "*": all (none)'),
    Flag("istio-local-exclude-ports", "d", "inbound ports that are not"),
    Flag("istio-exclude-interfaces", "c", "interfaces that are left alone"),
    Flag("istio-service-cidr", "i", 'outbound ranges that are taken; "*": all (none)'),
    Flag("istio-service-exclude-cidr", "x", "outbound ranges that are not"),
    Flag("istio-outbound-ports", "q", "outbound ports that are taken wherever they go"),
    Flag("istio-local-outbound-ports-exclude", "o", "outbound ports that are not"),
    Flag("kube-virt-interfaces", "k", "interfaces whose inbound traffic is outbound"),
    Flag("istio-inbound-tproxy-mark", "t", "the mark, decimal or 0x… (1337)"),
    Flag("istio-inbound-tproxy-route-table", "r", "the routing table (133)"),
    Flag("dry-run", "n", "print rules and routes, touch nothing", switch=True),
    Flag("iptables-probe-port", "", "the port that --run-validation connects to (15002)"),
    Flag("probe-timeout", "", "how long --run-validation tries (5s)"),
    Flag("skip-rule-apply", "", "leave the rules as they are", switch=True),
    Flag("run-validation", "", "try a connection through the rules", switch=True),
    Flag(
        "redirect-dns",
        "",
        "take DNS queries to the servers in /etc/resolv.conf",
        switch=True,
        also=("ISTIO_META_DNS_CAPTURE",),
    ),
    Flag(
        "drop-invalid",
        "",
        "drop packets that conntrack calls invalid",
        switch=True,
        also=("INVALID_DROP",),
    ),
    Flag(
        "dual-stack",
        "",
        "both families, which is what happens in any case",
        switch=True,
        also=("ISTIO_DUAL_STACK",),
    ),
    Flag("capture-all-dns", "", "with --redirect-dns: queries to any server", switch=True),
    Flag("network-namespace", "", "the path of the network namespace to work in"),
    Flag("cni-mode", "", "the file system is the host's, not the pod's", switch=True),
    Flag("reconcile", "", "=false: fail when other rules stand there", switch=True),
    Flag("cleanup-only", "", "remove everything; no other flag is needed", switch=True),
    Flag("force-apply", "", "what differs is written in any case", switch=True),
    Flag("native-nftables", "", "with nft instead of iptables", switch=True),
    Flag("force-iptables-binary", "", "which iptables, nft or legacy (what the host has)"),
    Flag("log_output_level", "", "[SCOPE:]LEVEL,… none, error, warn, info, debug (info)"),
    Flag("log_as_json", "", "say everything as JSON lines", switch=True),
    Flag("help", "h", "this", switch=True),
)
VARIABLES = {  # that have no flag
    "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR": "what counts as this host talking to itself"
    " (127.0.0.1/32)",
    "ISTIO_OUTBOUND_OWNER_GROUPS": 'groups whose outbound traffic is taken; "*": all (*)',
    "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE": "groups whose is not",
    "ENVOY_USER": "the user of the proxy, where -u is not given (istio-proxy)",
}
# Log flags are the program's own, not bound to variables.
_NO_VARIABLE = {"log_output_level", "log_as_json", "help"}

# Flags of that tool, or of older ones, that ask for what we don't do.
REFUSED = {
    "iptables-trace-logging": "no rule here writes a log; see nft monitor trace, and nfacct",
    "restore-format": "--dry-run prints what iptables-restore reads, and nothing else",
    "output-paths": "--dry-run prints the rules; redirect its output to a file",
    "host-nsenter-exec": "--network-namespace is entered without another program",
    "clean": "this is called --cleanup-only",
    "log_target": "messages go to stdout, errors to stderr; redirect them",
    "log_caller": "messages carry no place in the source",
    "log_stacktrace_level": "messages carry no stack",
    "log_rotate": "messages go to stdout, errors to stderr; redirect them",
    "log_rotate_max_age": "no file is written",
    "log_rotate_max_backups": "no file is written",
    "log_rotate_max_size": "no file is written",
    "vklog": "there is no klog here",
}


class Given(NamedTuple):
    origin: str  # as the user knows it: "-p", "ENVOY_PORT"
    text: str


def given(
    argv: Sequence[str], environ: Mapping[str, str], problems: list[Problem]
) -> dict[str, Given]:
    """Every setting that is not left to its default, by the long name of its flag."""
    values = {each: Given(each, environ[each]) for each in VARIABLES if each in environ}
    for flag in FLAGS:
        if flag.name not in _NO_VARIABLE:
            for variable in reversed(flag.variables):
                # An empty variable is one that is not set, as in a manifest with value: "".
                if environ.get(variable):
                    values[flag.name] = Given(variable, environ[variable])
    return values | {name: Given(_spelled(name), text) for name, text in _flags(argv, problems)}


def usage() -> str:
    lines = [
        "usage: istio-iptables [FLAG]…",
        "",
        "Make the interception that istio-iptables makes: rules and routes, and only where they",
        "differ from what is there. Lists have commas. Every flag can be given as a variable.",
        "",
    ]
    for flag in FLAGS:
        short = f"-{flag.short}, " if flag.short else "    "
        lines.append(f"  {short}--{flag.name}")
        lines.append(f"          {flag.help}")
        if flag.name not in _NO_VARIABLE:
            lines.append(f"          ${', $'.join(flag.variables)}")
    lines += ["", "Variables without a flag:"]
    for variable, what in VARIABLES.items():
        lines += [f"  {variable}", f"          {what}"]
    lines += [
        "",
        "Exit codes: 0 fine; 1 other rules stand there; 2 usage; 3 the kernel refused;",
        "126 the validation failed.",
    ]
    return "\n".join(lines) + "\n"


# Words on the command line ------------------------------------------------------------------------


_BY_NAME = {flag.name: flag for flag in FLAGS}
_BY_SHORT = {flag.short: flag for flag in FLAGS if flag.short}


def _spelled(name: str) -> str:
    short = _BY_NAME[name].short
    return f"-{short}" if short else f"--{name}"


def _flags(argv: Sequence[str], problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """(name, value) of every flag, as pflag finds them."""
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            problems.extend(Problem(each, _NO_FLAG) for each in rest)
            return
        if word.startswith("--"):
            yield from _long(word[2:], rest, problems)
        elif len(word) > 1 and word.startswith("-"):
            yield from _short(word[1:], rest, problems)
        else:
            problems.append(Problem(word, _NO_FLAG))


_NO_FLAG = (
    'is not a flag; a switch takes its value behind "=", and the shell expands a * without quotes'
)


def _long(word: str, rest: list[str], problems: list[Problem]) -> Iterator[tuple[str, str]]:
    name, equals, value = word.partition("=")
    flag = _BY_NAME.get(name)
    if flag is None:
        problems.append(Problem(f"--{name}", _unknown(name)))
        if name in REFUSED and not equals and rest and not rest[0].startswith("-"):
            rest.pop(0)
    elif equals:
        yield name, value
    else:
        yield from _with_next(flag, f"--{name}", rest, problems)


def _short(word: str, rest: list[str], problems: list[Problem]) -> Iterator[tuple[str, str]]:
    while word:
        letter, word = word[0], word[1:]
        flag = _BY_SHORT.get(letter)
        if flag is None:
            problems.append(Problem(f"-{letter}", "there is no such flag; see --help"))
            return
        if len(word) > 1 and word.startswith("="):
            yield flag.name, word[1:]
            return
        if not flag.switch and word:
            yield flag.name, word
            return
        yield from _with_next(flag, f"-{letter}", rest, problems)


def _with_next(
    flag: Flag, spelled: str, rest: list[str], problems: list[Problem]
) -> Iterator[tuple[str, str]]:
    if flag.switch:
        yield flag.name, "true"
    elif rest:
        yield flag.name, rest.pop(0)
    else:
        problems.append(Problem(spelled, "needs a value"))


def _unknown(name: str) -> str:
    if name in REFUSED:
        return f"is not supported: {REFUSED[name]}"
    near = difflib.get_close_matches(name, _BY_NAME, n=1)
    return f"there is no such flag; {f'did you mean --{near[0]}?' if near else 'see --help'}"
