"""`pixtral export` and `verify`, and the flags of `run` that write and read the same file."""

import json
import os
import shutil

import pytest

ASK = ["-p", "What can you do?", "--max-new-tokens", "4", "--ignore-eos", "--json"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXTRAL_CACHE", str(tmp_path / "cache"))


def test_what_export_writes_run_reads_and_verify_finds_whole(call, tmp_path):
    file = tmp_path / "tiny.q6"
    code, out, err = call("export", "tiny", str(file), "--quantization-encoding", "q6_k", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"file": str(file), "encoding": "q6_k", "bytes": file.stat().st_size}
    code, out, _ = call("verify", str(file))
    assert code == 0 and "q6_k" in out and "whole" in out
    first = call("run", "--model-path", "tiny", "--quantization-encoding", "q6_k", *ASK)[1]
    second = call("run", "--serialized-model-path", str(file), *ASK)[1]
    assert json.loads(first)["token_ids"] == json.loads(second)["token_ids"]
    assert json.loads(second)["model"] == "tiny"


def test_the_default_of_the_environment_gives_way_to_a_file(call, tmp_path, monkeypatch):
    from support import format_builders

    from pixtral_cli.tiny import FOLDER

    saved, gguf = tmp_path / "tiny.bf16", tmp_path / "own.gguf"
    call("export", "tiny", str(saved))
    format_builders.gguf_text(FOLDER, gguf)
    monkeypatch.setenv("PIXTRAL_MODEL_PATH", "no/such-model")
    code, out, err = call("run", "--serialized-model-path", str(saved), *ASK)
    assert code == 0 and json.loads(out)["model"] == "tiny", err
    assert call("run", "--weight-path", str(gguf), *ASK)[0] == 0
    assert call("run", "--serialized-model-path", str(saved), "--model-path", "tiny", *ASK)[0] == 2


def test_run_saves_the_model_that_it_loaded(call, tmp_path):
    saved, exported = tmp_path / "saved", tmp_path / "exported"
    flags = ["--quantization-encoding", "q4_0"]
    code, _, _ = call("run", "--model-path", "tiny", *flags, "--save-to-serialized-model-path", str(saved), *ASK)
    assert code == 0 and call("export", "tiny", str(exported), *flags)[0] == 0
    assert saved.read_bytes() == exported.read_bytes()


def test_a_file_in_an_older_order_is_told_and_exported_anew_with_the_same_weights(call, tmp_path):
    from support import older_files

    now, old, new = (tmp_path / name for name in ("now", "old", "new"))
    assert call("export", "tiny", str(now), "--quantization-encoding", "q4_0")[0] == 0
    older_files.write(old, now)
    asked = ("run", "--serialized-model-path", str(old), *ASK)
    assert all(call(*told)[2].count("older order") == 1 for told in (asked, ("inspect", str(old))))
    code, _, err = call("export", str(old), str(new))
    assert (code, err) == (0, "") and new.read_bytes() == now.read_bytes()
    assert call("inspect", str(new))[2] == "" and call("export", str(new), str(new))[0] == 1
    code, _, err = call("export", str(old), str(new), "--quantization-encoding", "q6_k")
    assert code == 1 and "q4_0" in err and "q6_k" in err


def alter(file):
    """One byte, in the middle and in place."""
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte[0] ^ 1]))


def test_an_altered_file_is_refused_with_a_sentence(call, refused, tmp_path):
    file = tmp_path / "tiny.bf16"
    call("export", "tiny", str(file))
    alter(file)
    for arguments in (["verify", str(file)], ["run", "--serialized-model-path", str(file), *ASK]):
        assert "altered" in refused(*arguments)


def test_an_altered_file_whose_time_was_set_back_is_refused_too(call, tmp_path):
    file = tmp_path / "tiny.q4"
    call("export", "tiny", str(file))
    before = file.stat()
    alter(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "altered" in call("run", "--serialized-model-path", str(file), *ASK)[2]


def test_no_room_for_the_file_is_said_of_the_file_and_its_disk_and_no_download(refused, tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5 * 2**20))
    err = refused("export", "tiny", str(tmp_path / "tiny.bf16"))
    assert "ownload" not in err.splitlines()[0] and list(tmp_path.iterdir()) == []
    assert f"'tiny.bf16' needs 14.0 MiB more, and the disk of {tmp_path} has 5.0 MiB free." in err


@pytest.mark.parametrize("place", ["/dev/null/model.pixtral", ".", "", "..", "fifo", "x" * 300, "folder/", "folder"])
def test_a_place_that_cannot_be_written_is_a_sentence_and_stays_as_it_is(refused, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    assert "cannot be written" in refused("export", "tiny", place)
    assert (tmp_path / "fifo").is_fifo() and {path.name for path in tmp_path.iterdir()} <= {"folder", "fifo", "cache"}


def test_the_file_that_a_model_is_read_from_is_never_overwritten(refused, tmp_path):
    from pixtral_cli.tiny import FOLDER

    shutil.copytree(FOLDER, tmp_path / "model")
    weights = next((tmp_path / "model").glob("*.safetensors"))
    before = weights.read_bytes()
    (tmp_path / "link").symlink_to(weights)
    for place in (weights, tmp_path / "model/../model" / weights.name, tmp_path / "link"):
        err = refused("export", str(tmp_path / "model"), str(place))
        assert "read from" in err and weights.read_bytes() == before


def test_what_a_killed_export_left_goes_with_the_next_one(call, tmp_path):
    import fcntl

    dead, busy = tmp_path / ".[a] b.q4.4711.partial", tmp_path / ".[a] b.q4.4712.partial"
    dead.write_bytes(b"x" * 100)
    with busy.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert call("export", "tiny", str(tmp_path / "[a] b.q4"))[0] == 0
    assert not dead.exists() and busy.exists()


@pytest.mark.parametrize("path", ["absent", ".", "/dev/null", "y" * 300])
def test_what_is_no_file_is_said_to_be_none(refused, path):
    for command in (["verify", path], ["run", "--serialized-model-path", path, *ASK]):
        assert f"{path} is no file" in refused(*command)
