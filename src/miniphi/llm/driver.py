"""Steps one engine for everybody who waits for it, from any thread.

Owns the lock around the engine and hands each token to the request it belongs to. Knows no text.
"""

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from miniphi.engine import Engine, Request, SequenceOutput
from miniphi.errors import MiniphiError

__all__ = ["EngineDriver", "OutputSink"]


class OutputSink(Protocol):
    """Takes what the engine produces for one request; called while the engine waits, so it must be quick."""

    def accept(self, output: SequenceOutput, now_s: float) -> bool:
        """Take one token, sampled at `now_s` (perf_counter), and say whether its sequence must end here."""

    def fail(self, error: Exception) -> None:
        """Learn that the engine ended the request because a step failed."""


class EngineDriver:
    """Shares one engine between requests.

    Whoever waits for a token runs the engine's next step for all requests in flight, so requests of several threads
    are batched together and no thread of its own is needed. A step is never torn apart by Ctrl-C: the interrupt is
    raised when the step and the delivery of its tokens are done.
    """

    def __init__(self, engine: Engine, *, on_first_rest: Callable[[], None] | None = None) -> None:
        """`on_first_rest` is called once, when the first requests have all been answered."""
        self.engine = engine
        self._on_first_rest = on_first_rest
        self._lock = threading.Lock()
        self._sinks: dict[str, OutputSink] = {}
        self._aborts: deque[str] = deque()
        self._posts: deque[tuple[Request, OutputSink]] = deque()

    def submit(self, request: Request, sink: OutputSink) -> None:
        """Queue a request, whose tokens go to `sink`; what the engine refuses is raised here."""
        with self._lock, _interrupts_deferred():
            self._take_orders()
            self.engine.submit(request)
            self._sinks[request.id] = sink

    def post(self, request: Request, sink: OutputSink) -> None:
        """Queue a request without waiting for a step that is running; what the engine refuses goes to `sink.fail`."""
        self._posts.append((request, sink))

    def run_pending(self) -> bool:
        """Run one step for whatever was submitted or posted, if anything was; say whether there is more to do."""
        with self._lock, _interrupts_deferred():
            self._take_orders()
            if self.engine.has_work:
                self._step()
            return self.engine.has_work

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Run steps until `is_done`, which the delivered tokens make true."""
        while not is_done():
            with self._lock:
                if not is_done():
                    self._step()

    def forget(self, request_id: str) -> None:
        """Stop delivering to a request, and end it and free its blocks if it is still in flight.

        Safe at any moment, also while this thread is inside a step (a finaliser may call it): the engine is then told
        before its next step.
        """
        self._aborts.append(request_id)
        if self._lock.acquire(blocking=False):
            try:
                with _interrupts_deferred():
                    self._take_orders()
            finally:
                self._lock.release()

    def _step(self) -> None:
        with _interrupts_deferred():
            self._take_orders()
            assert self.engine.has_work, "somebody waits for an engine that has nothing to do"
            try:
                outputs = self.engine.step()
            except Exception as error:
                self._fail(error)
                return
            self._deliver(outputs, time.perf_counter())
            if self._on_first_rest is not None and not self.engine.has_work:
                on_first_rest, self._on_first_rest = self._on_first_rest, None
                on_first_rest()

    def _deliver(self, outputs: Iterable[SequenceOutput], now_s: float) -> None:
        ended: set[tuple[str, int]] = set()
        for output in outputs:
            key = output.request_id, output.index
            if key in ended:  # the tokens that a step guessed behind a stop string
                continue
            must_end = self._sinks[output.request_id].accept(output, now_s)
            if must_end and output.finish_reason is None:
                ended.add(key)
                self.engine.abort(*key)

    def _fail(self, error: Exception) -> None:
        """Tell those whose requests ended with the step; the others go on."""
        if not self.engine.failed_request_ids:
            raise error
        for request_id in self.engine.failed_request_ids:
            self._sinks[request_id].fail(error)

    def _take_orders(self) -> None:
        """Submit what was posted, then end what was forgotten: a request may be both by now."""
        while self._posts:
            request, sink = self._posts.popleft()
            try:
                self.engine.submit(request)
            except MiniphiError as error:
                sink.fail(error)
            else:
                self._sinks[request.id] = sink
        while self._aborts:
            request_id = self._aborts.popleft()
            if self._sinks.pop(request_id, None) is not None:
                self.engine.abort(request_id)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Let the block finish before a Ctrl-C takes effect; only the main thread receives one."""
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(handler):
        yield
        return
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)
