"""The driver: requests from any thread, events in order, and an end that nobody has to wait for."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from queue import SimpleQueue

import pytest
from support import builders
from support.devices import loaded
from support.engines import run, tokens
from support.processes import PATIENCE, wait_until
from support.random_requests import words

from pixtral_cli import Pixtral
from pixtral_cli.engine.driver import Driver, on_a_thread_that_ends
from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import Failure, Request
from pixtral_cli.errors import RequestError

QUESTION = [{"role": "user", "content": "What can you do?"}]
LONG = {"max_new_tokens": 2000, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    builders.mistral(folder)
    return loaded(folder)


@pytest.fixture
def driver(model):
    driver = Driver(Engine(model, max_batch_size=3))
    yield driver
    assert driver.stop(PATIENCE)


def asked(seed, length=20, tokens=12):
    return Request(tuple(words(seed, length)), tokens)


@contextmanager
def held(driver):
    """No step begins within."""
    driver.pause()
    try:
        yield
    finally:
        driver.resume()


MANY = [asked(seed, 5 + 30 * seed, 10 + seed) for seed in range(7)]


def answer(events):
    """All of one request's events, from the queue that is its sink."""
    got = events.get(timeout=PATIENCE)
    while not isinstance(got[-1], Failure) and not got[-1].finish_reason:
        got += events.get(timeout=PATIENCE)
    return got


def test_no_thread_begins_before_the_first_request(driver):
    before = threading.active_count()
    assert driver.stop(0) and threading.active_count() == before


def test_threads_that_come_and_go_get_their_events_in_order(model, driver):
    alone = [tokens(run(Engine(model), request)[0]) for request in MANY]
    sinks = [SimpleQueue() for _ in MANY]

    def leave_early():
        driver.cancel(driver.submit(asked(99, tokens=2000), lambda events: None))

    for request, events in zip(MANY, sinks, strict=True):
        threading.Thread(target=driver.submit, args=(request, events.put)).start()
        threading.Thread(target=leave_early).start()
    assert [tokens(answer(events)) for events in sinks] == alone
    wait_until(lambda: not driver.engine.busy and not driver.waiting)
    assert driver.engine.table.in_use == 0


def test_requests_with_one_sink_get_all_that_a_step_gives_them_in_one_call(model, driver):
    alone = [tokens(run(Engine(model), request)[0]) for request in MANY]
    driver.engine.speculation = None  # by which a step may give several tokens
    together, other = SimpleQueue(), SimpleQueue()
    with held(driver):
        driver.submit(asked(50, tokens=30), other.put)
        ids = [driver.submit(request, together.put) for request in MANY]
    got = {request_id: [] for request_id in ids}
    shares = []
    while not all(events and events[-1].finish_reason for events in got.values()):
        shares.append(together.get(timeout=PATIENCE))
        for event in shares[-1]:
            got[event.request_id].append(event)
    assert [tokens(events) for events in got.values()] == alone
    assert all(len({event.request_id for event in share}) == len(share) for share in shares)
    assert max(map(len, shares)) > 1 and len(answer(other)) == 30


def test_an_event_of_a_request_that_was_cancelled_meanwhile_is_for_nobody(driver, monkeypatch):
    step, late, events = driver.engine.step, [], SimpleQueue()

    def one_behind():
        """A card's engine tells of a token after the step in which it was computed."""
        told, late[:] = list(late), step()
        return told

    monkeypatch.setattr(driver.engine, "step", one_behind)
    monkeypatch.setattr(type(driver.engine), "busy", property(lambda engine: late or engine.running or engine.waiting))
    first = driver.submit(asked(1, tokens=2000), events.put)
    events.get(timeout=PATIENCE)
    driver.cancel(first)
    second = SimpleQueue()
    driver.submit(asked(2), second.put)
    assert len(answer(second)) == 12


def test_submitting_and_cancelling_do_not_wait_for_the_step_under_way(driver, monkeypatch):
    within, go_on = threading.Event(), threading.Event()
    run_pass = driver.engine.runner.run

    def slowly(chunks):
        within.set()
        assert go_on.wait(PATIENCE)
        return run_pass(chunks)

    monkeypatch.setattr(driver.engine.runner, "run", slowly)
    first, second = SimpleQueue(), SimpleQueue()
    one = driver.submit(asked(1, tokens=500), first.put)
    assert within.wait(PATIENCE)
    driver.submit(asked(2), second.put)
    assert driver.waiting == 1
    driver.cancel(one)
    go_on.set()
    assert len(answer(second)) == 12
    assert first.qsize() <= 1, "the events of the step under way, and none after"


def test_a_request_that_cannot_run_is_refused_where_it_is_submitted(driver):
    with pytest.raises(RequestError):
        driver.submit(Request(()), lambda events: None)
    assert driver.waiting == 0


def test_a_bug_in_a_step_ends_the_requests_that_are_there_and_not_the_driver(driver, monkeypatch):
    events = SimpleQueue()
    with monkeypatch.context() as patch:
        patch.setattr(driver.engine.scheduler, "schedule", lambda: 1 / 0)
        driver.submit(MANY[0], events.put)
        (failure,) = answer(events)
    assert isinstance(failure.error, ZeroDivisionError)
    driver.submit(MANY[0], events.put)
    assert answer(events)[-1].finish_reason == "length"


def test_a_sink_that_fails_ends_its_own_request_and_no_other(model, driver):
    events = SimpleQueue()
    driver.submit(asked(1, tokens=2000), lambda events: 1 / 0)
    driver.submit(MANY[1], events.put)
    assert tokens(answer(events)) == tokens(run(Engine(model), MANY[1])[0])
    wait_until(lambda: not driver.engine.busy)


def test_stopping_ends_what_runs_and_waits_in_the_middle_of_a_step_and_tells_it(driver, monkeypatch):
    within, forward = threading.Event(), driver.engine.runner.run

    def endless(chunks):
        within.set()
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            pass
        return forward(chunks)

    sinks = [SimpleQueue() for _ in range(5)]
    with monkeypatch.context() as patch:
        patch.setattr(driver.engine.runner, "run", endless)
        for events in sinks:
            driver.submit(asked(1), events.put)
        assert within.wait(PATIENCE)
        assert driver.stop(PATIENCE / 2)
    for events in sinks:
        (failure,) = answer(events)
        assert isinstance(failure.error, RequestError)
    assert not driver.engine.busy and driver.engine.table.in_use == 0
    driver.submit(asked(1), sinks[0].put)
    assert len(answer(sinks[0])) == 12


def test_a_driver_that_is_let_go_of_ends_its_thread_and_frees_its_engine(model):
    before = threading.active_count()
    driver, events = Driver(Engine(model)), SimpleQueue()
    driver.submit(asked(1), events.put)
    answer(events)
    assert threading.active_count() == before + 1
    engine = weakref.ref(driver.engine)
    del driver
    wait_until(lambda: gc.collect() >= 0 and engine() is None and threading.active_count() == before)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_child_of_a_fork_neither_hangs_nor_inherits_what_runs():
    ours = Pixtral.load("tiny")
    stream = ours.stream(QUESTION, **LONG)
    next(stream)
    if (child := os.fork()) == 0:
        try:
            list(stream)
        except RequestError:
            os._exit(len(ours.chat(QUESTION, max_new_tokens=3).token_ids))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert next(stream).token_id is not None
    stream.close()


@pytest.mark.parametrize("ending", ["pass", "1 / 0", "raise KeyboardInterrupt", "model.chat(question)"])
def test_a_script_that_ends_within_an_answer_ends_at_once_and_without_a_crash(ending):
    script = f"""
from pixtral_cli import Pixtral
model = Pixtral.load("tiny")
question = {QUESTION}
streams = [model.stream(question, max_new_tokens=8000, ignore_eos=True) for _ in range(3)]
print([next(stream).finish_reason for stream in streams], flush=True)
{ending}
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=PATIENCE, text=True)
    expected = {"pass": 0, "1 / 0": 1, "raise KeyboardInterrupt": -2, "model.chat(question)": 0}
    assert (ended.stdout, ended.returncode) == ("[None, None, None]\n", expected[ending]), ended.stderr
    assert "engine" not in ended.stderr and "terminate" not in ended.stderr


def test_a_script_that_ends_while_the_thread_frees_a_model_that_it_let_go_of_does_not_crash():
    script = """
import queue, types
import torch
from pixtral_cli.engine.driver import Driver

class LargeModel:
    busy, waiting = False, 0
    scheduler = types.SimpleNamespace(add=lambda sequence: (begun.put(None), leave.get()))

    def prepare(self, request):
        return types.SimpleNamespace(id=0)

    def __del__(self):
        freeing.put(None)
        for _ in range(60):
            numbers.sort()  # lets go of the interpreter, as freeing memory does

begun, leave, freeing, numbers = queue.SimpleQueue(), queue.SimpleQueue(), queue.SimpleQueue(), torch.rand(200_000)
driver = Driver(LargeModel())
driver.submit(None, print)
begun.get()
del driver  # the last reference but the thread's
leave.put(None)
freeing.get()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=PATIENCE, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


LOADED = """
import os, sys, time
import torch
from pixtral_cli import Pixtral

def threads():
    return len(os.listdir("/proc/self/task"))

before = threads()
model = Pixtral.load("tiny", quantization_encoding="q4_k", devices="cpu")
until = time.monotonic() + float(sys.argv[1])
while threads() > before and time.monotonic() < until:
    time.sleep(0.01)
print(threads() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_loading_leaves_no_thread_behind_that_decoding_would_wait_for():
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(PATIENCE)],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert done.stdout == "0\n", done.stderr


def test_what_fails_on_a_thread_that_ends_fails_here():
    with pytest.raises(ZeroDivisionError):
        on_a_thread_that_ends(lambda: 1 // 0)
    assert on_a_thread_that_ends(lambda: 7) == 7
