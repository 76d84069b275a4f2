"""The man page and the completions offer what the command line takes: every verb, every flag."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tproxyd import arguments, cli, environment
from tproxyd.istio.flags import FLAGS

MANUAL = Path(__file__).resolve().parents[2] / "scripts" / "lib" / "manual.py"


@cache
def made(what: str) -> str:
    argv = [sys.executable, str(MANUAL), what]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (
        each for each in cli._arguments()._actions if isinstance(each, argparse._SubParsersAction)
    )
    return dict(found.choices)


def flags(verb: str) -> set[str]:
    """Of istio-iptables, whose command line is not argparse's to read, those that it knows."""
    if verb == arguments.ISTIO_IPTABLES:
        names = {f"--{each.name}" for each in FLAGS}
        return names | {f"-{each.short}" for each in FLAGS if each.short}
    return {name for each in commands()[verb]._actions for name in each.option_strings}


VERBS = sorted(commands())


def test_there_are_some() -> None:
    assert {"run", "install", "clean", "status", "istio-iptables"} <= set(VERBS)
    assert {"-c", "--config", "--install"} <= flags("run")
    assert {"-u", "--proxy-uid"} <= flags("istio-iptables")


# The man page -------------------------------------------------------------------------------------


def section(verb: str) -> str:
    text = made("man").replace(r"\-", "-")
    (found,) = re.findall(rf"^\.SS {verb}(?: [^\n]*)?\n(.*?)(?=^\.S[SH])", text, re.M | re.S)
    return re.sub(r"\\f[BIR]", "", found)


@pytest.mark.parametrize("verb", VERBS)
def test_the_page_has_every_flag(verb: str) -> None:
    tags = re.findall(r"^\.TP\n(-.*)$", section(verb), re.M)
    assert {name for tag in tags for name in re.findall(r"(?:^|, )(--?[\w-]+)", tag)} == flags(verb)


def test_the_page_has_no_other_verb() -> None:
    text = made("man").replace(r"\-", "-")
    assert sorted(re.findall(r"^\.SS ([\w-]+)", text, re.M)) == VERBS


def test_the_page_has_every_variable() -> None:
    told = set(re.findall(r"^\.B (TPROXYD_\w+)$", made("man"), re.M))
    assert told == {environment.FILE, *environment.VARIABLES}


def test_names_begin_as_they_are_spelled() -> None:
    assert re.findall(r"\b(?:Nft|Iptables|Tproxyd|Ip)\b", made("man")) == []


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff; try: apt-get install groff")
def test_the_page_is_clean() -> None:
    argv = ["groff", "-man", "-Tutf8", "-ww", "-rLL=100n"]
    done = subprocess.run(argv, input=made("man"), capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "a transparent TCP proxy" in done.stdout


# Completions --------------------------------------------------------------------------------------

ASK_BASH = """
COMP_WORDS=(tproxyd "$@") COMP_CWORD=$#
_tproxyd tproxyd "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def bash(*words: str) -> set[str]:
    argv = ["bash", "-c", made("bash") + ASK_BASH, "bash", *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize("verb", VERBS)
def test_bash_offers_every_flag(verb: str) -> None:
    assert bash(verb, "") == flags(verb)
    some = max(flags(verb))
    assert some in bash(verb, some[:-1])


def test_bash_offers_every_verb() -> None:
    assert bash("") == {*VERBS, "--help", "--version"}
    assert bash("ins") == {"install"}


@pytest.mark.parametrize("words", [("--backend", ""), ("--backend", "="), ("--backend", "=", "")])
def test_bash_offers_values(words: tuple[str, ...]) -> None:
    assert bash("rules", *words) == {"auto", "nft", "iptables-nft", "iptables-legacy"}
    assert bash("rules", "-c", "") == set()  # a file: bash's own


def test_bash_leaves_a_command_alone() -> None:
    assert bash("exec", "--", "ls", "--") == set()


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish; try: apt-get install fish")
def test_fish_offers_it_all() -> None:
    asked = "".join(f"complete -C 'tproxyd {verb} -'; echo ---\n" for verb in VERBS)
    script = f"{made('fish')}\ncomplete -C 'tproxyd '; echo ---\n{asked}"
    done = subprocess.run(["fish", "-N"], input=script, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    verbs, *offered = [
        {line.split("\t")[0] for line in part.splitlines() if line}
        for part in done.stdout.split("---\n")
    ]
    assert set(VERBS) <= verbs
    for verb, names in zip(VERBS, offered, strict=False):
        # Long ones as they are, short ones for which there is a long one only without it.
        assert {name for name in flags(verb) if name.startswith("--")} <= names, verb


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh; try: apt-get install zsh")
def test_zsh_reads_it() -> None:
    done = subprocess.run(["zsh", "-n"], input=made("zsh"), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("verb", VERBS)
def test_zsh_offers_every_flag(verb: str) -> None:
    (line,) = re.findall(rf"^ +{verb}\) _arguments (.*) '\*:file:_files' ;;$", made("zsh"), re.M)
    bare = re.sub(r"'(?:[^']|'\\'')*'", " ", line)  # without the descriptions
    assert set(re.findall(r"(?<![\w-])--?[\w-]+", bare)) == flags(verb)
    assert re.search(rf"^ +'{verb}:", made("zsh"), re.M)
