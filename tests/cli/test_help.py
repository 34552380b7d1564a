"""Help, version and completion: complete, and light enough for every press of Tab."""

from importlib import import_module
from importlib.metadata import version
from pkgutil import iter_modules

import pytest
from support.processes import PROGRAM, imported_by, run_process

FLAGS = """--model-path --weight-path --weights-format --quantize-vision --quantization-encoding --devices
--max-length --max-new-tokens --max-batch-size
--max-ce-batch-size --top-k --temperature --top-p --min-p --repetition-penalty --seed --stop --force-download
--trust-remote-code --save-to-serialized-model-path --serialized-model-path -p --prompt -i --image --system --raw
--messages --image-preprocessing --json --quiet --stats --logprobs --ignore-eos""".split()


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["--help"], ["--version"], ["run", "--top-k", "x"]),
        *([command, "--help"] for command in ("run", "serve", "tokenize", "bench")),
    ],
)
def test_help_version_and_usage_errors_import_nothing_heavy(arguments):
    assert imported_by(*arguments) == []


def test_completion_imports_nothing_heavy():
    assert imported_by(_PIXTRAL_COMPLETE="complete_bash", COMP_WORDS="pixtral run --", COMP_CWORD="2") == []


def test_help_of_run_has_every_flag_whole(program):
    text = program("run", "--help", env={"COLUMNS": "40"}).stdout.decode()
    assert [flag for flag in FLAGS if flag not in text.replace(",", " ").split()] == []


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["run", "-h"], ["tokenize", "--help"]])
def test_help_goes_to_standard_output_and_succeeds(program, arguments):
    done = program(*arguments)
    assert done.returncode == 0 and b"Usage: pixtral" in done.stdout and done.stderr == b""


def test_help_into_a_pipe_has_no_terminal_codes(program):
    assert b"\x1b" not in program("run", "--help").stdout


def test_version_is_the_packages_version(program):
    assert program("--version").stdout.decode() == f"pixtral {version('pixtral-cli')}\n"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (
            "pixtral ",
            {"run", "serve", "tokenize", "download", "export", "verify", "cache", "inspect", "bench", "completions"},
        ),
        ("pixtral run --quantization-encoding q4", {"q4_0", "q4_k"}),
        ("pixtral run --image-preprocessing ", {"hf", "native"}),
        ("pixtral run --model-path t", {"tiny"}),
        ("pixtral run --max-new", {"--max-new-tokens"}),
    ],
)
def test_tab_offers_what_fits(words, offered):
    number = len(words.split()) - (0 if words.endswith(" ") else 1)
    environment = {"_PIXTRAL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
    assert set(run_process(PROGRAM, [], env=environment).stdout.decode().split()) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_printed_for_each_shell(shell):
    done = run_process(PROGRAM, [], env={"_PIXTRAL_COMPLETE": f"source_{shell}"})
    assert done.returncode == 0 and b"_PIXTRAL_COMPLETE" in done.stdout


def test_every_file_of_a_command_is_a_command():
    from typer.main import get_command

    from pixtral_cli import commands
    from pixtral_cli.cli.main import app

    modules = {name: import_module(f"{commands.__name__}.{name}") for _, name, _ in iter_modules(commands.__path__)}
    wanted = {name for name, module in modules.items() if hasattr(module, "EXAMPLES")}
    assert set(get_command(app).commands) == wanted and len(wanted) > 8
