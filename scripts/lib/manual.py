"""The man page and the shell completions, from the command line: `manual.py man|bash|zsh|fish`.

scripts/install runs this with the Python that has tproxyd. So they can't fall behind: every verb
and flag is argparse's (of istio-iptables, whose command line is its own, those of istio/flags.py).
What argparse does not know, files, signals and the systemd units, is in scripts/man/tproxyd.8.
"""

from __future__ import annotations

import argparse
import sys
from itertools import starmap
from pathlib import Path
from typing import NamedTuple

from tproxyd import __version__, cli, environment
from tproxyd.arguments import ISTIO_IPTABLES
from tproxyd.istio.flags import FLAGS

PAGE = Path(__file__).resolve().parents[1] / "man" / "tproxyd.8"
_COMMANDS = '.\\" the commands stand here\n'
_VARIABLES = '.\\" the variables stand here\n'


class Option(NamedTuple):
    names: tuple[str, ...]  # the short one first
    value: str  # "" of a switch
    help: str
    choices: tuple[str, ...] = ()


class Verb(NamedTuple):
    name: str
    help: str
    options: tuple[Option, ...]
    operands: str  # as usage shows them


def verbs() -> list[Verb]:
    parser = cli._arguments()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {each.dest: each.help or "" for each in commands._choices_actions}
    return [_verb(name, helps[name], each) for name, each in commands.choices.items()]


def _verb(name: str, what: str, parser: argparse.ArgumentParser) -> Verb:
    if name == ISTIO_IPTABLES:
        return Verb(name, what, tuple(_istio_options()), "")
    options = tuple(_option(each) for each in parser._actions if each.option_strings)
    operands = [each for each in parser._actions if not each.option_strings]
    return Verb(name, what, options, " ".join(_operand(each) for each in operands))


def _option(action: argparse.Action) -> Option:
    names = tuple(sorted(action.option_strings, key=len))
    choices = tuple(map(str, action.choices or ()))
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    return Option(names, "|".join(choices) or value, _help(action), choices)


def _operand(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest.upper())
    return {"+": f"{name} ...", "*": f"[{name} ...]", "?": f"[{name}]"}.get(str(action.nargs), name)


def _help(action: argparse.Action) -> str:
    assert action.help, f"{action.option_strings} is not explained"
    return str(argparse.HelpFormatter("tproxyd")._expand_help(action))


def _istio_options() -> list[Option]:
    found = []
    for flag in FLAGS:
        names = (*([f"-{flag.short}"] if flag.short else []), f"--{flag.name}")
        found.append(Option(names, "" if flag.switch else "VALUE", flag.help))
    return found


# The man page -------------------------------------------------------------------------------------


def man() -> str:
    page = PAGE.read_text()
    page = page.replace("@version@", __version__)
    for here, text in (
        (_COMMANDS, "".join(map(_section, verbs()))),
        (_VARIABLES, "".join(starmap(_variable, environment.VARIABLES.items()))),
    ):
        assert here in page
        page = page.replace(here, text)
    return page


def _variable(name: str, meaning: tuple[tuple[str, ...], object]) -> str:
    path = meaning[0]
    where = ", of the listener that takes connections to this host"
    if path[0] == environment.LISTENER:
        return f".TP\n.B {name}\n{_roff('.'.join(path[1:]))}{where}\n"
    return f".TP\n.B {name}\n{_roff('.'.join(path))}\n"


def _section(verb: Verb) -> str:
    head = f".SS {_roff(verb.name)} {_roff(verb.operands)}".rstrip() + "\n"
    text = f"{_roff(_sentence(verb.help))}\n"
    options = "".join(
        f".TP\n{_tags(each)}\n{_roff(_sentence(each.help))}\n" for each in verb.options
    )
    return head + text + options


def _tags(option: Option) -> str:
    names = r"\fR, \fB".join(map(_roff, option.names))
    value = rf" \fI{_roff(option.value)}\fR" if option.value else ""
    return rf"\fB{names}\fR{value}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _roff(text: str) -> str:
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("…", "...")
    return rf"\&{text}" if text[:1] in (".", "'") else text


# Completions --------------------------------------------------------------------------------------


def bash() -> str:
    names = [each.name for each in verbs()]
    words, values = [], []
    for verb in verbs():
        flags = " ".join(name for option in verb.options for name in option.names)
        words.append(f'        {verb.name}) words="{flags}" ;;\n')
        for option in verb.options:
            if option.value:
                these = " ".join(option.choices)
                pattern = " | ".join(f"{verb.name}:{name}" for name in option.names)
                values.append(f'        {pattern}) words="{these}" ;;\n')
    return f"""# Completion of tproxyd for bash.
_tproxyd() {{
    local word="$2" before="$3" verb="" words="" i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$verb${{COMP_WORDS[i]}}" in
        {" | ".join(names)}) verb="${{COMP_WORDS[i]}}" ;;
        *--) [[ ${{COMP_WORDS[i]}} != "--" ]] || return ;; # what follows is a program's
        esac
    done
    [[ $before == "=" ]] && before="${{COMP_WORDS[COMP_CWORD - 2]}}"
    [[ $word == "=" ]] && word=""
    case "$verb:$before" in  # the value of an option; where it has none to offer, a file
{"".join(values)}        *) case "$verb" in
        "") words="{" ".join([*names, "--help", "--version"])}" ;;
{"".join(words)}        esac ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}}
complete -o default -F _tproxyd tproxyd
"""


def zsh() -> str:
    described = "\n".join(f"        {_quoted(f'{each.name}:{each.help}')}" for each in verbs())
    cases = "".join(
        f"            {verb.name}) _arguments {' '.join(map(_zsh_option, verb.options))}"
        f" '*:file:_files' ;;\n"
        for verb in verbs()
    )
    return f"""#compdef tproxyd
_tproxyd() {{
    local state line
    local -a commands
    commands=(
{described}
    )
    _arguments -C '(- *)'{{-h,--help}}'[help]' '(- *)--version[the version]' \\
        '1:command:->command' '*::argument:->argument'
    case $state in
    command) _describe command commands ;;
    argument)
        case $words[1] in
{cases}        esac ;;
    esac
}}
_tproxyd "$@"
"""


def _zsh_option(option: Option) -> str:
    text = option.help
    for character in "[]:":
        text = text.replace(character, f"\\{character}")
    names = option.names[0] if len(option.names) == 1 else f"{{{','.join(option.names)}}}"
    value = ""
    if option.value:
        value = f":value:({' '.join(option.choices)})" if option.choices else ":value:_files"
    rest = _quoted(f"[{text}]{value}")
    return names + rest


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def fish() -> str:
    lines = ["# Completion of tproxyd for fish."]
    lines += [f"complete -c tproxyd -n __fish_use_subcommand -l {o}" for o in ("help", "version")]
    for verb in verbs():
        lines.append(
            f"complete -c tproxyd -n __fish_use_subcommand -f -a {verb.name}"
            f" -d {_fish_quoted(verb.help)}"
        )
        for option in verb.options:
            flags = "".join(
                f" -l {name[2:]}" if name.startswith("--") else f" -s {name[1:]}"
                for name in option.names
            )
            value = " -r" if option.value else ""
            if option.choices:
                value = f" -x -a {_fish_quoted(' '.join(option.choices))}"
            lines.append(
                f"complete -c tproxyd -n '__fish_seen_subcommand_from {verb.name}'{flags}{value}"
                f" -d {_fish_quoted(option.help)}"
            )
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


if __name__ == "__main__":
    made = {"man": man, "bash": bash, "zsh": zsh, "fish": fish}
    sys.stdout.write(made[sys.argv[1]]())
