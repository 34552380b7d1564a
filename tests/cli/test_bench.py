"""`pixtral bench`: a figure for every work, beside its ceiling; what is wrong is a sentence."""

import json
import shutil
import signal
import tempfile

import pytest
from support.processes import PROGRAM, run_process

FIELDS = {"work", "encoding", "tokens", "batch", "ours", "peer", "peer_name", "ratio", "unit", "ceiling_fraction"}
LITTLE = ["--prompt-tokens", "8", "--new-tokens", "4", "--batch-sizes", "1,2", "--repeats", "1", "--devices", "cpu"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What it prints and what it writes of the built-in model, with a picture."""
    file = tmp_path_factory.mktemp("bench") / "rates.json"
    arguments = ["bench", "--model-path", "tiny", "--image", "64x32", *LITTLE, "--json", str(file)]
    done = run_process(PROGRAM, arguments, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return done, json.loads(file.read_text())


def test_every_work_has_a_row_with_its_figures(measured):
    rows = measured[1]["rows"]
    assert all(row.keys() >= FIELDS and row["ours"] > 0 and row["encoding"] == "bfloat16" for row in rows)
    assert {(row["work"], row["tokens"], row["batch"], row["unit"]) for row in rows} == {
        ("load", 0, 0, "s"), ("start", 16, 1, "s"), ("prefill", 8, 1, "tok/s"), ("first token", 8, 1, "s"),
        ("decode", 4, 1, "tok/s"), ("decode", 4, 2, "tok/s"), ("picture", 8, 1, "tok/s"), ("peak memory", 0, 0, "GB"),
    }  # fmt: skip
    assert all(row["ceiling_fraction"] > 0 for row in rows if row["work"] not in ("load", "start"))


def test_machine_and_ceilings_are_told_beside_them(measured):
    found = measured[1]
    assert found["model"] == "tiny" and found["device"] == "cpu" and found["threads"] == 1 and found["instructions"]
    assert found["machine"]["cores"] > 0 and found["machine"]["memory_bytes"] > 2**28
    assert found["ceilings"]["read_bytes_per_second"] > 0
    assert all(rate > 0 for rate in found["ceilings"]["operations_per_second"].values())


def test_the_table_has_a_line_for_each_row(measured):
    done, found = measured
    text = done.stdout.decode()
    assert done.stderr == b"" and "\x1b" not in text
    assert all(text.count(f"\n {row['work']}") for row in found["rows"])
    assert "decode of 4, 2 requests" in text and "of ceiling" in text and "GB/s" in text


@pytest.mark.slow
def test_peers_are_measured_on_the_same_weights():
    done = run_process(
        PROGRAM, ["bench", "--model-path", "tiny", "--compare", "--image", "64x32", *LITTLE, "--json", "-"]
    )
    rows = json.loads(done.stdout)["rows"]
    assert {row["peer_name"] for row in rows} == {"llama.cpp", "transformers"}
    assert all(row["ratio"] == row["ours"] / row["peer"] for row in rows)


def test_a_peer_that_is_not_installed_is_one_line(call, monkeypatch, tmp_path):
    from pixtral_cli.bench import model_files, runs

    peer = model_files.Peer(("no_such_module",), "no-such-package", model_files.for_transformers)
    monkeypatch.setattr(model_files, "PEERS", {"llama.cpp": peer})
    monkeypatch.setattr(runs.Measured, "rows", lambda self, programs, abouts: iter(()))
    code, out, err = call("bench", "--model-path", "tiny", "--compare", "--devices", "cpu")
    assert (code, out) == (0, "") and len(err.splitlines()) == 1
    assert "llama.cpp is left out: it is not installed (pip install no-such-package)" in err


def test_an_interrupt_shows_what_has_been_measured(call, monkeypatch):
    from pixtral_cli.bench import runs

    def rows(self, programs, abouts):
        yield runs.Row("load", "q4_k", 0, 0, 1.5, None, None, None, "s", None, (1.0, 2.0), None)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.Measured, "rows", rows)
    code, out, _ = call("bench", "--model-path", "tiny", "--devices", "cpu")
    assert code == 130 and "1.50 s" in out and "1.00 to 2.00" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_who_is_told_to_end_shows_what_there_is_and_leaves_no_model_behind(call, capfd, monkeypatch, tmp_path, number):
    from pixtral_cli.bench import runs

    def rows(self, programs, abouts):
        assert [file.stat().st_size > 0 for file in tmp_path.glob("pixtral-bench-*/tiny.q4_k")] == [True]
        yield runs.Row("load", "q4_k", 0, 0, 1.5, None, None, None, "s", None, (1.0, 2.0), None)
        signal.raise_signal(number)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(runs.Measured, "rows", rows)
    with pytest.raises(SystemExit, match=str(128 + number)):
        call("bench", "--model-path", "tiny", "--quantization-encoding", "q4_k", "--devices", "cpu")
    assert "1.50 s" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "7b"], "'7b' is not known; known are 1b, 3b, 8b, nemo-12b"),
        (["--quantization-encoding", "q2_x"], "'q2_x' is not known"),
        (["--batch-sizes", "1,0"], "'1,0' are no batch sizes"),
        (["--image", "large"], "'large' is no size of a picture"),
        (["--shape", "1b", "--model-path", "tiny"], "leave --model-path out"),
        (["--json", "/no/such/folder/rates.json"], "its folder is not there"),
        (["--json", "/"], "it is a folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(refused, arguments, said):
    assert said in refused("bench", *arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image", "50x48"], "sides are multiples of 16 pixels"),
        (["--image", "16x16000"], "sides are multiples of 16 pixels, up to"),
        (["--prompt-tokens", "16384"], "has a context of 16384 tokens, and this takes 16385"),
        (["--new-tokens", "99999"], "Lower --prompt-tokens or --new-tokens"),
    ],
)
def test_what_the_model_cannot_compute_is_refused_before_it_is_loaded(refused, monkeypatch, arguments, said):
    from pixtral_cli.bench import runs

    monkeypatch.setattr(runs, "Contender", None)
    assert said in refused("bench", "--model-path", "tiny", "--devices", "cpu", *arguments)


def test_a_full_disk_names_the_folder_for_models_that_are_thrown_away(refused, monkeypatch):
    usage = shutil.disk_usage(tempfile.gettempdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    said = refused("bench", "--model-path", "tiny", "--quantization-encoding", "q4_k", "--devices", "cpu")
    assert "1000" in said.replace(",", "") and "TMPDIR" in said and "HF_HUB_CACHE" not in said


def test_a_text_model_looks_at_no_picture(refused, tmp_path):
    from pixtral_cli.bench import gguf_writer
    from pixtral_cli.source import Source

    source = Source.open("tiny")
    gguf_writer.write(source.checkpoint, source.config, tmp_path / "text.gguf")
    file = str(tmp_path / "text.gguf")
    assert "cannot look at pictures" in refused("bench", "--model-path", file, "--image", "64x64", "--devices", "cpu")
