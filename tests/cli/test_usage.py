"""Command lines that cannot be meant: exit code 2 (or 1 for what does not work yet), one sentence, a way out."""

import json
from inspect import signature

import pytest
from support.processes import imported_by

from pixtral_cli.encoding_choices import CHOICES


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max-length", "0"),
        ("--max-length", "many"),
        ("--max-new-tokens", "0"),
        ("--max-new-tokens", "-2"),
        ("--max-batch-size", "0"),
        ("--max-ce-batch-size", "-1"),
        ("--top-k", "-2"),
        ("--temperature", "-0.1"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--top-p", "-0.1"),
        ("--top-p", "1.01"),
        ("--top-p", "nan"),
        ("--min-p", "-0.1"),
        ("--min-p", "1.1"),
        ("--repetition-penalty", "0"),
        ("--repetition-penalty", "1001"),
        ("--repetition-penalty", "inf"),
        ("--seed", str(-(2**63))),
        ("--stop", ""),
        ("--devices", "cuda:0"),
        ("--quantization-encoding", "q5_k"),
        ("--image-preprocessing", "opencv"),
        ("--no-such-flag", "1"),
    ],
)
def test_a_value_out_of_range_names_its_flag(refused, flag, value):
    err = refused("run", "-p", "hi", flag, value, code=2)
    assert flag in err and "pixtral run --help" in err


def test_what_switches_an_option_off_in_python_does_so_here(fake):
    given = {"top_k": -1, "top_p": 0.0, "seed": -1}
    flags = [word for name, value in given.items() for word in ("--" + name.replace("_", "-"), str(value))]
    taken = json.loads(json.loads(fake("run", "-p", "options", "--json", *flags).stdout)["text"])
    assert {name: taken[name] for name in given} == given


def test_an_unknown_encoding_lists_the_known_ones(refused):
    err = refused("run", "-p", "hi", "--quantization-encoding", "int8", code=2)
    assert all(name in err for name in CHOICES)


@pytest.mark.parametrize(
    "other", [["--model-path", "tiny"], ["--weight-path", "x"], ["--weights-format", "hf"], ["--force-download"]]
)
def test_a_serialized_model_is_the_whole_model(refused, other):
    flags = ["--serialized-model-path", "model.pixtral", *other]
    assert "--serialized-model-path" in refused("run", "-p", "hi", *flags, code=2)


@pytest.mark.parametrize("encoding", [[], ["--quantization-encoding", "q4_k"]])
@pytest.mark.parametrize("command", [["run", "-p", "hi"], ["export", "tiny", "model.pixtral"]])
def test_double_quantisation_of_anything_but_nf4_cannot_be_meant(refused, command, encoding):
    assert "nf4" in refused(*command, "--double-quantization", *encoding, code=2)


@pytest.mark.parametrize("command", ["run", "tokenize"])
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-p", ""],
        ["-i", "x.png", "--messages", "m.json"],
        ["-p", "hi", "--messages", "m.json"],
        ["--system", "be kind", "--messages", "m.json"],
        ["--raw", "--messages", "m.json"],
        ["--raw", "--system", "be kind", "-p", "hi"],
        ["-i", "-", "-i", "-", "-p", "hi"],
    ],
)
def test_a_request_that_is_none_or_two_is_a_usage_error(refused, command, arguments):
    refused(command, *arguments, code=2)


def test_a_misspelt_command_is_a_usage_error(refused):
    assert "'run'" in refused("rum", code=2)


def test_a_picture_that_is_not_there_is_told_before_anything_is_loaded(refused, monkeypatch):
    monkeypatch.setattr("pixtral_cli.source.Source.open", None)
    assert "no/such.png" in refused("run", "--model-path", "tiny", "-i", "no/such.png", "-p", "hi")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[{", "not JSON"),
        ("\xff", "not JSON"),
        ("{}", "messages"),
        ('[{"role": "user", "content": "a"}, {"role": "oracle", "content": "b"}]', "messages[1]"),
        ('[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "sound"}]}]', "messages[0].content[1]"),
    ],
)
def test_messages_that_are_wrong_name_the_entry(refused, tmp_path, text, said):
    file = tmp_path / "messages.json"
    file.write_bytes(text.encode("latin-1"))
    assert said in refused("run", "--messages", str(file))


@pytest.mark.parametrize("command", ["run", "tokenize"])
def test_a_picture_in_messages_that_is_not_there_names_its_entry_before_anything_is_loaded(
    refused, monkeypatch, tmp_path, command
):
    monkeypatch.setattr("pixtral_cli.source.Source.open", None)
    parts = ["look: ", {"type": "image_url", "image_url": {"url": "no/such.png"}}]
    (tmp_path / "m.json").write_text(json.dumps([{"role": "user", "content": parts}]))
    err = refused(command, "--messages", str(tmp_path / "m.json"))
    assert "messages[0].content[1]: No picture at no/such.png." in err


def test_pictures_in_messages_are_opened_without_torch(tmp_path):
    file = tmp_path / "m.json"
    file.write_text('[{"role": "user", "content": [{"type": "image", "path": "no/such.png"}]}]')
    assert "torch" not in imported_by("run", "--messages", str(file))


def test_messages_nested_too_deeply_are_one_sentence(refused, tmp_path):
    (tmp_path / "m.json").write_text("[" * 100_000)
    assert "nested too deeply" in refused("run", "--messages", str(tmp_path / "m.json"))


def test_messages_without_an_end_are_refused(refused):
    assert "64 MiB" in refused("run", "--messages", "/dev/zero")


def test_an_empty_name_of_messages_is_not_left_out(refused):
    assert "--messages" in refused("run", "-p", "hi", "--messages", "", code=2)


@pytest.mark.parametrize("command", ["run", "tokenize"])
def test_a_flag_without_its_value_points_to_the_help_of_its_command(refused, command):
    assert refused(command, "-p", code=2).endswith(f"See: pixtral {command} --help\n")


@pytest.mark.parametrize("arguments", [["--top-k", "abc"], ["--top-k=abc"]])
def test_a_number_that_is_none_is_shown(call, arguments):
    assert "'abc'" in call("run", "-p", "hi", *arguments)[2].splitlines()[0]


def test_whole_numbers_in_errors_are_whole(call):
    assert "at most 9223372036854775807." in call("run", "-p", "hi", "--seed", str(2**63))[2]


def test_messages_that_are_not_there_name_the_file(refused):
    assert "no/such.json" in refused("run", "--messages", "no/such.json")


@pytest.mark.parametrize("command", ["run", "tokenize"])
def test_an_empty_name_of_a_model_is_not_the_default_one(refused, monkeypatch, command):
    """As of a variable that a script forgot to set: the default model is a download of 24 GB."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "There is no model ''" in refused(command, "--model-path", "", "-p", "hi")


def test_the_program_and_python_have_the_same_default_model():
    from pixtral_cli import Pixtral
    from pixtral_cli.cli.options import SourceFlags

    assert SourceFlags().name == signature(Pixtral.load).parameters["model_path"].default
