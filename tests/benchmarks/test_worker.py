"""Real processes on a model small enough to start at once."""

import sys
from pathlib import Path

import pytest

from benchmarks.llama_cpp import F16, Q8_0, CacheOptions, LlamaCpp
from benchmarks.runners.miniphi import touch_cache
from benchmarks.worker import Worker, WorkerError, peak_memory
from miniphi.checkpoint import open_checkpoint, write_synthetic_gguf
from miniphi.engine.batch import Batch
from miniphi.engine.program import load_program
from miniphi.engine.speed import measure_decode
from tests.checkpoint.tiny_models import tiny_config

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peers' wheels are tried on Linux")

OPTIONS = {"num_threads": 1, "context": 64, "streams": 2, "cache": "default", "is_deep": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


def write_model(path: Path, **shape: int) -> Path:
    config = tiny_config("llama", num_hidden_layers=1, vocab_size=320, **shape)
    write_synthetic_gguf(path, config, scheme="q8", tokenizer_metadata={"tokenizer.ggml.model": "no_vocab"})
    return path


@pytest.mark.parametrize("runner", ["miniphi", "llama_cpp"])
def test_a_worker_times_prompts_and_streams(runner: str, model: Path) -> None:
    worker = Worker(sys.executable, runner, {"model": str(model), **OPTIONS})
    try:
        for work, arguments in (
            ("prefill", {"num_tokens": 20}),
            ("decode", {"depth": 4, "num_tokens": 3, "streams": 2}),
            ("decode", {"depth": 4, "num_tokens": 3, "streams": 2}),
        ):
            speed, peak = worker.ask(work, **arguments)
            assert speed > 0
            assert 1_000_000 < peak < 4_000_000_000
    finally:
        worker.close()


def test_an_engines_error_reaches_the_parent(tmp_path: Path) -> None:
    worker = Worker(sys.executable, "miniphi", {"model": str(tmp_path / "none.gguf"), **OPTIONS})
    with pytest.raises(WorkerError, match=r"none\.gguf"):
        worker.ask("prefill", num_tokens=1)
    worker.close()


def test_a_process_that_dies_is_told_from_one_that_answers(tmp_path: Path) -> None:
    worker = Worker(sys.executable, "miniphi", {"model": "", **OPTIONS})
    worker.close()
    with pytest.raises((WorkerError, ValueError)):
        worker.ask("prefill", num_tokens=1)


def test_peak_memory_is_read_from_the_process_status() -> None:
    assert peak_memory("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t 1024 kB\n") == 2 << 20
    assert peak_memory("Name:\tpython\n") == 0


def test_a_touched_cache_is_decoded_without_a_prompt(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoint(model) as checkpoint:
        program = load_program(checkpoint, num_threads=1, context=256, max_batch_tokens=3)
    run, batches = program.run, list[Batch]()

    def watched(batch: Batch) -> object:
        batches.append(batch)
        return run(batch)

    monkeypatch.setattr(program, "run", watched)
    touch_cache(program)
    assert sorted(int(block) for batch in batches for block in batch.block_tables[:, 0]) == list(range(8))
    batches.clear()
    assert measure_decode(program, 200, 2, is_filled=True) > 0
    assert [batch.positions.tolist() for batch in batches] == [[200], [201]]


@pytest.mark.parametrize(("flash_attention", "key_type", "value_type"), [(False, F16, F16), (True, Q8_0, Q8_0)])
def test_copies_of_a_prompt_are_as_long_as_a_longer_one(
    flash_attention: bool, key_type: int, value_type: int, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "tiny.gguf", hidden_size=128, head_dim=32)
    cache = CacheOptions(flash_attention=flash_attention, key_type=key_type, value_type=value_type, is_shared=True)
    whole, copied = (
        LlamaCpp(path, vocab_size=320, num_threads=1, context=256, streams=2, cache=cache) for _ in range(2)
    )
    whole.run([7] * 20, range(20), [0] * 20, [])
    copied.run([7] * 8, range(8), [0] * 8, [])
    copied.repeat(8, 20)
    assert copied.state_bytes(0) == whole.state_bytes(0)
    with pytest.raises(RuntimeError, match="llama_decode failed"):
        copied.run([3], [8], [0], [])  # the next position is 20
    expected, found = (engine.step([7], [20], [0], [0]) for engine in (whole, copied))
    # equal tokens have equal values in a model of one layer, whatever their keys: what attention gives is known
    assert abs(expected - found).max() < 0.03 * abs(expected).max()
    copied.cut(0, 20)
    assert (copied.step([7], [20], [0], [0]) == found).all()
