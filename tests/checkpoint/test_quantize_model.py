import errno
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from miniphi.checkpoint import (
    Format,
    Prepared,
    TensorReport,
    TensorSource,
    open_checkpoint,
    quantize_checkpoint,
    quantize_rows,
    write_gguf,
)
from miniphi.checkpoint.stored import Checkpoint
from miniphi.errors import CheckpointError, StorageError
from tests.checkpoint.tiny_models import (
    byte_level_tokenizer,
    random_tensors,
    sentencepiece_tokenizer,
    tiny_config,
    write_folder,
)
from tests.shared_data import smollm2_gguf


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    config = tiny_config()
    extra = {
        "tokenizer.json": byte_level_tokenizer().to_str().encode(),
        "tokenizer_config.json": json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}).encode(),
        "chat_template.jinja": b"TEMPLATE",
    }
    tensors = {name: TensorSource.from_floats(t, Format.BF16) for name, t in random_tensors(config).items()}
    return open_checkpoint(write_folder(tmp_path / "source", config, tensors, extra=extra))


@pytest.mark.parametrize(
    ("scheme", "layer_format", "bits"),
    [("q8", Format.Q8_0, 8.5), ("q4", Format.Q4_0, 4.5), ("q4_0", Format.Q4_0, 4.5), ("iq4_nl", Format.IQ4_NL, 4.5)],
)
def test_formats_errors_and_totals(
    source: Checkpoint, tmp_path: Path, scheme: Any, layer_format: Format, bits: float
) -> None:
    seen: list[tuple[TensorReport, float]] = []
    report = quantize_checkpoint(
        source,
        tmp_path / "out.gguf",
        scheme=scheme,
        num_threads=3,
        on_progress=lambda tensor, done: seen.append((tensor, done)),
    )
    assert tuple(tensor for tensor, _ in seen) == report.tensors
    assert [tensor.name for tensor in report.tensors] == list(source.tensors)
    assert seen[-1][1] == 1
    assert [done for _, done in seen] == sorted(done for _, done in seen)
    matrix_values = vector_values = 0
    with open_checkpoint(tmp_path / "out.gguf") as result:
        for tensor in report.tensors:
            stored = result.tensors[tensor.name]
            original = source.tensors[tensor.name].to_float32()
            if original.ndim == 1:
                expected = Format.F32
                vector_values += original.size
            else:
                expected = layer_format if ".layers." in tensor.name else Format.Q8_0
                matrix_values += original.size
            assert (tensor.source_format, tensor.target_format, stored.format) == (Format.BF16, expected, expected)
            difference = stored.to_float32() - original
            relative = float(np.linalg.norm(difference) / np.linalg.norm(original))
            assert tensor.relative_error == pytest.approx(relative, rel=1e-4)
            assert tensor.max_absolute_error == pytest.approx(float(np.abs(difference).max()), rel=1e-4)
            assert relative < {Format.F32: 1e-9, Format.Q8_0: 0.006, Format.Q4_0: 0.09, Format.IQ4_NL: 0.08}[expected]
        assert report.target_bytes == result.num_bytes
    assert report.source_bytes == source.num_bytes == 2 * (matrix_values + vector_values)
    assert report.num_values == matrix_values + vector_values
    assert bits - 0.1 < report.bits_per_weight < (9 if scheme == "q8" else 7)


def test_threads_do_not_change_the_file(source: Checkpoint, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "one.gguf", scheme="q4", num_threads=1, name="x")
    quantize_checkpoint(source, tmp_path / "many.gguf", scheme="q4", num_threads=4, name="x")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()


def test_tokenizer_and_template_come_along(source: Checkpoint, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out.gguf", scheme="q8")
    with open_checkpoint(tmp_path / "out.gguf") as result:
        assert result.chat_template == "TEMPLATE"
        assert result.metadata["general.name"] == "source"
        assert result.config.eos_token_ids == (2,)
        assert result.tokenizer_source is not None
        quantize_checkpoint(result, tmp_path / "again.gguf", scheme="q8")
        with open_checkpoint(tmp_path / "again.gguf") as again:
            assert again.metadata == result.metadata
            for name, tensor in result.tensors.items():  # what has its format already is copied
                np.testing.assert_array_equal(again.tensors[name].to_float32(), tensor.to_float32())


def test_byte_level_tokenizer_is_written_as_it_is(source: Checkpoint, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out.gguf", scheme="q8")
    tokenizer = byte_level_tokenizer()
    vocabulary = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    with open_checkpoint(tmp_path / "out.gguf") as result:
        metadata = result.metadata
        tokens = metadata["tokenizer.ggml.tokens"]
        types = metadata["tokenizer.ggml.token_type"]
        assert tokens[: len(vocabulary)] == [vocabulary[index] for index in range(len(vocabulary))]
        assert tokens[len(vocabulary) :] == [f"[PAD{index}]" for index in range(len(vocabulary), 320)]
        assert types[:3] == [3, 3, 3]
        assert types[tokenizer.token_to_id("<extra>")] == 4
        assert set(types[len(vocabulary) :]) == {5}
        assert metadata["tokenizer.ggml.model"] == "gpt2"
        assert metadata["tokenizer.ggml.pre"] == "smollm"
        assert metadata["tokenizer.ggml.bos_token_id"] == 1
        assert metadata["tokenizer.ggml.eos_token_id"] == 2
        assert metadata["tokenizer.ggml.add_bos_token"] is False
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        assert metadata["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


def spm_merge(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's rule: join the neighbours whose union has the best score, leftmost first."""
    parts = list(text)
    while True:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not pairs:
            return parts
        _, index = min(pairs)
        parts[index : index + 2] = [parts[index] + parts[index + 1]]


def test_sentencepiece_scores_merge_as_the_merge_list_does(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    config = tiny_config("phi3")
    extra = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": b'{"add_bos_token": true}'}
    folder = write_folder(tmp_path / "m", config, random_tensors(config), extra=extra)
    with open_checkpoint(folder) as checkpoint:
        quantize_checkpoint(checkpoint, tmp_path / "out.gguf", scheme="q8")
    with open_checkpoint(tmp_path / "out.gguf") as result:
        metadata = result.metadata
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert types[:3] == [2, 3, 3]
    assert types[3:259] == [6] * 256
    assert set(types[259 : tokenizer.get_vocab_size()]) == {1}
    normal = {
        text: score
        for text, score, kind in zip(tokens, metadata["tokenizer.ggml.scores"], types, strict=True)
        if kind == 1
    }
    for text in ("the cat sat on the mat", "the hat that the dog had", "red hall and mat", "thethe  cat"):
        expected = tokenizer.encode(text).tokens
        assert spm_merge("▁" + text.replace(" ", "▁"), normal) == expected


def test_tokenizers_without_a_gguf_name_are_refused(tmp_path: Path) -> None:
    config = tiny_config()
    spec = json.loads(byte_level_tokenizer().to_str())

    def fails(match: str, changed: dict[str, Any]) -> None:
        folder = tmp_path / match.replace(" ", "-")
        write_folder(folder, config, random_tensors(config), extra={"tokenizer.json": json.dumps(changed).encode()})
        with open_checkpoint(folder) as checkpoint, pytest.raises(Exception, match=match) as caught:
            quantize_checkpoint(checkpoint, tmp_path / "out.gguf", scheme="q8")
        assert type(caught.value).__name__ in ("CheckpointError", "UnsupportedModelError")
        assert "tokenizer.json" in str(caught.value)

    fails("only BPE", {**spec, "model": {"type": "Unigram"}})
    fails("normalizer", {**spec, "normalizer": {"type": "NFC"}})
    fails("no GGUF name", {**spec, "pre_tokenizer": {"type": "Whitespace"}})
    fails("has id 400", {**spec, "model": {**spec["model"], "vocab": {"a": 400}}})
    fails("not a pair", {**spec, "model": {**spec["model"], "merges": ["a b c"]}})
    fails("model.merges", {**spec, "model": {**spec["model"], "merges": None}})
    fails("added_tokens", {**spec, "added_tokens": 3})
    fails("model.vocab", {**spec, "model": {**spec["model"], "vocab": []}})
    assert not (tmp_path / "out.gguf").exists()


def test_the_source_and_existing_files_are_safe(source: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    path.write_text("precious")
    with pytest.raises(StorageError, match="exists already"):
        quantize_checkpoint(source, path, scheme="q8")
    assert path.read_text() == "precious"
    quantize_checkpoint(source, path, scheme="q8", overwrite=True)
    with open_checkpoint(path) as result, pytest.raises(CheckpointError, match="is the model that would be read"):
        quantize_checkpoint(result, tmp_path / "source" / ".." / "out.gguf", scheme="q4", overwrite=True)
    with pytest.raises(CheckpointError, match="is the model that would be read"):
        quantize_checkpoint(source, tmp_path / "source" / "model.safetensors", scheme="q4", overwrite=True)
    with pytest.raises(CheckpointError, match="does not exist"):
        quantize_checkpoint(source, tmp_path / "nowhere" / "out.gguf", scheme="q8")
    with pytest.raises(CheckpointError, match="scheme is 'q5'"):
        quantize_checkpoint(source, tmp_path / "new.gguf", scheme="q5")  # type: ignore[arg-type]


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), RuntimeError("boom"), OSError(errno.ENOSPC, "No space")])
def test_nothing_is_left_behind(source: Checkpoint, tmp_path: Path, problem: BaseException) -> None:
    before = sorted(tmp_path.iterdir())
    calls = []

    def stop(report: TensorReport, done: float) -> None:
        calls.append(done)
        if len(calls) == 5:
            raise problem

    expected = StorageError if isinstance(problem, OSError) else type(problem)
    with pytest.raises(expected) as caught:
        quantize_checkpoint(source, tmp_path / "out.gguf", scheme="q8", on_progress=stop)
    if isinstance(problem, OSError):
        assert "the disk is full" in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_is_too_small_is_noticed_first(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    calls: list[float] = []
    with pytest.raises(StorageError, match="free disk space"):
        quantize_checkpoint(source, tmp_path / "out.gguf", scheme="q8", on_progress=lambda _, done: calls.append(done))
    assert calls == []
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_named(source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real_open = builtins.open

    def full(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return (
            real_open("/dev/full", "wb") if str(path).endswith(".partial") else real_open(path, mode, *args, **kwargs)
        )

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(StorageError, match="the disk is full; nothing was left behind"):
        quantize_checkpoint(source, tmp_path / "out.gguf", scheme="q8")


def test_bad_weights_are_named(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    before = write_folder(tmp_path / "m", config, tensors)
    with open_checkpoint(before) as checkpoint, pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*nan"):
        quantize_checkpoint(checkpoint, tmp_path / "out.gguf", scheme="q4")
    odd = tiny_config(intermediate_size=100)
    folder = write_folder(tmp_path / "odd", odd, random_tensors(odd))
    with open_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match=r"down_proj.*multiple of 32"):
        quantize_checkpoint(checkpoint, tmp_path / "out.gguf", scheme="q4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "odd"]


def test_importance_is_used_and_checked(source: Checkpoint, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    importance = np.ones(64, dtype=np.float32)
    importance[:8] = 1000
    quantize_checkpoint(source, tmp_path / "plain.gguf", scheme="q4")
    quantize_checkpoint(source, tmp_path / "weighted.gguf", scheme="q4", importance={name: importance})
    original = source.tensors[name].to_float32()
    with open_checkpoint(tmp_path / "plain.gguf") as plain, open_checkpoint(tmp_path / "weighted.gguf") as weighted:
        error = [np.abs(each.tensors[name].to_float32() - original)[:, :8].sum() for each in (plain, weighted)]
    assert error[1] < 0.95 * error[0]
    with pytest.raises(CheckpointError, match="'nothing' is not a tensor"):
        quantize_checkpoint(source, tmp_path / "x.gguf", scheme="q4", importance={"nothing": importance})


def test_reference_reader_opens_the_result(source: Checkpoint, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out.gguf", scheme="q4")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["general.file_type"].contents() == 2
    assert reader.fields["general.architecture"].contents() == "llama"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["blk.1.ffn_norm.weight"] == "F32"


def test_smollm2_to_q8_keeps_its_metadata_and_values(tmp_path: Path) -> None:
    with open_checkpoint(smollm2_gguf()) as source:
        report = quantize_checkpoint(source, tmp_path / "out.gguf", scheme="q8")
        assert 8.5 <= report.bits_per_weight < 8.52
        worst = max(tensor.relative_error for tensor in report.tensors)
        assert 0 < worst < 0.01
        with open_checkpoint(tmp_path / "out.gguf") as result:
            assert result.config == source.config
            tokenizer = {key: value for key, value in source.metadata.items() if key.startswith("tokenizer.")}
            assert {key: value for key, value in result.metadata.items() if key.startswith("tokenizer.")} == tokenizer
            assert result.metadata["general.license"] == "apache-2.0"
            assert result.metadata["general.file_type"] == 7
            name = "model.layers.3.self_attn.k_proj.weight"
            a, b = source.tensors[name].to_float32(), result.tensors[name].to_float32()
            assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(a)


def test_write_gguf_refuses_what_gguf_cannot_hold(tmp_path: Path) -> None:
    config = tiny_config()
    with pytest.raises(CheckpointError, match="k: GGUF has no value of type NoneType"):
        write_gguf(tmp_path / "x.gguf", config, random_tensors(config), tokenizer_metadata={"k": None})
    with pytest.raises(CheckpointError, match="k: expected an array of one type"):
        write_gguf(tmp_path / "x.gguf", config, random_tensors(config), tokenizer_metadata={"k": [1, "a"]})
    values = {"big": 1 << 40, "minus": -3, "half": 0.5, "yes": True, "ids": [1, 1 << 40], "f": [1.0, 2.5], "e": []}
    write_gguf(tmp_path / "x.gguf", config, random_tensors(config), tokenizer_metadata=values | {"b": [True, False]})
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        assert {key: checkpoint.metadata[key] for key in values} == values
        assert checkpoint.metadata["b"] == [True, False]


def wide_source(tmp_path: Path, **changes: Any) -> Checkpoint:
    """A model whose rows divide into blocks of 64."""
    config = tiny_config(intermediate_size=128, **changes)
    extra = {"tokenizer.json": byte_level_tokenizer().to_str().encode(), "chat_template.jinja": b"TEMPLATE"}
    return open_checkpoint(write_folder(tmp_path / "wide", config, random_tensors(config), extra=extra))


def test_a_folder_gets_nl4_and_keeps_what_belongs_to_the_model(tmp_path: Path) -> None:
    seen: list[float] = []
    with wide_source(tmp_path) as source:
        report = quantize_checkpoint(
            source, tmp_path / "out", scheme="q4", num_threads=3, on_progress=lambda _, done: seen.append(done)
        )
        with open_checkpoint(tmp_path / "out") as result:
            assert result.config == source.config
            assert result.chat_template == "TEMPLATE"
            assert result.generation_eos_token_ids == (2,)
            assert result.tokenizer_source == ("files", tmp_path / "out" / "tokenizer.json", {})
            assert list(result.tensors) == [tensor.name for tensor in report.tensors]
            for tensor in report.tensors:
                stored, original = result.tensors[tensor.name], source.tensors[tensor.name].to_float32()
                expected = Format.NL4 if ".layers." in tensor.name else Format.Q8_0
                assert stored.format is tensor.target_format is (Format.F32 if original.ndim == 1 else expected)
                if original.ndim > 1:
                    np.testing.assert_array_equal(stored.raw, quantize_rows(original, expected)[0])
            assert report.target_bytes == result.num_bytes
    assert seen == sorted(seen)
    assert seen[-1] == 1


def test_a_folder_made_from_gguf_keeps_its_tokenizer(tmp_path: Path) -> None:
    with wide_source(tmp_path) as source:
        quantize_checkpoint(source, tmp_path / "out.gguf", scheme="q8")
    with open_checkpoint(tmp_path / "out.gguf") as model:
        quantize_checkpoint(model, tmp_path / "folder", scheme="q4")
        with open_checkpoint(tmp_path / "folder") as result:
            assert result.config == model.config
            assert result.chat_template == "TEMPLATE"
            assert result.tokenizer_source is not None
            kind, metadata = result.tokenizer_source
            assert kind == "gguf"
            assert metadata == {
                key: value
                for key, value in model.metadata.items()
                if key.startswith("tokenizer.") or key == "general.architecture"
            }
            name = "model.layers.1.self_attn.k_proj.weight"  # GGUF keeps its rows in another order
            a, b = model.tensors[name].to_float32(), result.tensors[name].to_float32()
            assert np.linalg.norm(a - b) < 0.12 * np.linalg.norm(a)


def test_destinations_that_cannot_be(tmp_path: Path) -> None:
    with wide_source(tmp_path) as source:
        with pytest.raises(CheckpointError, match="GGUF has no type NL4"):
            quantize_checkpoint(source, tmp_path / "out.gguf", scheme="nl4")
        with pytest.raises(CheckpointError, match="name a folder"):
            quantize_checkpoint(source, tmp_path / "out.safetensors", scheme="q4")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "precious").touch()
        with pytest.raises(StorageError, match="not an empty folder"):
            quantize_checkpoint(source, tmp_path / "full", scheme="q4", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "wide"]


def test_prepared_tensors_are_written_as_they_are(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with wide_source(tmp_path) as source:
        raw, error = quantize_rows(-source.tensors[name].to_float32(), Format.NL4)
        prepared = Prepared(raw=raw, format=Format.NL4, error=error, output_error=0.25)
        report = quantize_checkpoint(source, tmp_path / "out", scheme="q4", prepared={name: prepared})
        with open_checkpoint(tmp_path / "out") as result:
            np.testing.assert_array_equal(result.tensors[name].raw, raw)
        assert [tensor.name for tensor in report.tensors if tensor.output_error == 0.25] == [name]
        with pytest.raises(CheckpointError, match="prepared: 'nothing' is not a tensor"):
            quantize_checkpoint(source, tmp_path / "x", scheme="q4", prepared={"nothing": prepared})


def test_a_mixed_scheme_keeps_more_matrices_in_8_bits(tmp_path: Path) -> None:
    with wide_source(tmp_path, num_hidden_layers=8) as source:
        quantize_checkpoint(source, tmp_path / "out", scheme="q4m")
        with open_checkpoint(tmp_path / "out") as result:
            formats = {name: tensor.format for name, tensor in result.tensors.items() if len(tensor.shape) > 1}
    eight = {name for name, fmt in formats.items() if fmt is Format.Q8_0}
    layers = "model.layers.{}.mlp.down_proj.weight"
    assert eight == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        *(f"model.layers.{layer}.self_attn.v_proj.weight" for layer in range(8)),
        *(layers.format(layer) for layer in (0, 5, 7)),
    }
    assert set(formats.values()) == {Format.Q8_0, Format.NL4}
