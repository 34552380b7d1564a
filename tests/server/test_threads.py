"""Work on threads that end with it; what threads share comes to each in its turn."""

import asyncio
import threading
import time

import pytest
from support.processes import PATIENCE, wait_until

from pixtral_cli.server.threads import Threads, WeightedSemaphore


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


def waiting(semaphore, *amounts):
    """Threads that wait for so much in this order, and the list of those that got it; each holds it until `go_on`."""
    got, go_on = [], threading.Event()

    def hold(amount):
        with semaphore.held(amount, PATIENCE):
            got.append(amount)
            go_on.wait(PATIENCE)

    threads = []
    for amount in amounts:
        threads.append(threading.Thread(target=hold, args=(amount,)))
        threads[-1].start()
        wait_until(lambda: len(semaphore._waiting) + len(got) == len(threads))
    return threads, got, go_on


def end(threads, go_on):
    go_on.set()
    for thread in threads:
        thread.join(PATIENCE)


def test_there_is_never_more_than_the_room_holds():
    semaphore, most, held, lock = WeightedSemaphore(10), [], [0], threading.Lock()

    def hold(amount):
        with semaphore.held(amount, PATIENCE):
            with lock:
                held[0] += amount
                most.append(held[0])
            time.sleep(0.001)
            with lock:
                held[0] -= amount

    threads = [threading.Thread(target=hold, args=(1 + number % 7,)) for number in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(most) == 60 and max(most) <= 10 and semaphore.free == 10


def test_who_comes_later_does_not_pass_one_that_waits_for_more():
    semaphore = WeightedSemaphore(10)
    with semaphore.held(6, PATIENCE):
        threads, got, go_on = waiting(semaphore, 8, 3)
        assert got == []
    wait_until(lambda: got == [8])
    end(threads, go_on)
    assert got == [8, 3]


def test_what_is_larger_than_the_room_goes_alone():
    semaphore = WeightedSemaphore(10)
    with semaphore.held(1, PATIENCE):
        threads, got, go_on = waiting(semaphore, 99, 1)
        assert got == []
    wait_until(lambda: got == [99])
    assert semaphore.free == 0
    end(threads, go_on)
    assert got == [99, 1] and semaphore.free == 10


def test_who_has_waited_too_long_leaves_and_holds_up_nobody():
    semaphore = WeightedSemaphore(10)
    with semaphore.held(5, PATIENCE):
        with pytest.raises(TimeoutError), semaphore.held(6, 0.01):
            pass
        with semaphore.held(5, PATIENCE):
            pass
    assert semaphore.free == 10
