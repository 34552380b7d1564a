"""Command lines that cannot be meant: exit code 2 (or 1 for what does not work yet), one sentence, a way out."""

import pytest

from pixtral_cli.encodings import CHOICES


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max-length", "0"),
        ("--max-length", "many"),
        ("--max-new-tokens", "0"),
        ("--max-new-tokens", "-2"),
        ("--max-batch-size", "0"),
        ("--max-ce-batch-size", "-1"),
        ("--top-k", "-1"),
        ("--temperature", "-0.1"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--top-p", "0"),
        ("--top-p", "1.01"),
        ("--top-p", "nan"),
        ("--min-p", "-0.1"),
        ("--min-p", "1.1"),
        ("--repetition-penalty", "0"),
        ("--repetition-penalty", "inf"),
        ("--seed", "-1"),
        ("--stop", ""),
        ("--devices", "cuda:0"),
        ("--quantization-encoding", "q5_k"),
        ("--image-preprocessing", "opencv"),
        ("--no-such-flag", "1"),
    ],
)
def test_a_value_out_of_range_names_its_flag(call, flag, value):
    code, out, err = call("run", "-p", "hi", flag, value)
    assert (code, out) == (2, "")
    assert flag in err and err.startswith("pixtral: error: ") and "pixtral run --help" in err
    assert "Traceback" not in err and len(err.splitlines()) == 2


def test_an_unknown_encoding_lists_the_known_ones(call):
    code, _, err = call("run", "-p", "hi", "--quantization-encoding", "int8")
    assert code == 2 and all(name in err for name in CHOICES)


@pytest.mark.parametrize("other", [["--model-path", "tiny"], ["--weight-path", "x"], ["--weights-format", "hf"]])
def test_a_serialized_model_is_the_whole_model(call, other):
    code, out, err = call("run", "-p", "hi", "--serialized-model-path", "model.pixtral", *other)
    assert (code, out) == (2, "") and "--serialized-model-path" in err


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
def test_a_request_that_is_none_or_two_is_a_usage_error(call, command, arguments):
    code, out, err = call(command, *arguments)
    assert (code, out) == (2, "") and err.startswith("pixtral: error: ")


def test_a_misspelt_command_is_a_usage_error(call):
    code, out, err = call("rum")
    assert (code, out) == (2, "") and "'run'" in err


def test_a_picture_that_is_not_there_is_told_before_anything_is_loaded(call, monkeypatch):
    monkeypatch.setattr("pixtral_cli.source.Source.open", None)
    code, out, err = call("run", "--model-path", "tiny", "-i", "no/such.png", "-p", "hi")
    assert (code, out) == (1, "") and "no/such.png" in err and len(err.splitlines()) == 2


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
def test_messages_that_are_wrong_name_the_entry(call, tmp_path, text, said):
    file = tmp_path / "messages.json"
    file.write_bytes(text.encode("latin-1"))
    code, out, err = call("run", "--messages", str(file))
    assert (code, out) == (1, "") and said in err and "Traceback" not in err


def test_messages_that_are_not_there_name_the_file(call):
    code, _, err = call("run", "--messages", "no/such.json")
    assert code == 1 and "no/such.json" in err


def test_help_and_python_have_the_same_default_model():
    from pixtral_cli import options, source

    assert options.DEFAULT_MODEL == source.DEFAULT_MODEL
