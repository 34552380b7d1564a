"""What goes to which stream, and the exit code that a script sees."""

import json
import subprocess

import pytest
from support.processes import run_line

USAGE = ["prompt_tokens", "completion_tokens", "image_tokens", "proposed_tokens", "accepted_tokens", "reasoning_tokens"]
KEYS = ["model", "text", "token_ids", "prompt_token_ids", "finish_reason", "usage", "timings", "kernels"]
TIMINGS = ["load_s", "first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s", "total_s"]


def test_standard_output_is_the_answer_and_standard_error_is_empty(fake):
    done = fake("run", "-p", "hi")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"<user>hi\n", b"")


def test_an_answer_that_ends_its_line_gets_no_second_newline(fake):
    assert fake("run", "-p", "newline").stdout == b"ends with one\n"


def test_a_pipe_gets_the_answers_bytes_as_they_are(fake):
    done = fake("run", "-p", "escape")
    assert done.stdout == "\x1b]0;owned\x07red\x1b[31m\x9b2Jplain\n".encode()


def test_the_answer_is_utf_8_whatever_the_locale(fake):
    done = fake("run", "-p", "h\u00e9 \u2603", env={"LC_ALL": "C", "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"})
    assert done.stdout.decode() == "<user>h\u00e9 \u2603\n"


def test_the_answer_streams_word_by_word(start_fake):
    process = start_fake("run", "-p", "slowly", stdin=subprocess.DEVNULL)
    assert process.stdout.read1(6) == b"word0 " and process.poll() is None


def test_json_is_one_object_with_exactly_the_promised_keys(fake):
    done = fake("run", "-p", "\u2603", "--json")
    value = json.loads(done.stdout)
    assert list(value) == KEYS and list(value["usage"]) == USAGE and list(value["timings"]) == TIMINGS
    assert value["text"] == "<user>\u2603" and "\u2603".encode() in done.stdout and done.stderr == b""


def test_json_has_log_probabilities_only_when_asked(fake):
    value = json.loads(fake("run", "-p", "hi", "--json", "--logprobs").stdout)
    assert list(value) == [*KEYS, "logprobs"]
    assert value["logprobs"] == [{"token_id": 7, "token": "x", "logprob": -0.5}]


def test_json_stays_json_where_a_rate_is_infinite(fake):
    def refuse(constant):
        raise AssertionError(constant)

    done = fake("run", "-p", "infinite", "--json")
    assert json.loads(done.stdout, parse_constant=refuse)["timings"]["prefill_tokens_per_s"] is None


def test_statistics_and_log_probabilities_go_to_standard_error(fake):
    done = fake("run", "-p", "hi", "--stats", "--logprobs")
    assert done.stdout == b"<user>hi\n"
    table, line = done.stderr.decode().splitlines()
    assert table.split() == ["-0.5000", "7", "'x'"]
    assert "prompt 3 tokens" in line and "answer 2 tokens, looked up 1 of 3" in line and "20.0/s" in line


def test_remote_code_gets_a_notice_and_quiet_silences_it(fake):
    loud = fake("run", "-p", "hi", "--trust-remote-code")
    quiet = fake("run", "-p", "hi", "--trust-remote-code", "--quiet", "--stats")
    assert loud.stdout == quiet.stdout == b"<user>hi\n"
    assert b"never run" in loud.stderr and quiet.stderr == b""


def test_flags_arrive_as_the_arguments_of_the_python_api(fake):
    flags = "--max-length 99 --max-new-tokens 5 --top-k 3 --temperature 0.5 --top-p 0.9 --min-p 0.1 --seed 4".split()
    flags += ["--stop", "a", "--stop", "b", "--ignore-eos", "--repetition-penalty", "1.2", "--devices", "cpu"]
    flags += ["--weight-path", "w", "--max-batch-size", "2", "--max-ce-batch-size", "3", "--force-download"]
    flags += ["--image-preprocessing", "native", "--quantization-encoding", "nf4", "--model-path", "some/name"]
    flags += ["--weights-format", "native", "--quantize-vision", "--double-quantization", "--kv-cache-dtype", "fp8"]
    flags += ["--speculative", "off"]
    done = fake("run", "-p", "options", "--json", *flags)
    answer = json.loads(done.stdout)
    assert answer["model"] == "some/name"
    assert json.loads(answer["text"]) == {
        "max_new_tokens": 5,
        "top_k": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "seed": 4,
        "stop": ["a", "b"],
        "ignore_eos": True,
        "logprobs": False,
        "weight_paths": ["w"],
        "weights_format": "native",
        "serialized_model_path": None,
        "quantize_vision": True,
        "double_quantization": True,
        "quantization_encoding": "nf4",
        "devices": "cpu",
        "max_length": 99,
        "max_batch_size": 2,
        "max_ce_batch_size": 3,
        "kv_cache_dtype": "fp8",
        "speculative": "off",
        "image_preprocessing": "native",
        "force_download": True,
        "progress": None,
    }


def test_the_model_can_be_named_by_the_environment(fake):
    done = fake("run", "-p", "hi", "--json", env={"PIXTRAL_MODEL_PATH": "from/environment"})
    assert json.loads(done.stdout)["model"] == "from/environment"


def test_a_reader_who_leaves_ends_the_run_quietly(start_fake):
    process = start_fake("run", "-p", "slowly", stdin=subprocess.DEVNULL)
    process.stdout.read1(6)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=20) == 0


@pytest.mark.parametrize("arguments", ["--help", "run --help", "--version"])
def test_help_into_a_closed_pipe_is_quiet(arguments):
    done = run_line(f"exec 3> >(true); sleep 0.2; $PIXTRAL {arguments} 2>&1 >&3 | cat")
    assert done.stdout == b"" and done.stderr == b""


def test_a_full_disk_is_an_error_and_not_a_traceback(fake):
    with open("/dev/full", "wb") as full:
        done = fake("run", "-p", "hi", stdout=full)
    error = done.stderr.decode()
    assert done.returncode == 1 and error.startswith("pixtral: error: ") and "No space left" in error
    assert "Traceback" not in error and "Exception ignored" not in error


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_onto_a_full_disk_is_an_error_and_not_a_traceback(program, arguments):
    with open("/dev/full", "wb") as full:
        done = program(*arguments, stdout=full)
    error = done.stderr.decode()
    assert done.returncode == 1 and "No space left" in error and len(error.splitlines()) == 2


def test_an_error_is_one_line_whatever_a_name_holds(fake):
    error = fake("run", "-p", "hi", "-i", "a\nb\x1b[2J\udcff.png").stderr.decode()
    assert len(error.splitlines()) == 2 and "\x1b" not in error and "\\udc" not in error


@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closing):
    assert run_line(f"exec $FAKE run -p hi {closing}").returncode == 0


@pytest.mark.parametrize(
    ("prompt", "said"), [("bug", "ZeroDivisionError: division by zero"), ("memory", "not enough memory")]
)
def test_an_unexpected_error_is_a_sentence_and_what_was_said_stays(fake, prompt, said):
    done = fake("run", "-p", prompt)
    error = done.stderr.decode()
    assert (done.returncode, done.stdout) == (1, b"begun\n")
    assert error.startswith("pixtral: error: ") and said in error and len(error.splitlines()) == 2


def test_debugging_shows_the_traceback(fake):
    done = fake("run", "-p", "bug", env={"PIXTRAL_DEBUG": "1"})
    assert done.returncode == 1 and b"Traceback (most recent call last)" in done.stderr
    assert b"pixtral: error: " in done.stderr


def test_an_error_leaves_json_output_empty(fake):
    done = fake("run", "-p", "bug", "--json")
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_pipe_gets_the_answer_without_the_thought(fake):
    done = fake("run", "-p", "thinking")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"<user>thinking\n", b"")


def test_the_object_has_the_thought_apart_unless_it_is_not_wanted(fake):
    value = json.loads(fake("run", "-p", "thinking", "--json").stdout)
    assert (value["text"], value["reasoning_content"]) == ("<user>thinking", "Well\x1b[31m, then.\n")
    hidden = json.loads(fake("run", "-p", "thinking", "--json", "--no-reasoning").stdout)
    assert list(hidden) == KEYS and hidden["text"] == value["text"]


def test_an_effort_reaches_the_model_and_goes_with_no_raw_prompt(fake):
    told = fake("run", "-p", "options", "--reasoning-effort", "high").stdout
    assert b'"reasoning_effort": "high"' in told
    refused = fake("run", "--raw", "-p", "options", "--reasoning-effort", "high")
    assert refused.returncode == 2 and b"--raw and --reasoning-effort exclude" in refused.stderr
