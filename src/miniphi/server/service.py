"""The model behind the routes: its names, its queue, and the way into the engine.

Knows neither HTTP nor the shape of any answer. Work that takes processor time (templates, tokenising) runs in threads,
so that the event loop and the streams on it go on.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

from miniphi.engine import Request
from miniphi.llm import LLM, EngineThread, LiveStream
from miniphi.server.errors import ApiError
from miniphi.version import __version__

__all__ = ["ModelService", "Observer", "ServiceLimits"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ServiceLimits:
    """How much may be asked for at once."""

    max_requests: int = 128
    """requests in flight, waiting ones included; further ones are told to come back"""
    max_body_bytes: int = 16 << 20
    retry_after_s: int = 1


class Observer(Protocol):
    """Takes note of requests."""

    def on_end(self, stream: LiveStream) -> None:
        """Learn that a request has ended."""


class ModelService:
    """One loaded model, for an event loop."""

    def __init__(self, llm: LLM, *, names: tuple[str, ...] = (), limits: ServiceLimits | None = None) -> None:
        """Serve a model under `names`, the first of which it calls itself; without any, under its own name."""
        self.llm = llm
        self.names = names or (llm.name,)
        self.limits = limits or ServiceLimits()
        self.created_s = int(time.time())
        identity = f"{llm.name} {__version__}".encode()
        self.fingerprint = "fp_" + hashlib.blake2b(identity, digest_size=5).hexdigest()
        """the same as long as the same seed gives the same answer"""
        self._thread = EngineThread(llm.driver, llm.tokenizer)
        self.observer: Observer | None = None
        self._workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="prepare")
        self._is_draining = False

    @property
    def name(self) -> str:
        """What the model calls itself in answers."""
        return self.names[0]

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return not self._is_draining and self._thread.error is None

    @property
    def failure(self) -> Exception | None:
        """What ended the engine, if anything did: only a new process helps then."""
        return self._thread.error

    def observe(self, observer: Observer) -> None:
        """Tell an observer of every request that ends."""
        self.observer = observer
        self._thread.on_end = observer.on_end

    def start(self) -> None:
        """Begin to compute, on behalf of the running event loop."""
        self._thread.start()

    def drain(self) -> None:
        """Take no more requests; those in flight go on."""
        self._is_draining = True

    def end_all(self) -> None:
        """End those in flight: their clients are told why."""
        self.drain()
        self._thread.fail_all(_shutting_down({}))

    async def stop(self) -> None:
        """End what is still in flight, and the engine's thread."""
        self.end_all()
        await self._thread.stop()
        self._workers.shutdown()

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 if a request names another model; one that names none means this one."""
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                404,
                f"the model {name!r} is not served here; this server has {known}",
                param="model",
                code="model_not_found",
            )

    def prepare(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Run something that takes processor time in a thread."""
        return asyncio.get_running_loop().run_in_executor(self._workers, lambda: work(*args, **kwargs))

    def open(self, requests: list[Request]) -> list[LiveStream]:
        """Post requests that belong together, all or none of them.

        Raises: ApiError 429 if too much is in flight, 503 if the server is ending; what the engine refuses.
        """
        retry = {"retry-after": str(self.limits.retry_after_s)}
        if self._is_draining:
            raise _shutting_down(retry)
        free = self.limits.max_requests - self._thread.num_open
        if len(requests) > self.limits.max_requests:
            raise ApiError(
                400,
                f"{len(requests)} prompts in one request; this server takes up to {self.limits.max_requests}",
                param="prompt",
            )
        if len(requests) > free:
            raise ApiError(
                429,
                f"{self._thread.num_open} requests are in flight and this server takes {self.limits.max_requests}; "
                f"try again in {self.limits.retry_after_s} s",
                code="server_busy",
                headers=retry,
            )
        streams: list[LiveStream] = []
        try:
            for request in requests:
                streams.append(self._thread.open(request))
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams


def _shutting_down(headers: dict[str, str]) -> ApiError:
    return ApiError(503, "the server is shutting down; try another one", code="shutting_down", headers=headers)
