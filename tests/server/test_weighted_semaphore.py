"""What threads share comes to each in its turn."""

from __future__ import annotations

import threading
import time

import pytest

from pixtral_cli.server.threads import WeightedSemaphore

LONG = 20.0


def waiting(room, *amounts):
    """Threads that wait for so much in this order, and the list of those that got it; each holds it until `go_on`."""
    got, go_on = [], threading.Event()

    def hold(amount):
        with room.held(amount, LONG):
            got.append(amount)
            go_on.wait(LONG)

    threads = []
    for amount in amounts:
        threads.append(threading.Thread(target=hold, args=(amount,)))
        threads[-1].start()
        until(lambda: len(room._waiting) + len(got) == len(threads))
    return threads, got, go_on


def until(condition):
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def end(threads, go_on):
    go_on.set()
    for thread in threads:
        thread.join(LONG)


def test_there_is_never_more_than_the_room_holds():
    room, most, held, lock = WeightedSemaphore(10), [], [0], threading.Lock()

    def hold(amount):
        with room.held(amount, LONG):
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
        thread.join(LONG)
    assert len(most) == 60 and max(most) <= 10 and room.free == 10


def test_who_comes_later_does_not_pass_one_that_waits_for_more():
    room = WeightedSemaphore(10)
    with room.held(6, LONG):
        threads, got, go_on = waiting(room, 8, 3)
        assert got == []
    until(lambda: got == [8])
    end(threads, go_on)
    assert got == [8, 3]


def test_what_is_larger_than_the_room_goes_alone():
    room = WeightedSemaphore(10)
    with room.held(1, LONG):
        threads, got, go_on = waiting(room, 99, 1)
        assert got == []
    until(lambda: got == [99])
    assert room.free == 0
    end(threads, go_on)
    assert got == [99, 1] and room.free == 10


def test_who_has_waited_too_long_leaves_and_holds_up_nobody():
    room = WeightedSemaphore(10)
    with room.held(5, LONG):
        with pytest.raises(TimeoutError), room.held(6, 0.01):
            pass
        with room.held(5, LONG):
            pass
    assert room.free == 10
