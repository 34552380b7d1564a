"""Many clients at once, a fifth of whom leave in the middle: everyone who stays is answered, and nothing is left."""

import asyncio
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import traffic
from support.processes import wait_until
from support.serving import served

LITTLE = ("--kv-cache-memory", "16MiB", "--image-cache-memory", "4MiB", "--quantization-encoding", "float32")
"""Caches that the first load fills: what grows afterwards is a leak."""
AS_IT_COMES = ("--image-cache-memory", "4MiB")
"""The features of so many pictures are all that a server may go on to fill its memory with for thousands of requests,
up to --image-cache-memory."""
POOLS = 4 + 64
"""Threads that the server may have for prompts; they come as they are needed and stay."""
STATE = ("pixtral_requests_running", "pixtral_requests_queued", "pixtral_kv_cache_used_ratio")
CONNECTIONS_CLOSE = 3.0  # seconds


@pytest.fixture(scope="module")
def crowded():
    with served(*LITTLE) as server:
        yield server


def state(server):
    text = server.open("/metrics").read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    values = {sample.name: sample.value for sample in samples}
    return {name: values[name] for name in STATE}


def wait_until_idle(server):
    wait_until(lambda: not any(state(server).values()))


def held(server):
    """(file handles, threads, resident bytes) of the process, once its connections have closed."""
    wait_until_idle(server)
    time.sleep(CONNECTIONS_CLOSE)
    process = Path(f"/proc/{server.process.pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return len(list((process / "fd").iterdir())), int(status["Threads"]), int(status["VmRSS"].split()[0]) * 1024


def load(server, numbers):
    begun = time.perf_counter()
    outcome = asyncio.run(traffic.many(urlsplit(server.url).port, numbers))
    return outcome, time.perf_counter() - begun


def check(server, outcome, numbers):
    assert outcome.wrong == [] and set(outcome.statuses) == {200}
    assert outcome.statuses.total() + outcome.cuts.total() == len(numbers)
    assert 0.1 < outcome.cuts.total() / len(numbers) < 0.3
    wait_until_idle(server)
    assert "Traceback" not in server.said() and "error" not in server.said(), server.said()[-4000:]


def test_who_stays_is_answered_while_others_leave_and_no_page_stays_taken(crowded):
    numbers = range(150)
    outcome, _ = load(crowded, numbers)
    check(crowded, outcome, numbers)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_after_2000_requests_of_64_clients_all_is_as_before(crowded, capsys):
    idle = held(crowded)
    warm, _ = load(crowded, range(10_000, 11_000))
    check(crowded, warm, range(1000))
    before = held(crowded)
    outcome, seconds = load(crowded, range(20_000, 22_000))
    check(crowded, outcome, range(2000))
    after = held(crowded)
    with capsys.disabled():
        print(f"\n2,000 requests in {seconds:.0f} s; cut: {dict(outcome.cuts)}; {before} -> {after}")
    assert after[0] == before[0] and after[1] <= idle[1] + POOLS
    assert after[2] <= before[2] * 1.05


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_after_a_thousand_requests_a_server_has_the_memory_that_it_needs(capsys):
    with served(*AS_IT_COMES) as server:
        check(server, load(server, range(30_000, 31_000))[0], range(1000))
        before = held(server)[2]
        check(server, load(server, range(40_000, 42_000))[0], range(2000))
        after = held(server)[2]
    with capsys.disabled():
        print(f"\nresident after 1,000 requests: {before / 2**20:.0f} MiB, after 3,000: {after / 2**20:.0f} MiB")
    assert after <= before + 48 * 2**20
