"""Accuracy at equal size: this project's 4-bit formats and llama.cpp's Q4_K_M against the same unquantised model.

    python -m benchmarks.quantization TEXT --calibrate CALIBRATION [--windows N] [--calibration-windows N]

TEXT and CALIBRATION are text files or .jsonl.gz of {"page": ...}. Perplexity over windows of 512 tokens and the mean
Kullback-Leibler divergence from the unquantised model, both with standard errors over windows. Every candidate runs in
this engine with its weights rounded to float16, so that only the weights differ.

The unquantised model is SmolLM2, which is at hand only in 4 bits (Q4_1): its weights lie on a grid that formats with a
minimum for each 32 values would hit exactly. So uniform noise within half a step of that grid is added first.

Q4_K needs rows of a multiple of 256, which SmolLM2's are not (576); llama.cpp takes larger types instead. "Q4_K_M" is
its mixture with rows joined so that blocks of 256 fit, and the embeddings in Q8_0, as llama.cpp has them here.
"Q4_K_M file" is what llama.cpp really writes. That needs LLAMA_CPP_LIBRARY, a libllama.so that exports
llama_model_quantize.
"""

import argparse
import ctypes
import json
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.llama_cpp import library_path
from benchmarks.numerics import WINDOW, log_softmax, miniphi_logits, read_text, windows
from miniphi.checkpoint import (
    Checkpoint,
    Format,
    Scheme,
    StoredTensor,
    TensorSource,
    dequantize,
    open_checkpoint,
    quantize_rows,
    scheme_format,
    tokenizer_metadata,
    write_gguf,
)
from miniphi.checkpoint.names import EMBEDDINGS, gguf_names
from miniphi.checkpoint.stored import encode_floats
from miniphi.llm.load import open_tokenizer
from miniphi.models import resolve
from miniphi.quantization import calibrate, sample_windows
from miniphi.quantization.activations import run_layers
from miniphi.quantization.calibrate import NUM_WINDOWS

Floats = NDArray[np.float32]
Weights = dict[str, Floats]

_Q4_K_M = 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Weights to compare, and the bits that a file spends on each of them."""

    name: str
    bits_per_weight: float
    weights: Weights


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far a candidate is from the unquantised model; errors are standard errors of the mean over windows."""

    bits_per_weight: float
    perplexity: float
    log_perplexity_increase: float
    log_perplexity_increase_error: float
    kl_divergence: float
    kl_divergence_error: float
    top1: float


class Imatrix(ctypes.Structure):
    """llama.h: llama_model_imatrix_data."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class QuantizeParams(ctypes.Structure):
    """llama.h: llama_model_quantize_params."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("requantize", "output", "only_copy", "pure", "keep_split", "dry_run")),
        ("imatrix", ctypes.POINTER(Imatrix)),
        *((name, ctypes.c_void_p) for name in ("kv_overrides", "type_overrides", "prune_layers")),
        ("max_buffer_bytes", ctypes.c_size_t),
    )


def dithered(checkpoint: Checkpoint) -> Checkpoint:
    """Return the model with noise of half a quantisation step in its matrices, float16: continuous weights."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        values = tensor.to_float32()
        if values.ndim > 1:
            stored = tensor.read_rows(0, tensor.shape[0])
            blocks = stored.reshape(len(stored), -1, tensor.format.block_bytes)
            steps = np.abs(np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32))
            noise = rng.uniform(-0.5, 0.5, values.shape).astype(np.float32)
            values += noise * steps.repeat(tensor.format.block_size, axis=1)
        tensors[name] = float_tensor(name, values)
    return replace(checkpoint, tensors=tensors)


def float_tensor(name: str, values: Floats) -> StoredTensor:
    """Return a matrix in float16 or a vector in float32."""
    fmt = Format.F32 if values.ndim == 1 else Format.F16
    rows = values.reshape(1, -1) if values.ndim == 1 else values
    return StoredTensor(name=name, format=fmt, shape=values.shape, raw=encode_floats(rows, fmt))


def rounded(model: Checkpoint, scheme: Scheme) -> Candidate:
    """Round every matrix by itself."""
    weights, bits = {}, 0.0
    for name, values in matrices(model):
        fmt = scheme_format(scheme, name, 2, model.config.num_hidden_layers)
        weights[name] = dequantize(quantize_rows(values, fmt)[0], fmt)
        bits += fmt.bits_per_weight * values.size
    return Candidate(name=f"{scheme}, rounded", bits_per_weight=bits / num_weights(model), weights=weights)


def calibrated(model: Checkpoint, scheme: Scheme, ids: NDArray[np.int32]) -> Candidate:
    """Quantise with error feedback on a text."""
    formats = {name: scheme_format(scheme, name, 2, model.config.num_hidden_layers) for name, _ in matrices(model)}
    prepared = calibrate(model, ids, formats)
    weights = {name: dequantize(each.raw, each.format) for name, each in prepared.items()}
    for name, values in matrices(model):
        if name not in weights:
            weights[name] = dequantize(quantize_rows(values, formats[name])[0], formats[name])
    bits = sum(formats[name].bits_per_weight * values.size for name, values in matrices(model))
    return Candidate(name=f"{scheme}, calibrated", bits_per_weight=bits / num_weights(model), weights=weights)


def matrices(model: Checkpoint) -> Iterator[tuple[str, Floats]]:
    """Yield the matrices of a model."""
    for name, tensor in model.tensors.items():
        if len(tensor.shape) > 1:
            yield name, tensor.to_float32()


def num_weights(model: Checkpoint) -> int:
    """Count the values in matrices."""
    return sum(values.size for _, values in matrices(model))


def importance(model: Checkpoint, ids: NDArray[np.int32]) -> dict[str, Floats]:
    """Return the mean square of each input channel of each matrix, as llama.cpp's imatrix has it."""
    found: dict[str, Floats] = {}

    def visit(names: tuple[str, ...], x: Floats) -> Floats:
        found.update(dict.fromkeys(names, np.mean(x * x, axis=0)))
        weights = np.concatenate([model.tensors[name].to_float32() for name in names])
        return np.concatenate(list(pool.map(lambda part: part @ weights.T, np.array_split(x, 2))))

    with ThreadPoolExecutor(2) as pool:
        run_layers(model, ids, visit, pool=pool)
    return found


def uses_more_bits(layer: int, num_layers: int) -> bool:
    """llama-quant.cpp: use_more_bits."""
    first = num_layers // 8
    return layer < first or layer >= 7 * num_layers // 8 or (layer - first) % 3 == 2


def q4_k_m(model: Checkpoint, weights_of_columns: Mapping[str, Floats] | None) -> Candidate:
    """llama.cpp's mixture for Llama models, by its own quantiser, with rows joined where blocks do not fit."""
    library = ctypes.CDLL(str(library_path()))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    )
    weights, bits = {}, 0.0
    for name, values in matrices(model):
        fmt = Format.Q8_0 if name == EMBEDDINGS else Format.Q4_K
        if name.endswith(("v_proj.weight", "down_proj.weight")) and uses_more_bits(
            int(name.split(".")[2]), model.config.num_hidden_layers
        ):
            fmt = Format.Q6_K
        joined = 1
        while values.shape[1] * joined % fmt.block_size:
            joined *= 2
        x = np.ascontiguousarray(values.reshape(len(values) // joined, -1))
        raw = np.empty((len(x), fmt.row_bytes(x.shape[1])), np.uint8)
        known = (weights_of_columns or {}).get(name)
        columns = None if known is None else np.ascontiguousarray(np.tile(known, joined), np.float32)
        library.ggml_quantize_chunk(
            fmt.ggml_type, x.ctypes.data, raw.ctypes.data, 0, *x.shape, None if columns is None else columns.ctypes.data
        )
        weights[name] = dequantize(raw, fmt).reshape(values.shape)
        bits += fmt.bits_per_weight * values.size
    label = "Q4_K_M" if weights_of_columns is None else "Q4_K_M, imatrix"
    return Candidate(name=label, bits_per_weight=bits / num_weights(model), weights=weights)


def q4_k_m_file(model: Checkpoint, weights_of_columns: Mapping[str, Floats] | None) -> Candidate | None:
    """Return what llama.cpp writes for this model; None if the library cannot write models."""
    library = ctypes.CDLL(str(library_path()))
    if not hasattr(library, "llama_model_quantize"):
        return None
    library.llama_log_set(_SILENT, None)
    library.llama_backend_init()
    library.llama_model_quantize_default_params.restype = QuantizeParams
    library.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(QuantizeParams))
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype = _Q4_K_M
    names = gguf_names(model.config)
    rows = [
        (names[key].encode(), np.ascontiguousarray(values, np.float32))
        for key, values in (weights_of_columns or {}).items()
    ]
    table = (Imatrix * (len(rows) + 1))(
        *((key, values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size) for key, values in rows)
    )
    if rows:
        parameters.imatrix = table
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source.gguf"), Path(folder, "target.gguf")
        sources = {name: TensorSource.from_stored(tensor) for name, tensor in model.tensors.items()}
        write_gguf(source, model.config, sources, tokenizer_metadata=tokenizer_metadata(model))
        if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)) != 0:
            raise RuntimeError("llama_model_quantize failed")
        with open_checkpoint(target) as result:
            weights = dict(matrices(result))
            bits = 8 * sum(result.tensors[name].num_bytes for name in weights)
    label = "Q4_K_M file" if weights_of_columns is None else "Q4_K_M file, imatrix"
    return Candidate(name=label, bits_per_weight=bits / num_weights(model), weights=weights)


class Judge:
    """Remembers what the unquantised model says to each window of the text."""

    def __init__(self, model: Checkpoint, texts: list[NDArray[np.int32]]) -> None:
        self._model, self._texts = model, texts
        self._expected = [logits.astype(np.float32) for logits in self._run(model)]
        self.nll = np.array([self._nll(each, ids) for each, ids in zip(self._expected, texts, strict=True)])

    def _run(self, model: Checkpoint) -> Iterator[NDArray[np.float64]]:
        run = miniphi_logits(model, kv_type="f32")
        for ids in self._texts:
            yield log_softmax(run(ids)[:-1])

    @staticmethod
    def _nll(logprobs: NDArray[np.floating], ids: NDArray[np.int32]) -> float:
        return float(-logprobs[np.arange(len(ids) - 1), ids[1:]].mean())

    def distance(self, candidate: Candidate) -> Distance:
        """Run the candidate over all windows."""
        changed = {name: float_tensor(name, values) for name, values in candidate.weights.items()}
        model = replace(self._model, tensors={**self._model.tensors, **changed})
        nll, divergence, same = [], [], []
        for found, expected, ids in zip(self._run(model), self._expected, self._texts, strict=True):
            nll.append(self._nll(found, ids))
            divergence.append(float(np.mean(np.sum(np.exp(expected) * (expected - found), axis=-1))))
            same.append(float(np.mean(found.argmax(axis=-1) == expected.argmax(axis=-1))))
        increase, root = np.array(nll) - self.nll, len(nll) ** 0.5
        return Distance(
            bits_per_weight=candidate.bits_per_weight,
            perplexity=float(np.exp(np.mean(nll))),
            log_perplexity_increase=float(increase.mean()),
            log_perplexity_increase_error=float(increase.std(ddof=1) / root),
            kl_divergence=float(np.mean(divergence)),
            kl_divergence_error=float(np.std(divergence, ddof=1) / root),
            top1=float(np.mean(same)),
        )


def candidates(model: Checkpoint, ids: NDArray[np.int32]) -> Iterator[Candidate]:
    """Yield everything that is compared."""
    columns = importance(model, ids)
    rounded_schemes: tuple[Scheme, ...] = ("q4_0", "iq4_nl", "nl4")
    calibrated_schemes: tuple[Scheme, ...] = ("nl4", "nl4m")
    for weights_of_columns in (None, columns):
        yield q4_k_m(model, weights_of_columns)
        if (file := q4_k_m_file(model, weights_of_columns)) is not None:
            yield file
    for scheme in rounded_schemes:
        yield rounded(model, scheme)
    for scheme in calibrated_schemes:
        yield calibrated(model, scheme, ids)


def main() -> None:
    """Print the table of docs/numerics.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--calibration-windows", type=int, default=NUM_WINDOWS)
    args = parser.parse_args()
    checkpoint = open_checkpoint(resolve("smollm2-135m-instruct"))
    tokenizer = open_tokenizer(checkpoint)
    model = dithered(checkpoint)
    ids = sample_windows(tokenizer.encode(read_text(args.calibrate)), num_windows=args.calibration_windows)
    judge = Judge(model, list(windows(args.text, tokenizer, args.windows)))
    print(f"unquantised: perplexity {np.exp(judge.nll.mean()):.3f} over {args.windows} windows of {WINDOW}")
    print(f"calibration: {ids.size:,} tokens of {args.calibrate.name}")
    print(f"{'weights':34} {'bits':>6} {'perplexity':>10} {'log ppl increase':>18} {'KL divergence':>19} {'top-1':>7}")
    results = {}
    for candidate in candidates(model, ids):
        result = results[candidate.name] = judge.distance(candidate)
        print(
            f"{candidate.name:34} {result.bits_per_weight:6.3f} {result.perplexity:10.3f} "
            f"{result.log_perplexity_increase:+9.4f} ± {result.log_perplexity_increase_error:.4f} "
            f"{result.kl_divergence:9.4f} ± {result.kl_divergence_error:.4f} {result.top1:7.2%}",
            flush=True,
        )
    print(json.dumps({name: asdict(result) for name, result in results.items()}))


if __name__ == "__main__":
    main()
