"""A real server on loopback around a fake model, and the real client."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import httpx2
import openai
import pytest

from miniphi.llm import LLM
from miniphi.server import ModelService, Server, ServiceLimits, bind
from tests.fake_llm import make_llm


@dataclass
class Running:
    url: str
    service: ModelService
    server: Server
    http: httpx2.Client
    client: openai.OpenAI


@contextmanager
def serving(
    llm: LLM, *, names: tuple[str, ...] = (), limits: ServiceLimits | None = None, drain_s: float = 5
) -> Iterator[Running]:
    listener = bind("127.0.0.1", 0)
    ready = threading.Event()
    service = ModelService(llm, names=names, limits=limits)
    server = Server(service, drain_s=drain_s, on_ready=ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert ready.wait(10)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with (
            httpx2.Client(base_url=url, timeout=30) as http,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client,
        ):
            yield Running(url, service, server, http, client)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


Serve = Callable[..., Running]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that end with the test."""
    with ExitStack() as stack:
        yield lambda llm, **options: stack.enter_context(serving(llm, **options))


@pytest.fixture(scope="package")
def running() -> Iterator[Running]:
    """One server for all tests that change nothing; its model answers with the question."""
    with serving(make_llm(), names=("echo", "alias")) as running:
        yield running


@pytest.fixture
def client(running: Running) -> openai.OpenAI:
    return running.client
