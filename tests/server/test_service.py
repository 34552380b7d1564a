"""Events of the engine on their way to those who asked: in order, together, and nobody waits for another's reader."""

import asyncio
from contextlib import aclosing
from types import SimpleNamespace

from support.processes import PATIENCE

from pixtral_cli.engine.request import TokenEvent
from pixtral_cli.server.service import EventLoopBridge
from pixtral_cli.server.wire import AnswerRequest


def asked(n=1, tokens=40):
    options = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
    return AnswerRequest("text", "tiny", options, prompts=["The red circle is"], n=n, stream=True)


def on_loop(server, work):
    return asyncio.run_coroutine_threadsafe(work, server.loop).result(PATIENCE)


def test_who_takes_no_events_holds_up_no_other_and_misses_none(server):
    async def ask():
        async with aclosing(server.service.answer(asked())) as slow:
            begun = await anext(slow)
            (reply,) = await server.service.replies(asked())
            got = begun + [event async for events in slow for event in events]
        return reply, got

    reply, got = on_loop(server, ask())
    assert [event.token_id for _, event in got] == reply.token_ids == got[-1][1].reply.token_ids
    assert len(reply.token_ids) == 40


def test_every_answer_gets_its_tokens_in_order_whatever_comes_together(server):
    async def ask():
        async with aclosing(server.service.answer(asked(n=4))) as events:
            return [event async for batch in events for event in batch]

    got = on_loop(server, ask())
    for place in range(4):
        mine = [event for at, event in got if at == place]
        assert [event.token_id for event in mine] == mine[-1].reply.token_ids
        assert [event.usage.completion_tokens for event in mine] == list(range(1, 41))


def test_the_event_loop_is_woken_once_for_all_events_of_a_step():
    class Receiver:
        def __init__(self):
            self.got = []

        def receive(self, arrival):
            self.got.append(arrival.event.token_id)

    async def deliver():
        sinks, woken, loop = [], [], asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda call, *args, **more: woken.append(call) or wake(call, *args, **more)
        driver = SimpleNamespace(
            submit=lambda request, sink: sinks.append(sink) or len(sinks) - 1, cancel=lambda id: None
        )
        bridge, receivers = EventLoopBridge(driver), [Receiver() for _ in range(3)]
        ids = [bridge.submit(None, receiver) for receiver in receivers]
        assert all(sink == sinks[0] for sink in sinks), "one for the driver to call"
        await asyncio.to_thread(sinks[0], [TokenEvent(id, 10 + id) for id in ids])
        bridge.cancel(ids[2])
        await asyncio.to_thread(sinks[0], [TokenEvent(id, 20 + id) for id in ids])
        await asyncio.sleep(0)
        return [call for call in woken if call == bridge._deliver], [receiver.got for receiver in receivers]

    woken, got = asyncio.run(deliver())
    assert len(woken) == 2
    assert got == [[10, 20], [11, 21], [12]]
