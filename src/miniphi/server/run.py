"""From an application to a running server: binding, signals, and an orderly end."""

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from miniphi.errors import InvalidRequestError
from miniphi.server.app import create_app
from miniphi.server.service import ModelService

__all__ = ["Server", "bind"]

DRAIN_S = 30.0
"""How long requests in flight may go on when the server is told to end"""
FAREWELL_S = 10
"""After that, to tell their clients"""


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes any free one. Binds before a model is loaded, so that it fails early.

    Raises: InvalidRequestError for a host that is not this machine alone, as nobody is asked for a key; OSError.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise InvalidRequestError(f"--host {host}: {error.strerror}") from None
    if not ipaddress.ip_address(address[0]).is_loopback:
        raise InvalidRequestError(
            f"--host {host} can be reached from other machines, and no keys protect the server; use 127.0.0.1"
        )
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"{error.strerror}; choose another --port", f"{host}:{port}") from None
    return listener


class Server(uvicorn.Server):
    """Serves until SIGINT or SIGTERM; then requests in flight have `drain_s` to end. A second signal ends them at once.

    Those that are ended are told so: a stream by an event with an error, others by a 503.
    """

    def __init__(
        self, service: ModelService, *, drain_s: float = DRAIN_S, on_ready: Callable[[], None] | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service),
                log_level="warning",
                timeout_graceful_shutdown=round(drain_s) + FAREWELL_S,
                server_header=False,
            )
        )
        self._service = service
        self._drain_s = drain_s
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and tell it."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self._on_ready is not None and self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let those in flight end, and end them when their time is over."""
        self._service.drain()
        deadline = asyncio.get_running_loop().call_later(self._drain_s, self._service.end_all)
        await super().shutdown(sockets)
        deadline.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal; the second one does not wait for those in flight."""
        if self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._service.end_all)
        else:
            super().handle_exit(sig, frame)
