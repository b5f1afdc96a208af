import json
import sys
from pathlib import Path

import pytest

from miniphi.models import catalog, find_entry
from tests.checkpoint.tiny_models import byte_level_tokenizer, random_tensors, tiny_config, write_folder
from tests.fake_llm import write_tiny_model

from .conftest import FakeModels, Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_models_lists_the_catalog_and_what_is_here(run: Run, folder: Path) -> None:
    before = run("models")
    lines = before.out.splitlines()
    assert lines[0].split() == ["NAME", "PARAMETERS", "CONTEXT", "LICENCE", "ON", "THIS", "MACHINE"]
    for name in catalog():
        assert any(line.split()[0] == name and line.endswith("-") for line in lines)
    assert any(line.startswith("phi-3-mini-128k-instruct@april-2024 ") for line in lines)
    assert run("pull", str(folder), "--name", "mine").code == 0
    assert [line for line in run("models").out.splitlines() if line.startswith("mine ") and "KiB" in line]
    document = json.loads(run("models", "--json").out)
    assert {entry["name"] for entry in document["catalog"]} >= set(catalog())
    assert all(entry["installed"] is None for entry in document["catalog"])
    assert [model["name"] for model in document["others"]] == ["mine"]


def test_models_shows_and_removes_packed_copies(run: Run, cache: Path) -> None:
    assert "Packed copies" not in run("models").out
    (cache / ".packed").mkdir(parents=True)
    (cache / ".packed" / "a.packed").write_bytes(bytes(3 << 20))
    assert f"Packed copies for fast starts take 3.00 MiB in {cache / '.packed'}" in run("models").out
    assert json.loads(run("models", "--json").out)["packed_copies"] == {
        "path": str(cache / ".packed"),
        "bytes": 3 << 20,
    }
    assert "Packed copies" not in run("models", "--remove-packed-copies").out
    assert not list((cache / ".packed").iterdir())


def test_pull_prints_where_the_model_lies(run: Run, folder: Path, cache: Path) -> None:
    result = run("pull", str(folder))
    assert (result.code, result.err) == (0, "")
    assert result.out == f"{cache / 'tiny'}\n"
    assert (cache / "tiny" / "model.safetensors").is_file()


def test_pull_of_an_unknown_name_is_one_line(run: Run) -> None:
    result = run("pull", "phi-3-mini")
    assert result.code == 1
    assert "phi-3-mini-128k-instruct" in result.error


@pytest.mark.parametrize("name", ["phi-3-mini-128k-instruct", "phi-3-mini-128k-instruct@april-2024", *catalog()])
def test_show_prints_the_card(name: str, run: Run) -> None:
    entry = find_entry(name)
    out = run("show", name).out
    unwrapped = " ".join(out.split())
    for text in (entry.title, entry.licence, entry.architecture, f"{entry.parameters:,}", f"{entry.context_tokens:,}"):
        assert text in unwrapped
    assert f"longest answer {entry.max_output_tokens:,} tokens" in unwrapped
    for text in (*entry.intended_use, *entry.limits, entry.template, ", ".join(map(str, entry.stop_token_ids))):
        assert text in unwrapped
    for table in entry.tables:
        assert table.title in out
        for row in table.rows:
            assert any(
                line.startswith(row.name) and line.split()[-len(row.scores) :] == [str(score) for score in row.scores]
                for line in out.splitlines()
            )
    if entry.fine_tuning is not None:
        assert all(key in out for key in entry.fine_tuning.values)
    assert all(key in out for key in entry.serving)
    assert max(map(len, out.splitlines())) <= 120


def test_show_prints_the_seed_figures(run: Run) -> None:
    out = run("show", "phi-3-mini-128k-instruct").out
    assert ["MMLU", "(5-shot)", "69.7", "63.6", "61.7", "70.5", "66.5", "71.4"] in [
        line.split() for line in out.splitlines()
    ]
    assert ["learning_rate", "5e-06"] in [line.split() for line in out.splitlines()]
    assert ["maxOutputTokens", "4096"] in [line.split() for line in out.splitlines()]


def test_show_json_is_the_entry(run: Run) -> None:
    document = json.loads(run("show", "phi-3-mini-128k-instruct", "--revision", "april-2024", "--json").out)
    assert document["revision"] == "april-2024"
    assert document["parameters"] == 3821079552
    assert document["fine_tuning"]["card"]["learning_rate"] == 5e-6


def test_show_of_files_says_what_they_say(run: Run, folder: Path) -> None:
    out = run("show", str(folder)).out
    assert "context tokens  256\n" in out
    assert "weights         21 x F32\n" in out
    assert "{% for message in messages %}" in out
    document = json.loads(run("show", str(folder), "--json").out)
    assert document["layers"] == 2
    assert document["stop_ids"] == [2]
    assert document["weights"] == {"F32": 21}
    assert document["has_tokenizer"] is True


def test_plan_fits_or_refuses_with_the_numbers(run: Run, folder: Path) -> None:
    fits = run("plan", "phi-3-mini-128k-instruct", "--context", "4096", "--bits", "4.5", "--memory", "16G")
    assert (fits.code, fits.err) == (0, "")
    assert "fits: a context of 4,096 tokens leaves" in fits.out
    refused = run("plan", "phi-3-mini-128k-instruct", "--context", "131072", "--bits", "4.5", "--memory", "16G")
    assert refused.code == 1
    assert "48.0 GiB" in refused.out
    assert "does not fit: a context of 131,072 tokens needs 50.2 GiB and 16.0 GiB is available" in refused.error
    assert "the largest context that fits is" in refused.error
    assert "KV cache" in refused.out
    assert "does not fit" not in refused.out


def test_plan_knows_the_cache_formats_and_sequences(run: Run) -> None:
    sizes = {
        kv: json.loads(run("plan", "--kv", kv, "--context", "1024", "--memory", "8G", "--json").out)["kv_bytes"]
        for kv in ("f32", "f16", "q8", "q4")
    }
    assert sizes["f32"] == 2 * sizes["f16"]
    assert sizes["f16"] / 2 < sizes["q8"] < sizes["f16"] * 0.6
    assert sizes["q4"] < sizes["q8"] * 0.6
    two = json.loads(run("plan", "--sequences", "2", "--context", "1024", "--memory", "8G", "--json").out)
    assert two["kv_bytes"] == 2 * sizes["f16"]


def test_plan_of_files_counts_their_bytes(run: Run, folder: Path) -> None:
    document = json.loads(run("plan", str(folder), "--json").out)
    assert document["context"] == 256
    assert document["weights_bytes"] == sum(
        4 * count for count in (320 * 64, 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 96 * 64 + 2 * 64), 64, 320 * 64)
    )
    # 16 bits per weight, as on the hub, where the model is not here.
    assert (
        json.loads(run("plan", "phi-3.5-mini-instruct", "--memory", "1T", "--json").out)["weights_bytes"] == 7642159104
    )


def test_plan_refuses_a_context_beyond_the_model(run: Run) -> None:
    assert "at most 8,192" in run("plan", "--context", "9000").error
    assert "there is no file" in run("plan", "./nothing").error


def test_quantize_writes_a_model_and_reports_the_error(run: Run, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "tiny.gguf"
    result = run("quantize", str(folder), str(target), "--type", "q8")
    assert result.code == 0
    assert result.err == f"written to {target}\n"
    rows = [line.split() for line in result.out.splitlines()]
    projection = next(row for row in rows if row[:1] == ["self_attn.q_proj"])
    assert projection[1:4] == ["F32", "Q8_0", "2"]
    assert 0 < float(projection[4].rstrip("%")) < 1
    assert "bits per weight" in result.out
    assert run("show", str(target)).code == 0
    assert "exists already" in run("quantize", str(folder), str(target), "--type", "q4").error
    again = run("quantize", str(folder), str(target), "--type", "q4", "--force", "--json")
    document = json.loads(again.out)
    assert document["path"] == str(target)
    assert {tensor["target_format"] for tensor in document["tensors"]} == {"F32", "Q8_0", "Q4_0"}
    assert document["bits_per_weight"] < 8


def test_quantize_into_a_folder_and_by_a_text(run: Run, tmp_path: Path) -> None:
    config = tiny_config(intermediate_size=128)
    tokenizer = byte_level_tokenizer().to_str().encode()
    source = write_folder(tmp_path / "m", config, random_tensors(config), extra={"tokenizer.json": tokenizer})
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog had a hat. " * 60, encoding="utf-8")
    target = tmp_path / "out"
    result = run("quantize", str(source), str(target), "--type", "q4", "--calibrate", str(text), "--json")
    assert result.code == 0, result.err
    tensors = json.loads(result.out)["tensors"]
    products = {t["name"]: t["output_error"] for t in tensors if t["target_format"] == "NL4"}
    assert len(products) == 14
    assert all(0 < error < 0.2 for error in products.values())
    assert {t["output_error"] for t in tensors if t["target_format"] != "NL4"} == {None}
    assert "14 x NL4" in run("show", str(target)).out
    other = tmp_path / "out.gguf"
    table = run("quantize", str(source), str(other), "--type", "iq4_nl", "--calibrate", str(text))
    assert "IN PRODUCTS" in table.out
    assert "14 x IQ4_NL" in run("show", str(other)).out
    assert "not an empty folder" in run("quantize", str(source), str(target), "--type", "q4").error
    text.write_text("short", encoding="utf-8")
    short = run("quantize", str(source), str(tmp_path / "x"), "--type", "q4", "--calibrate", str(text))
    assert "give at least 512" in short.error
    wrong = run("quantize", str(source), str(tmp_path / "x"), "--type", "q8", "--calibrate", str(text))
    assert wrong.code == 2
    assert not (tmp_path / "x").exists()


def test_quantize_needs_a_type(run: Run, folder: Path, tmp_path: Path) -> None:
    result = run("quantize", str(folder), str(tmp_path / "x.gguf"))
    assert result.code == 2
    assert "--type" in result.error


def test_perplexity_of_a_file(run: Run, models: FakeModels, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abc" * 30, encoding="utf-8")
    result = run("perplexity", str(path), "--window", "16")
    expected = models.llm.perplexity("abc" * 30, window=16)
    assert result.out == f"perplexity {expected.perplexity:.4f} over {expected.num_tokens:,} tokens (fake)\n"
    assert not result.err.replace("smollm2-135m-instruct is not on this machine yet; fetching it once\n", "")
    document = json.loads(run("perplexity", "-", "--window", "16", "--stride", "8", "--json", stdin=b"abc" * 30).out)
    assert document["model"] == "fake"
    assert document["num_tokens"] == 29


@pytest.mark.parametrize(
    ("argv", "stdin", "expected"),
    [
        (("/no/such/file",), b"", "/no/such/file: No such file or directory"),
        (("-",), b"", "- is empty"),
        (("-",), b"x\xff", "invalid UTF-8 at byte offset 1"),
        (("-", "--window", "8", "--stride", "9"), b"some text", "stride is 9"),
        (("-", "--window", "9999"), b"some text", "window is 9999"),
        (("-",), b"x", "the text has 1 tokens"),
    ],
)
def test_perplexity_of_bad_input(
    argv: tuple[str, ...], stdin: bytes, expected: str, run: Run, models: FakeModels
) -> None:
    result = run("perplexity", "-m", "other", *argv, stdin=stdin)
    assert result.code == 1
    assert expected in result.error


def test_a_closed_stdin_is_an_error(run: Run, models: FakeModels, monkeypatch: pytest.MonkeyPatch) -> None:
    from miniphi.cli.main import main

    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate"]) == 2
    assert main(["chat"]) == 0
