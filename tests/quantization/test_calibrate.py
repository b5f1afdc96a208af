from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from miniphi.checkpoint import Format, dequantize, open_checkpoint, quantize_rows
from miniphi.checkpoint.stored import Checkpoint
from miniphi.config import ModelConfig
from miniphi.engine.batch import KV_BLOCK_SIZE, Batch
from miniphi.engine.program import load_program
from miniphi.errors import CheckpointError, InvalidRequestError
from miniphi.quantization import calibrate, sample_windows
from miniphi.quantization.activations import run_layers
from tests.checkpoint.tiny_models import longrope_config, random_tensors, tiny_config, write_folder

LENGTH = 40
CONFIGS = {
    "llama": tiny_config(intermediate_size=128),
    "phi3": tiny_config("phi3", intermediate_size=128, sliding_window=16),
    "longrope": longrope_config(intermediate_size=128),
}


def model(tmp_path: Path, config: ModelConfig) -> Checkpoint:
    return open_checkpoint(write_folder(tmp_path / "m", config, random_tensors(config)))


def text(config: ModelConfig, sequences: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (sequences, LENGTH), dtype=np.int32)


def exact(checkpoint: Checkpoint):
    def visit(names: tuple[str, ...], x: np.ndarray) -> np.ndarray:
        return np.concatenate([x @ checkpoint.tensors[name].to_float32().T for name in names], axis=-1)

    return visit


def hidden(checkpoint: Checkpoint, ids: np.ndarray) -> np.ndarray:
    with ThreadPoolExecutor(2) as pool:
        return run_layers(checkpoint, ids, exact(checkpoint), pool=pool)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_compute_what_the_engine_does(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    with model(tmp_path, config) as checkpoint:
        ids = text(config)
        found = hidden(checkpoint, ids) @ checkpoint.tensors["lm_head.weight"].to_float32().T
        program = load_program(checkpoint, context=64, kv_type="f32", max_logit_rows=LENGTH)
        for number, row in enumerate(ids):
            expected = program.run(
                Batch(
                    token_ids=row,
                    positions=np.arange(LENGTH, dtype=np.int32),
                    query_starts=np.array([0, LENGTH], np.int32),
                    context_lens=np.array([LENGTH], np.int32),
                    block_tables=np.arange(64 // KV_BLOCK_SIZE, dtype=np.int32)[None],
                    use_long_factors=np.zeros(1, np.bool_),
                    logit_rows=np.arange(LENGTH, dtype=np.int32),
                )
            )
            np.testing.assert_allclose(found[number * LENGTH :][:LENGTH], expected, atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_calibrated_model_is_nearer(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    progress: list[tuple[str, float]] = []
    with model(tmp_path, config) as checkpoint:
        formats = {key: Format.NL4 for key, tensor in checkpoint.tensors.items() if len(tensor.shape) > 1}
        formats["model.embed_tokens.weight"] = formats["lm_head.weight"] = Format.Q8_0
        prepared = calibrate(
            checkpoint,
            text(config, sequences=40),
            formats,
            num_threads=2,
            on_progress=lambda key, done: progress.append((key, done)),
        )
        assert list(prepared) == [key for key, fmt in formats.items() if fmt is Format.NL4]
        assert [key for key, _ in progress] == list(prepared)
        assert progress[-1][1] == 1
        other = text(config, sequences=20, seed=1)
        expected = hidden(checkpoint, other)
        distance = {}
        for label in ("plain", "calibrated"):
            weights = {key: checkpoint.tensors[key].to_float32() for key in formats}
            for key, each in prepared.items():
                raw = quantize_rows(weights[key], Format.NL4)[0] if label == "plain" else each.raw
                weights[key] = dequantize(raw, Format.NL4)
                if label == "calibrated":
                    original = checkpoint.tensors[key].to_float32()
                    relative = np.linalg.norm(weights[key] - original) / np.linalg.norm(original)
                    assert each.error.relative == pytest.approx(relative, rel=1e-4)
                    assert 0 < each.output_error < 0.12

            def visit(names: tuple[str, ...], x: np.ndarray, weights: dict[str, np.ndarray] = weights) -> np.ndarray:
                return np.concatenate([x @ weights[key].T for key in names], axis=-1)

            with ThreadPoolExecutor(2) as pool:
                distance[label] = np.linalg.norm(run_layers(checkpoint, other, visit, pool=pool) - expected)
        assert distance["calibrated"] < 0.97 * distance["plain"]


def test_a_bad_matrix_is_named(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    tensors = random_tensors(config)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.inf
    name = "model.layers.1.mlp.up_proj.weight"
    with (
        open_checkpoint(write_folder(tmp_path / "m", config, tensors)) as checkpoint,
        pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight: holds values that are not finite"),
    ):
        calibrate(checkpoint, text(config), {name: Format.NL4})


def test_windows_are_spread_over_the_text() -> None:
    windows = sample_windows(range(1000), num_windows=4, window=100)
    assert windows.dtype == np.int32
    assert windows[:, 0].tolist() == [0, 300, 600, 900]
    np.testing.assert_array_equal(windows - windows[:, :1], np.tile(np.arange(100), (4, 1)))
    with_bos = sample_windows(range(250), num_windows=4, window=100, bos_token_id=7)
    assert with_bos.shape == (2, 100)
    assert with_bos[:, 0].tolist() == [7, 7]
    assert with_bos[-1, -1] == 249
    with pytest.raises(InvalidRequestError, match="has 99 tokens; give at least 100, better 400"):
        sample_windows(range(99), num_windows=4, window=100)
