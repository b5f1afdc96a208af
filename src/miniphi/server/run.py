"""From an application to a running server: binding, signals, and an orderly end."""

import ipaddress
import socket
from collections.abc import Callable

import uvicorn

from miniphi.errors import InvalidRequestError
from miniphi.server.app import DRAIN_S, create_app
from miniphi.server.service import ModelService

__all__ = ["Server", "bind"]


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
    """Serves until SIGINT or SIGTERM; then requests in flight have `drain_s` to end. A second signal ends at once."""

    def __init__(
        self, service: ModelService, *, drain_s: float = DRAIN_S, on_ready: Callable[[], None] | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service, drain_s=drain_s),
                log_level="warning",
                timeout_graceful_shutdown=max(1, round(drain_s)),
                server_header=False,
            )
        )
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and tell it."""
        await super().startup(sockets)
        if self._on_ready is not None and self.started:
            self._on_ready()
