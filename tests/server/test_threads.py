"""Work on threads that end with it."""

import asyncio
import threading
import time

import pytest

from pixtral_cli.server.threads import Threads


def named(name):
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_each_thread_ends_with_its_work_and_so_many_run_at_most():
    most = []

    def work(number):
        most.append(len(named("few")))
        time.sleep(0.02)
        return number

    async def all_of_it():
        threads = Threads(3, "few")
        found = await asyncio.gather(*(threads.run(lambda n=n: work(n)) for n in range(12)))
        await asyncio.sleep(0.05)
        return found, threads.busy

    assert asyncio.run(all_of_it()) == (list(range(12)), 0)
    assert max(most) == 3 and named("few") == []


def test_what_the_work_raises_is_raised_to_who_waits():
    async def fails():
        await Threads(1, "failing").run(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(fails())


def test_who_leaves_does_not_wait_and_the_place_is_taken_until_the_work_ends():
    go = threading.Event()

    async def leave():
        threads = Threads(1, "slow")
        first = asyncio.create_task(threads.run(lambda: go.wait(10)))
        await asyncio.sleep(0.05)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        second = asyncio.create_task(threads.run(lambda: "done"))
        await asyncio.sleep(0.05)
        taken = threads.busy, second.done()
        go.set()
        return taken, await second

    assert asyncio.run(leave()) == ((1, False), "done")
