"""Standard input: what is read, what is waited for, and what is left alone."""

import json
import os
import socket
import time

import pytest
from support.processes import PATIENCE, run_line


def shell(line):
    done = run_line(line)
    return done.stdout.decode(), done.stderr.decode()


def test_piped_text_goes_before_the_prompt_with_a_blank_line_between(fake):
    assert fake("run", "-p", "hi", input=b"a text\nof two lines\n").stdout == b"<user>a text\nof two lines\n\nhi\n"


def test_a_file_as_standard_input_is_read(fake, tmp_path):
    file = tmp_path / "text"
    file.write_bytes("\ufeffcaf\u00e9\n".encode())
    with file.open("rb") as stream:
        assert fake("run", "-p", "hi", stdin=stream).stdout.decode() == "<user>caf\u00e9\n\nhi\n"


@pytest.mark.parametrize("text", [b"", b"\n", b"  \n\n"])
def test_blank_input_is_no_input(fake, text):
    assert fake("run", "-p", "hi", input=text).stdout == b"<user>hi\n"
    assert fake("run", input=text).returncode == 2


def test_without_a_prompt_the_piped_text_is_the_request(fake):
    assert fake("run", input=b"the request\n").stdout == b"<user>the request\n"


def test_without_a_prompt_a_slow_program_is_waited_for():
    out, _ = shell("(sleep 1.5; echo late) | $FAKE run")
    assert out == "<user>late\n"


def test_beside_a_prompt_a_slow_program_in_the_pipeline_is_waited_for():
    out, err = shell("(sleep 1.5; echo late) | $FAKE run -p hi")
    assert (out, err) == ("<user>late\n\nhi\n", "")


def test_what_comes_while_the_model_loads_is_read(start_fake, tmp_path):
    os.mkfifo(loading := tmp_path / "loading")
    process = start_fake("run", "-p", "hi", env={"FAKE_LOAD_FIFO": str(loading)})
    with loading.open("w"):  # which comes back when it loads
        time.sleep(1)  # more than an inherited pipe has to begin
        process.stdin.write(b"in time")
        process.stdin.close()
    assert process.stdout.read() == b"<user>in time\n\nhi\n"


def test_once_begun_the_input_is_read_to_its_end():
    out, _ = shell("(echo one; sleep 1; echo two) | $FAKE run -p hi")
    assert out == "<user>one\ntwo\n\nhi\n"


def test_a_silent_pipe_from_the_parent_is_not_waited_for(start_fake):
    process = start_fake("run", "-p", "hi")
    assert process.wait(timeout=PATIENCE) == 0
    assert process.stdout.read() == b"<user>hi\n" and process.stderr.read() == b""  # where it waits, it tells of it


def test_a_silent_pipe_inherited_from_further_up_is_not_waited_for():
    reading, writing = os.pipe()
    try:
        done = run_line("$FAKE run -p hi; true", stdin=reading)
    finally:
        os.close(writing)
        os.close(reading)
    assert (done.stdout, done.stderr) == (b"<user>hi\n", b"")


def test_a_silent_socket_is_not_waited_for_and_one_with_text_is_read(start_fake):
    for sent, answer in ((b"", b"<user>hi\n"), (b"text", b"<user>text\n\nhi\n")):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = start_fake("run", "-p", "hi", stdin=theirs)
            if sent:
                ours.sendall(sent)
                ours.shutdown(socket.SHUT_WR)
            assert process.communicate(timeout=PATIENCE) == (answer, b"")


@pytest.mark.slow
def test_a_silent_program_in_the_pipeline_is_given_up_with_a_notice():
    out, err = shell("(exec sleep 25) | (time $FAKE run -p hi)")
    assert out == "<user>hi\n" and "standard input" in err


def test_input_that_is_no_text_says_how_to_send_a_picture(fake):
    done = fake("run", "-p", "hi", input=b"\x89PNG\r\n\x1a\n")
    assert done.returncode == 2 and b"--image -" in done.stderr


def test_a_picture_can_come_on_standard_input(fake, tmp_path):
    from PIL import Image

    file = tmp_path / "dot.png"
    Image.new("RGB", (8, 8), "red").save(file)
    assert fake("run", "-i", "-", "-p", "hi", input=file.read_bytes()).stdout == b"<user>[picture]hi\n"


def test_messages_can_come_on_standard_input(fake):
    messages = b'[{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]'
    assert fake("run", "--messages", "-", input=messages).stdout == b"<system>be kind<user>hello\n"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_an_assistant_in_the_messages_may_say_nothing_beside_its_calls(fake, content):
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "w"},
        {"role": "assistant", "tool_calls": [call], **content},
        {"role": "tool", "tool_call_id": "1", "content": "Sunny"},
    ]
    said = fake("run", "--messages", "-", input=json.dumps(turns).encode()).stdout
    assert said == b"<user>w<assistant><tool>Sunny\n"


def test_messages_in_a_file_leave_standard_input_alone(start_fake, tmp_path):
    file = tmp_path / "messages.json"
    file.write_text('[{"role": "user", "content": "hello"}]')
    process = start_fake("run", "--messages", str(file))
    assert process.wait(timeout=PATIENCE) == 0 and process.stdout.read() == b"<user>hello\n"


def test_pictures_go_before_the_text_and_the_system_text_before_all(fake, tmp_path):
    from PIL import Image

    file = str(tmp_path / "dot.png")
    Image.new("RGB", (8, 8), "red").save(file)
    done = fake("run", "-i", file, "-i", file, "--system", "be kind", "-p", "hi", input=b"text")
    assert done.stdout == b"<system>be kind<user>[picture][picture]text\n\nhi\n"
    assert fake("run", "-i", file, "--raw", "-p", "hi").stdout == b"[picture]hi\n"
