"""The library in C is found or says why not, and its pool computes every chunk once, whoever calls."""

import ctypes
import os
import subprocess
import sys
import threading
from collections import Counter

import pytest

from pixtral_cli.model.kernels import native

CHUNK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long)
compiled = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))


def parallel_for(work, chunks, threads):
    run = native.function("pixtral_parallel_for", CHUNK, ctypes.c_void_p, ctypes.c_long, ctypes.c_int)
    run(CHUNK(lambda _, chunk: work(chunk)), None, chunks, threads)


def said(program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@compiled
@pytest.mark.parametrize("threads", [0, 1, 2, 3, 8, 1000])
@pytest.mark.parametrize("chunks", [0, 1, 2, 7, 200])
def test_every_chunk_is_computed_once(chunks, threads):
    for _ in range(5):
        seen = []
        parallel_for(seen.append, chunks, threads)
        assert sorted(seen) == list(range(chunks))


@compiled
def test_no_more_threads_work_than_are_asked_for():
    parallel_for(lambda _: None, 64, 8)  # the pool now has more threads
    workers = set()
    parallel_for(lambda _: workers.add(threading.get_native_id()), 500, 2)
    assert 1 <= len(workers) <= 2


@compiled
def test_several_callers_at_once_get_their_own_chunks():
    counts = [Counter() for _ in range(4)]

    def call(count):
        for _ in range(20):
            parallel_for(lambda chunk: count.update([chunk]), 30, 3)

    callers = [threading.Thread(target=call, args=(count,)) for count in counts]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert counts == [Counter(dict.fromkeys(range(30), 20))] * 4


@compiled
def test_a_chunk_may_have_chunks_of_its_own():
    seen = []
    parallel_for(lambda outer: parallel_for(lambda inner: seen.append((outer, inner)), 5, 2), 4, 2)
    assert sorted(seen) == [(outer, inner) for outer in range(4) for inner in range(5)]


@compiled
def test_a_child_of_a_process_whose_pool_runs_has_a_pool_of_its_own():
    seen = []
    parallel_for(seen.append, 50, 3)
    child = os.fork()
    if child == 0:
        counted = []
        parallel_for(counted.append, 50, 3)
        os._exit(0 if sorted(counted) == list(range(50)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


ASK = "from pixtral_cli.model.kernels import native; print(native.available(), native.instructions(), native.why_not())"


@compiled
def test_instructions_can_be_chosen_among_those_that_the_processor_has():
    best = native.INSTRUCTIONS.index(said(ASK, PIXTRAL_CPU_KERNELS="").split()[1])
    for place, name in enumerate(native.INSTRUCTIONS):
        found = said(ASK, PIXTRAL_CPU_KERNELS=name)
        assert found == f"True {name} None" if place <= best else found.startswith("False off")


@pytest.mark.parametrize(
    ("setting", "reason"), [("off", "PIXTRAL_CPU_KERNELS is off."), ("sse9", "none of off, portable, avx2")]
)
def test_a_library_that_is_not_used_says_why(setting, reason):
    found = said(ASK, PIXTRAL_CPU_KERNELS=setting)
    assert found.startswith("False off") and reason in found
