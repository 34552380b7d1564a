"""A program's commands in, its completion for zsh out: one function for each command, drawn by zsh's `_arguments`."""

from __future__ import annotations

import re
from shlex import quote

from pixtral_cli.cli.completions import FOLDERS, Values
from pixtral_cli.cli.completions.program import Argument, Command, Flag

HEAD = """\
#compdef pixtral
# Tab completion of pixtral for zsh, written by `pixtral completions zsh`.
# Put this in ~/.zshrc, after compinit:  source <(pixtral completions zsh)
# or this file, under the name _pixtral, into a folder of $fpath.

# Offers what only the program knows: models, devices.
_pixtral_ask() {
    local expl
    local -a answers=(${(f)"$(_call_program $1 $_pixtral_program completions $1 2>/dev/null)"})
    _wanted $1 expl $1 compadd -a answers
}

# Offers what only the program knows, and files.
_pixtral_ask_or_files() {
    local asked=$1
    shift
    _alternative "$asked:$asked: _pixtral_ask $asked" "files:file:_files ${(j: :)${(@q)@}}"
}

"""
TAIL = """\
if [[ $funcstack[1] == _pixtral ]]; then
    _pixtral "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
    compdef _pixtral pixtral
fi
"""


def script(program: Command) -> str:
    functions = (_group(command) if command.commands else _leaf(command) for command in program.walk())
    return HEAD + "\n".join(functions) + "\n" + TAIL


def _name(command: Command) -> str:
    return "_" + "_".join(command.path)


def _leaf(command: Command) -> str:
    return f"{_name(command)}() {{\n    _arguments -s -S{_specs(command)}\n}}\n"


def _group(command: Command) -> str:
    """A command that has others below it, to one of which it hands over."""
    described = "".join(f"\n        {quote(_escaped(each.name) + ':' + each.help)}" for each in command.commands)
    handed = "".join(f"\n        {each.name}) {_name(each)} ;;" for each in command.commands)
    first = "    local _pixtral_program=$words[1]\n" if len(command.path) == 1 else ""
    return f"""\
{_name(command)}() {{
{first}    local curcontext=$curcontext state line
    local -a commands=({described}
    )
    _arguments -C -s{_specs(command)} \\
        '1: :->command' '*:: :->below' && return
    case $state in
    command) _describe -t commands 'command' commands ;;
    below)
        case $line[1] in{handed}
        esac
        ;;
    esac
}}
"""


def _specs(command: Command) -> str:
    found = [*map(_flag, command.flags), *(_argument(each) for each in command.arguments)]
    return "".join(f" \\\n        {spec}" for spec in found)


def _flag(flag: Flag) -> str:
    """`'(-p --prompt)'{-p+,--prompt=}'[what it is]:TEXT:'`, as `_arguments` reads it."""
    names = [name + ("" if not flag.values else "=" if name.startswith("--") else "+") for name in flag.names]
    alone = "- *" if "--help" in flag.names or "--version" in flag.names else " ".join(flag.names)
    before = "'*'" if flag.repeatable else f"'({alone})'"
    spelt = "{" + ",".join(names) + "}" if len(names) > 1 else names[0]
    rest = f"[{_escaped(flag.help)}]" + (f":{_escaped(flag.metavar)}:{_action(flag.values)}" if flag.values else "")
    return before + spelt + quote(rest)


def _argument(argument: Argument) -> str:
    return quote(f"{'*' if argument.repeatable else ''}:{_escaped(argument.metavar)}:{_action(argument.values)}")


def _action(values: Values) -> str:
    if values.words:
        return f"({' '.join(values.words)})"
    files = _files(values)
    if values.listing and values.files is not None:
        return f" _pixtral_ask_or_files {values.listing} {files}".rstrip()
    if values.listing:
        return f" _pixtral_ask {values.listing}"
    return f"_files {files}".rstrip() if values.files is not None else " "


def _files(values: Values) -> str:
    """Flags of `_files`; whatever the endings, it offers folders, and all files where nothing fits."""
    if values.files == FOLDERS:
        return "-/"
    return f'-g "(#i)*.({"|".join(values.files)})(-.)"' if values.files else ""


def _escaped(text: str) -> str:
    return re.sub(r"([\\:\[\]])", r"\\\1", text)
