"""A program's commands in, its completion for fish out: one line for each command, flag and argument."""

from __future__ import annotations

from collections.abc import Iterator

from pixtral_cli.cli.completions import Values
from pixtral_cli.cli.completions.program import Command, Flag

HEAD = r"""# Tab completion of pixtral for fish, written by `pixtral completions fish`.
# Its place: ~/.config/fish/completions/pixtral.fish

function __pixtral_words
    string match --invert -- '-*' (commandline -opc)[2..]
end

# Whether the words before the cursor that are no flags are these, and no others.
function __pixtral_only
    set -l words (__pixtral_words)
    test "$words" = "$argv"
end

# Whether they begin with these.
function __pixtral_in
    set -l words (__pixtral_words)
    set words $words[1..(count $argv)]
    test "$words" = "$argv"
end

# What only the program knows: models, devices. (After the tab would come a description.)
function __pixtral_ask
    set -l program (string replace -r '^~/' $HOME/ -- (commandline -opc)[1])
    $program completions $argv 2>/dev/null | string replace -r '$' \t
end

# Folders, and files with one of the endings; all files where no ending is given, or nothing fits. The ending / is no
# file's: folders only.
function __pixtral_files
    set -l typed (string replace -r -- '^--[^=]*=' '' (commandline -ct))
    set -l here (complete -C "'' $typed" | string replace -r '\t.*' '')
    set -l fitting $here
    if set -q argv[1]
        set fitting (string match -ri -- '^.*(?:/|\.(?:'(string join '|' $argv)'))$' $here)
        set -q fitting[1]; or test $argv[1] = /; or set fitting $here
    end
    string replace -r '$' \t -- $fitting
end

complete -c pixtral -f
"""


def script(program: Command) -> str:
    return HEAD + "".join(f"{line}\n" for command in program.walk() for line in _lines(command))


def _lines(command: Command) -> Iterator[str]:
    yield ""
    test = "__pixtral_only" if command.commands else "__pixtral_in"
    at = f"complete -c pixtral -n {_quote(' '.join((test, *command.path[1:])))}"
    for below in command.commands:
        yield f"{at} -a {below.name} -d {_quote(below.help)}"
    for flag in command.flags:
        yield f"{at} {_flag(flag)}"
    for values in dict.fromkeys(argument.values for argument in command.arguments):
        yield f"{at} {_offers(values)}"


def _flag(flag: Flag) -> str:
    names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in flag.names]
    taken = [f"-x {_offers(flag.values)}".rstrip()] if flag.values else []
    return " ".join([*names, *taken, f"-d {_quote(flag.help)}"])


def _offers(values: Values) -> str:
    """The option of `complete` that says what is offered; nothing where there is nothing to offer."""
    offered = [f"{word}\\t" for word in values.words]
    offered += [f"(__pixtral_ask {values.listing})"] if values.listing else []
    offered += [f"({' '.join(('__pixtral_files', *values.files))})"] if values.files is not None else []
    return f"-a {_quote(' '.join(offered))}" if offered else ""


def _quote(text: str) -> str:
    """In single quotes fish takes a backslash as it is, except before a quote or another one."""
    return "'" + text.replace("'", r"\'") + "'"
