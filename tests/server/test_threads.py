"""Work on threads that end with it."""

import asyncio
import threading

import pytest
from support.processes import PATIENCE

from pixtral_cli.server.threads import Threads


def test_each_thread_ends_with_its_work_and_so_many_run_at_most():
    running, most, workers, lock, full = set(), [], [], threading.Lock(), threading.Event()

    def work(number):
        with lock:
            workers.append(threading.current_thread())
            running.add(number)
            most.append(len(running))
            if len(running) == 3:
                full.set()
        full.wait(PATIENCE)
        with lock:
            running.remove(number)
        return number

    async def all_of_it():
        threads = Threads(3, "few")
        return await asyncio.gather(*(threads.run(lambda n=n: work(n)) for n in range(12))), threads.busy

    assert asyncio.run(all_of_it()) == (list(range(12)), 0)
    for worker in workers:
        worker.join(PATIENCE)
    assert max(most) == 3 and len(set(workers)) == 12 and not any(worker.is_alive() for worker in workers)


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
