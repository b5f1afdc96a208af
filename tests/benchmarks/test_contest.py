import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import contest
from benchmarks.contest import Settings, hold
from benchmarks.engines import Engine, Variant
from benchmarks.limits import Demand
from benchmarks.results import Block
from benchmarks.worker import WorkerError
from benchmarks.works import LARGE, Work
from miniphi.config import ModelConfig

from .measured import DECODE, SLOW

WORK = Work(name="decode", label="decode", kind="decode", num_tokens=8, depth=16)


class FakeEngine(Engine):
    """An engine of two settings that need the same."""

    def variants(self, work: Work, folder: Path) -> list[Variant]:
        return [{"speed": 1}, {"speed": 2}] if self.runner == "two" else [{"speed": 1}]

    def demand(self, work: Work, config: ModelConfig, path: Path, variant: Variant) -> Demand | None:
        return DECODE

    def kv_value_bytes(self, work: Work, config: ModelConfig, variant: Variant) -> float:
        return 1.0


class FakeWorkers:
    """Processes that answer at once; remembers who was asked and who is alive."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.alive: set[object] = set()
        self.on_ask: Callable[[str], None] = lambda name: None

    def start(self, engine: Engine, path: Path, work: Work, variant: Mapping[str, object], num_threads: int) -> object:
        workers = self

        class FakeWorker:
            def ask(self, kind: str, *, num_tokens: int, **arguments: object) -> tuple[float, int]:
                workers.asked.append((engine.name, num_tokens))
                workers.on_ask(engine.name)
                return float(str(variant["speed"])), 1000

            def close(self) -> None:
                workers.alive.discard(self)

        worker = FakeWorker()
        self.alive.add(worker)
        return worker


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> FakeWorkers:
    fake = FakeWorkers()
    monkeypatch.setattr(contest, "start_worker", fake.start)
    monkeypatch.setattr(contest, "_calibrate", lambda meter: SLOW)
    monkeypatch.setattr(contest, "PAUSE_S", 0)
    return fake


def engine(name: str, tmp_path: Path, runner: str = "one") -> Engine:
    path = tmp_path / "model"
    path.write_bytes(b"weights")
    return FakeEngine(name=name, version="1", python="", runner=runner, model_file=lambda model, folder: path)


def held(tmp_path: Path, *engines: Engine, repeats: int = 3, seconds: float = 60.0, work: Work = WORK) -> Block:
    block = Block(model=LARGE, work="decode", label="decode", unit="tok/s")
    settings = Settings(num_threads=1, repeats=repeats, folder=tmp_path)
    hold(block, work, {engine.name: engine for engine in engines}, settings, time.monotonic() + seconds)
    return block


def test_engines_take_turns_after_a_short_trial(workers: FakeWorkers, tmp_path: Path) -> None:
    block = held(tmp_path, engine("a", tmp_path), engine("b", tmp_path))
    assert workers.asked == [("a", 2), ("b", 2)] + 3 * [("a", 8), ("b", 8)]
    assert [sample.engine for sample in block.samples] == ["a", "b"] * 3
    assert block.demands == {"a": DECODE, "b": DECODE}
    assert not workers.alive


def test_every_repeat_is_cut_into_slices(workers: FakeWorkers, tmp_path: Path) -> None:
    block = held(tmp_path, engine("a", tmp_path), engine("b", tmp_path), repeats=2, work=replace(WORK, slices=3))
    assert [sample.engine for sample in block.samples] == ["a", "b"] * 6


def test_the_fastest_setting_goes_on_and_the_other_ends(workers: FakeWorkers, tmp_path: Path) -> None:
    alive: list[int] = []
    workers.on_ask = lambda name: alive.append(len(workers.alive))
    block = held(tmp_path, engine("a", tmp_path, "two"), repeats=1)
    assert block.values("a") == [2.0]
    assert block.variants == {"a": "speed 2"}
    assert alive == [1, 1, 2, 2, 1]  # the first warms up and is tried, then the second, and one of them is left


def test_an_engine_that_fails_is_noted_and_the_others_go_on(workers: FakeWorkers, tmp_path: Path) -> None:
    def fail(name: str) -> None:
        if name == "b" and len(workers.asked) > 3:
            raise WorkerError("it ran out of memory")

    workers.on_ask = fail
    block = held(tmp_path, engine("a", tmp_path), engine("b", tmp_path))
    assert (len(block.values("a")), len(block.values("b"))) == (3, 0)
    assert block.missing == {"b": "it ran out of memory"}


def test_no_round_starts_that_would_pass_the_deadline(workers: FakeWorkers, tmp_path: Path) -> None:
    workers.on_ask = lambda name: time.sleep(0.02)
    block = held(tmp_path, engine("a", tmp_path), repeats=100, seconds=0.2)
    assert 1 <= len(block.samples) < 12
    assert len(held(tmp_path, engine("a", tmp_path), repeats=100, seconds=-1).samples) == 1


def test_an_interrupt_keeps_what_was_measured_and_ends_all_processes(workers: FakeWorkers, tmp_path: Path) -> None:
    def interrupt(name: str) -> None:
        if len(workers.asked) == 5:
            raise KeyboardInterrupt

    workers.on_ask = interrupt
    block = Block(model=LARGE, work="decode", label="decode", unit="tok/s")
    engines = {name: engine(name, tmp_path) for name in ("a", "b")}
    with pytest.raises(KeyboardInterrupt):
        hold(block, WORK, engines, Settings(num_threads=1, repeats=9, folder=tmp_path), time.monotonic() + 60)
    assert len(block.samples) == 2
    assert not workers.alive


def test_where_memory_is_short_one_process_makes_room(
    workers: FakeWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        available_bytes = 0

    alive: list[int] = []
    workers.on_ask = lambda name: alive.append(len(workers.alive))
    monkeypatch.setattr(contest, "machine_memory", Full)
    block = held(tmp_path, engine("a", tmp_path), engine("b", tmp_path), repeats=2)
    assert len(block.samples) == 4
    assert set(alive) == {1}
