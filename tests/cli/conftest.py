"""Runs command lines in this process, against a fake model and an empty cache."""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from miniphi.cli.main import main
from miniphi.llm import LLM
from tests.fake_llm import make_llm


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on stderr."""
        assert self.err.count("\n") == 1
        assert self.err.startswith("miniphi: error: ")
        return self.err.removeprefix("miniphi: error: ").strip()


Run = Callable[..., Result]


@dataclass
class FakeModels:
    """What the commands load and fetch instead of real models."""

    llm: LLM
    loaded: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    pulled: list[str] = field(default_factory=list)

    def load(self, name: str, **options: Any) -> LLM:
        self.loaded.append((name, options))
        return self.llm

    def pull(self, name: str, **options: Any) -> Path:
        self.pulled.append(name)
        return Path("/models", name)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MINIPHI_HOME", str(folder))
    monkeypatch.delenv("MINIPHI_DEBUG", raising=False)
    return folder


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> FakeModels:
    fake = FakeModels(make_llm())
    monkeypatch.setattr("miniphi.llm.load", fake.load)
    monkeypatch.setattr("miniphi.models.pull", fake.pull)
    return fake


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def run_main(*argv: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = main(argv)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run_main
