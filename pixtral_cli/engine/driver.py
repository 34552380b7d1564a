"""Steps an engine on a thread of its own, for as long as a server lives. Knows no text and no HTTP."""

from __future__ import annotations

import threading

from pixtral_cli.engine.engine import Engine, Sink
from pixtral_cli.engine.request import Request


class Driver:
    """Requests may be submitted and cancelled from any thread at any time; neither waits for a step.

    Their events are given to their sinks on the worker's thread, so a sink should only pass them on.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are being worked on."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, request: Request, sink: Sink) -> int:
        """Queue a request, which `Engine.check` has accepted -> its id."""
        request_id = self.engine.submit(request, sink)
        self._wake.set()
        return request_id

    def cancel(self, request_id: int) -> None:
        """Drop a request before the next step; no event comes after the one that is under way."""
        self.engine.cancel(request_id)
        self._wake.set()

    def stop(self, timeout: float | None = None) -> bool:
        """End after the step under way, whatever still runs or waits -> whether it has ended in `timeout` seconds."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait()
            self._wake.clear()
            self._step()  # at least one, for what was cancelled
            while self.engine.busy and not self._stopping:
                self._step()

    def _step(self) -> None:
        """A step that fails as a whole is a bug: who is there learns of it, and who comes next is answered."""
        try:
            self.engine.step()
        except Exception as error:
            self.engine.fail(error)
