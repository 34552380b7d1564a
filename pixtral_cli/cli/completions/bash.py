"""A program's commands in, its completion for bash out: one function that needs nothing but bash 4.3 itself."""

from __future__ import annotations

from collections.abc import Iterator
from shlex import quote

from pixtral_cli.cli.completions import Values
from pixtral_cli.cli.completions.program import Command

HEAD = r"""# Tab completion of pixtral for bash, written by `pixtral completions bash`.
# Put this in ~/.bashrc:  source <(pixtral completions bash)

# The line up to the cursor, word by word and without quoting, into `words`. `open` is the quote that is still open;
# `kept` counts the letters of the last word that bash leaves alone: those up to the last of its word breaks (= : @).
_pixtral_split() {
    local line=${COMP_LINE:0:COMP_POINT} char word= begun= i
    words=() open= kept=0
    for ((i = 0; i < ${#line}; i++)); do
        char=${line:i:1}
        if [[ $char == \\ && $open != \' ]]; then
            ((++i))
            word+=${line:i:1} begun=1
        elif [[ -n $open ]]; then
            if [[ $char == "$open" ]]; then open=; else word+=$char; fi
        elif [[ $char == [\'\"] ]]; then
            open=$char begun=1
        elif [[ $char == [[:space:]] ]]; then
            [[ -n $begun ]] && words+=("$word")
            word= begun= kept=0
        else
            word+=$char begun=1
            [[ $COMP_WORDBREAKS != *"$char"* ]] || kept=${#word}
            [[ $char != @ ]] || ((kept > 0 && kept--))  # which goes with what follows
        fi
    done
    words+=("$word")
}

# Offers those of the words that begin as the word at the cursor does.
_pixtral_offer() {
    local word
    for word; do
        [[ $word == "$current"* ]] || continue
        word=$before$word
        word=${word:kept}
        [[ -n $open ]] || printf -v word %q "$word"
        COMPREPLY+=("$word")
    done
}

# Offers what only the program knows: models, devices.
_pixtral_ask() {
    local answers
    mapfile -t answers < <("${program/#~\//$HOME/}" completions "$1" 2>/dev/null)
    _pixtral_offer "${answers[@]}"
}

# Offers folders, and files with one of the endings; all files where no ending is given, or nothing fits. The ending /
# is no file's: folders only.
_pixtral_files() {
    local path ending here=() fitting=() typed=$current
    [[ $typed == '~/'* ]] && typed=$HOME/${typed:2}
    while IFS= read -r -d '' path; do
        [[ -n $path ]] || continue
        here+=("$path")
        [[ -d $path || $# == 0 ]] && fitting+=("$path")
        for ending; do
            [[ ! -d $path && ${path,,} == *."$ending" ]] && fitting+=("$path")
        done
    done < <(shopt -u failglob; shopt -s nullglob; printf '%s\0' "$typed"*)
    ((${#fitting[@]})) || [[ $1 == / ]] || fitting=("${here[@]}")
    ((${#fitting[@]})) && compopt -o filenames 2>/dev/null
    for path in "${fitting[@]}"; do
        path=$before$path
        COMPREPLY+=("${path:kept}")
    done
}

_pixtral() {
    local program=$1 words open kept current before= path=pixtral commands flags valued flag= ended= place=0 word
    COMPREPLY=()
    _pixtral_split
    current=${words[${#words[@]} - 1]}
    _pixtral_command
    for word in "${words[@]:1:${#words[@]}-2}"; do
        if [[ -n $flag ]]; then
            flag=
        elif [[ $word == -- ]]; then
            ended=1
        elif [[ -z $ended && $word == -?* ]]; then
            [[ " $valued " == *" $word "* ]] && flag=$word
        elif [[ " $commands " == *" $word "* ]]; then
            path+=" $word"
            _pixtral_command
        else
            ((++place))
        fi
    done
    if [[ -z $flag && -z $ended && $current == --*=* ]]; then
        flag=${current%%=*} before=$flag= current=${current#*=}
    fi
    if [[ -n $flag ]]; then
        _pixtral_value "$path $flag"
    elif [[ -z $ended && $current == -* ]]; then
        _pixtral_offer $flags
    else
        _pixtral_offer $commands
        _pixtral_value "$path $place"
        [[ -z $current && -z $ended && ${#COMPREPLY[@]} == 0 ]] && _pixtral_offer $flags
    fi
}

"""
TAIL = "complete -F _pixtral pixtral\n"


def script(program: Command) -> str:
    return HEAD + _commands(program) + "\n" + _values(program) + "\n" + TAIL


def _commands(program: Command) -> str:
    """What can follow each command, and which of the flags take a value."""
    cases = []
    for command in program.walk():
        flags = [name for flag in command.flags for name in flag.names]
        valued = [name for flag in command.flags if flag.values for name in flag.names]
        below = [each.name for each in command.commands]
        words = {"commands": below, "flags": flags, "valued": valued}
        assigned = "".join(f"\n        {name}={quote(' '.join(found))}" for name, found in words.items())
        cases.append(f"    {quote(' '.join(command.path))}){assigned}\n        ;;\n")
    return f"_pixtral_command() {{\n    case $path in\n{''.join(cases)}    esac\n}}\n"


def _values(program: Command) -> str:
    """What to do for the value of a flag, or for an argument by its place: one case for all that take the same."""
    places: dict[str, list[str]] = {}
    for command in program.walk():
        for place, values in _takers(command):
            places.setdefault(_offers(values), []).append(place)
    alternatives = {offers: " |\\\n        ".join(found) for offers, found in places.items() if offers}
    cases = [f"    {found})\n        {offers}\n        ;;\n" for offers, found in alternatives.items()]
    return f"_pixtral_value() {{\n    case $1 in\n{''.join(cases)}    esac\n}}\n"


def _takers(command: Command) -> Iterator[tuple[str, Values]]:
    """Patterns of the command and the flag, or the number of the argument, and what is offered there."""
    path = " ".join(command.path)
    for flag in command.flags:
        if flag.values:
            yield from ((quote(f"{path} {name}"), flag.values) for name in flag.names)
    for number, argument in enumerate(command.arguments):
        yield quote(f"{path} ") + "*" if argument.repeatable else quote(f"{path} {number}"), argument.values


def _offers(values: Values) -> str:
    done = [f"_pixtral_offer {' '.join(map(quote, values.words))}"] if values.words else []
    done += [f"_pixtral_ask {values.listing}"] if values.listing else []
    if values.files is not None:
        done.append(" ".join(["_pixtral_files", *values.files]))
    return "\n        ".join(done)
