import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from miniphi.kernels import Meter
from miniphi.models import MachineMemory
from tests.checkpoint.tiny_models import tiny_config
from tests.fake_llm import write_tiny_model

from .conftest import FakeModels, Run

SMALL = ("--prompt", "40", "--tokens", "3", "--streams", "2", "--repeats", "1", "--threads", "1")


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miniphi.engine.speed.Meter", partial(Meter, bytes_per_thread=1 << 22))


@pytest.fixture
def tiny_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalog whose only model has a context of 256 tokens; its rows divide into the blocks of every format."""
    entry = SimpleNamespace(model_config=partial(tiny_config, "phi3", intermediate_size=128))
    monkeypatch.setattr("miniphi.models.find_entry", lambda name: entry)


@pytest.mark.parametrize("kind", ["q4", "q4_0", "q8"])
@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_json_has_every_figure(kind: str, kv: str, run: Run, tiny_entry: None) -> None:
    result = run("bench", "--synthetic", "tiny", "--type", kind, "--kv", kv, "--json", *SMALL)
    assert result.code == 0
    report = json.loads(result.out)
    assert (report["model"], report["kv"], report["num_threads"]) == ("tiny", kv, 1)
    assert (report["prompt_tokens"], report["decode_depth"], report["streams"]) == (40, 40, 2)
    speeds = ("prefill_tokens_per_s", "decode_tokens_per_s", "streams_tokens_per_s")
    limits = ("int8_ops_per_s", "read_bytes_per_s")
    for name in (*speeds, *limits, "prefill_fraction", "decode_fraction", "streams_fraction", "weight_bytes"):
        assert report[name] > 0, name
    assert f"random {kind} weights in the shape of tiny" in result.err


def test_the_table_shows_the_shares(run: Run, tiny_entry: None) -> None:
    lines = run("bench", "--synthetic", "tiny", *SMALL).out.splitlines()
    assert lines[0].endswith("GB")
    assert "1 thread" in lines[0]
    assert lines[1].startswith("this machine just now: ")
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "work",
        "prefill of 40",
        "decode at depth 40",
        "2 streams together",
    ]
    assert "% of the int8 rate" in lines[3]
    assert "% of the read bandwidth" in lines[4]
    assert re.search(r"% of the (int8 rate|read bandwidth)", lines[5])


def test_a_model_on_disk_is_measured(run: Run, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    report = json.loads(run("bench", str(folder), "--json", *SMALL).out)
    assert report["model"] == str(folder)
    assert report["decode_tokens_per_s"] > 0
    assert report["prefill_fraction"] is None, "float weights have no int8 rate"


def test_more_streams_than_a_step_usually_has(run: Run, tiny_entry: None) -> None:
    argv = ("--prompt", "1", "--tokens", "1", "--streams", "600", "--repeats", "1", "--threads", "1", "--json")
    assert json.loads(run("bench", "--synthetic", "tiny", *argv).out)["streams"] == 600


def test_the_whole_context_can_be_measured(run: Run, tiny_entry: None) -> None:
    argv = ("--tokens", "2", "--streams", "1", "--repeats", "1", "--threads", "1", "--json")
    assert run("bench", "--synthetic", "tiny", "--prompt", "254", *argv).code == 0
    result = run("bench", "--synthetic", "tiny", "--prompt", "255", *argv)
    assert result.code == 1
    assert not result.out
    assert result.error == "--prompt 255 and --tokens 2 need a context of 257 tokens; this model's is 256"


@pytest.mark.parametrize("source", ["synthetic", "folder"])
def test_what_does_not_fit_the_memory_is_refused_first(
    source: str, run: Run, tiny_entry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = MachineMemory(total_bytes=1 << 20, available_bytes=1 << 20)
    monkeypatch.setattr("miniphi.engine.program.machine_memory", lambda: small)
    model = ("--synthetic", "tiny") if source == "synthetic" else (str(write_tiny_model(tmp_path / "tiny")),)
    result = run("bench", *model, "--streams", "600", "--tokens", "2", "--prompt", "40")
    assert result.code == 1
    assert "bytes of cache; the weights of" in result.err
    assert "of this machine's memory" in result.err


def test_unknown_models_are_one_line(run: Run, models: FakeModels) -> None:
    result = run("bench", "--synthetic", "nonsense")
    assert (result.code, result.out) == (1, "")
    assert "known models" in result.error
    assert "known models" in run("bench", "nonsense").error
    assert not models.pulled


def test_a_model_and_a_shape_exclude_each_other(run: Run) -> None:
    result = run("bench", "some-model", "--synthetic", "phi-3-mini-128k-instruct")
    assert result.code == 2
    assert "not allowed with" in result.error
