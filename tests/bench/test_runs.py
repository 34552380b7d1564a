"""Programs take turns, medians stand beside each other, who fails is left out: with programs that compute nothing."""

import json
import statistics
from io import StringIO

import pytest

from pixtral_cli.bench import contender, runs
from pixtral_cli.bench.ceilings import Rates
from pixtral_cli.bench.contender import Contender, ContenderFailed
from pixtral_cli.bench.counts import Counts
from pixtral_cli.bench.runs import Measured, Programs, Sizes
from pixtral_cli.source import Source

SIZES = Sizes(prompt_tokens=8, new_tokens=4, batch_sizes=(1, 2), repeats=3)


class FakeCeilings:
    def sample(self):
        return Rates(1e9, {"bfloat16": 1e12, "float32": 5e11})


@pytest.fixture
def asked(monkeypatch):
    """Who was asked for what, in order; `failing` names (program, question) that fail."""

    class Fake:
        order, failing, seconds = [], {}, {}

        def __init__(self, name):
            self.name, self.count = name, 0

        def ask(self, what, **arguments):
            Fake.order.append((self.name, what))
            if error := Fake.failing.get((self.name, what)):
                raise ContenderFailed(error)
            if what == "peak_memory":
                return 2_000_000_000 if self.name == "pixtral" else 1_000_000_000
            if what == "import_torch":
                return 0.125 if self.name == "pixtral" else 0.0
            self.count += 1
            return {"version": "1"} if what == "about" else (1.0 if self.name == "pixtral" else 2.0) + self.count / 100

        def end(self):
            pass

    monkeypatch.setattr(runs, "Contender", Fake)
    monkeypatch.setattr(runs, "SETTLING", 0)
    return Fake


def measured(*peers, told=None):
    source = Source.open("tiny")
    counts = Counts(source.config, source.checkpoint.tensors)
    models = {name: {} for name in ("pixtral", *peers)}
    tell = (told if told is not None else []).append
    programs = Programs(models, 1, SIZES, FakeCeilings(), tell, lambda what: None)
    abouts = {}
    return list(Measured("bfloat16", counts, "bfloat16").rows(programs, abouts)), abouts


def test_every_ratio_is_ours_over_the_peers_and_ours_is_the_median(asked):
    rows, abouts = measured("llama.cpp", "transformers")
    assert {row.peer_name for row in rows} == {"llama.cpp", "transformers"} == abouts.keys() - {"pixtral"}
    for row in rows:
        assert row.ratio == row.ours / row.peer
        assert row.ours_spread[0] <= row.ours <= row.ours_spread[1]
        assert row.peer_spread[0] <= row.peer <= row.peer_spread[1]
    works = {(row.work, row.tokens, row.batch) for row in rows}
    assert works == {
        ("load", 0, 0), ("start", 16, 1), ("start, without importing torch", 16, 1), ("prefill", 8, 1),
        ("first token", 8, 1), ("decode", 4, 1), ("decode", 4, 2), ("peak memory", 0, 0),
    }  # fmt: skip


def test_programs_take_turns_and_the_first_round_does_not_count(asked):
    rows, _ = measured("llama.cpp")
    turns = [name for name, what in asked.order if what == "decode"]
    assert turns == ["pixtral", "llama.cpp"] * 2 * (SIZES.repeats + 1)
    decode = next(row for row in rows if (row.work, row.batch) == ("decode", 1))
    seconds = statistics.median([4 / rate for rate in (decode.ours_spread)])
    assert decode.ours == pytest.approx(4 / seconds, rel=1e-3) and decode.ours_spread[0] < decode.ours_spread[1]


def test_what_importing_torch_took_in_a_program_is_taken_off_its_own_start(asked, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(runs.time, "perf_counter", lambda: next(clock))
    rows, _ = measured("llama.cpp")
    [whole] = [row for row in rows if row.work == "start"]
    [beyond] = [row for row in rows if row.work == "start, without importing torch"]
    assert whole.ours - beyond.ours == 0.125 and whole.peer == beyond.peer


def test_without_peers_there_is_a_row_for_each_work_and_nothing_beside_it(asked):
    rows, _ = measured()
    assert all((row.peer, row.peer_name, row.ratio, row.peer_spread) == (None,) * 4 for row in rows)
    assert len({(row.work, row.batch) for row in rows}) == len(rows)


def test_the_part_of_the_ceiling_is_the_least_time_over_the_time(asked):
    rows, _ = measured()
    source = Source.open("tiny")
    need = Counts(source.config, source.checkpoint.tensors).prefill(8)
    least = max(need.nbytes / 1e9, 2 * need.multiplications / 1e12)
    [prefill] = [row for row in rows if row.work == "prefill"]
    assert prefill.ceiling_fraction == pytest.approx(least / (8 / prefill.ours))
    [memory] = [row for row in rows if row.work == "peak memory"]
    weights = sum(info.nbytes for info in source.checkpoint.tensors.values())
    assert memory.ours == 2.0 and memory.ceiling_fraction == pytest.approx(weights / 2e9)


def test_a_peer_that_fails_at_one_work_is_left_out_there(asked):
    told = []
    asked.failing = {("llama.cpp", "decode"): "it has no such thing."}
    rows, _ = measured("llama.cpp", told=told)
    assert {row.peer_name for row in rows if row.work == "decode"} == {None}
    assert {row.peer_name for row in rows if row.work != "decode"} == {"llama.cpp"}
    assert told == ["llama.cpp is left out (decode): it has no such thing."] * 2


def test_a_peer_that_cannot_load_is_left_out_and_ours_is_raised(asked):
    told = []
    asked.failing = {("llama.cpp", "load"): "the file is broken."}
    assert {row.peer_name for row in measured("llama.cpp", told=told)[0]} == {None} and len(told) == 1
    asked.failing = {("pixtral", "prefill"): "no memory."}
    with pytest.raises(ContenderFailed, match="no memory"):
        measured("llama.cpp")


def test_a_program_that_ends_by_itself_is_told_with_its_last_words(monkeypatch):
    monkeypatch.setitem(contender.MODULES, "gone", "no_such_module")
    program = Contender("gone")
    try:
        with pytest.raises(ContenderFailed, match="gone ended by itself: KeyError: 'gone'"):
            program.ask("load")
    finally:
        program.end()


def test_a_program_without_memory_says_so_and_what_to_lower():
    class Large:
        def load(self):
            raise MemoryError

    answers = StringIO()
    contender.serve(Large(), StringIO('{"what": "load"}\n'), answers)
    found = json.loads(answers.getvalue())
    assert found["error"] == "There is not enough memory for this." and "--batch-sizes" in found["hint"]


def test_what_fails_in_a_program_is_a_sentence_here():
    program = Contender("pixtral")
    try:
        with pytest.raises(ContenderFailed, match="nothing here") as failure:
            program.ask("load", model={"model_path": "nothing here"}, threads=1, context=16, batch=1)
        assert failure.value.hint
        assert program.ask("peak_memory") > 2**24
    finally:
        program.end()
