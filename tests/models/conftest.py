"""A cache of its own for every test of this room, and a hub on loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .fake_hub import FakeHub


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MINIPHI_HOME", str(folder))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from miniphi.models import hub as hub_module

    fake = FakeHub()
    server = fake.serve()
    monkeypatch.setattr(hub_module, "RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    monkeypatch.setenv("HF_ENDPOINT", fake.endpoint)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield fake
    server.shutdown()
    server.server_close()
