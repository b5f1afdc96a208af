"""Which engines are here, what files they run, and how each is asked for a kind of work.

An engine may live in another environment: OPENVINO_PYTHON names the interpreter that has openvino-genai,
LLAMA_CPP_LIBRARY a libllama.so other than the one in the xllamacpp wheel.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import miniphi
from benchmarks.limits import Demand, decode_demand, gguf_weight_bytes, openvino_weight_bytes, prefill_demand
from benchmarks.llama_cpp import library_path
from benchmarks.results import OURS
from benchmarks.works import SMALL, Work
from miniphi.atomic_write import atomic_folder
from miniphi.checkpoint import (
    open_checkpoint,
    quantize_checkpoint,
    save_safetensors,
    synthetic_tensors,
    write_synthetic_gguf,
)
from miniphi.config import ModelConfig
from miniphi.engine.batch import KV_BLOCK_SIZE
from miniphi.kernels import CacheType, cache_block_bytes, selected_isa
from miniphi.models import find_entry, resolve

LLAMA_CPP, OPENVINO = "llama.cpp", "OpenVINO"
NAMES = (OURS, LLAMA_CPP, OPENVINO)

CACHE_TYPES = {"default": "f16", "int8": "q8", "int4": "q4"}
"""This engine's names for them"""

_ROOT = Path(__file__).resolve().parent.parent

Variant = Mapping[str, object]
"""Settings of a runner beside the common ones"""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine: the interpreter and the runner that time it, and its file of a model."""

    name: str
    version: str
    python: str
    runner: str
    model_file: Callable[[str, Path], Path]

    def variants(self, work: Work, folder: Path) -> list[Variant]:
        """Return the settings to try for a work; the fastest is kept."""
        if self.name == LLAMA_CPP and (work.is_deep or work.context > 1024):
            return [{"flash_attention": True}, {"flash_attention": False}]
        if self.name == LLAMA_CPP and work.cache == "int8":  # where a cache is small, its f16 may be faster
            return [{}, {"cache": "default"}]
        if self.name == OPENVINO and work.kind == "start":
            return [{}, {"compiled": str(folder / "openvino-compiled")}]
        if self.name == OURS and work.kind == "start":
            return [{"packed_copy": str(folder / "miniphi-packed")}]
        return [{}]

    def demand(self, work: Work, config: ModelConfig, path: Path, variant: Variant) -> Demand | None:
        """Return what a step of a work needs in this engine's formats; None where neither limit applies."""
        if work.kind not in ("prefill", "decode"):
            return None
        if self.name == OPENVINO:
            weight_bytes = openvino_weight_bytes(config, path)
        else:
            with open_checkpoint(path) as checkpoint:
                weight_bytes = gguf_weight_bytes(checkpoint)
        if work.kind == "prefill":
            return prefill_demand(config, weight_bytes=weight_bytes, num_tokens=work.num_tokens)
        return decode_demand(
            config,
            weight_bytes=weight_bytes,
            kv_value_bytes=self.kv_value_bytes(work, config, variant),
            depth=work.depth + work.num_tokens / 2,
            streams=work.streams,
        )

    def kv_value_bytes(self, work: Work, config: ModelConfig, variant: Variant) -> float:
        """Return the bytes of one cached number, scales and zero points included.

        Raises InvalidRequestError for a cache that this build of miniphi does not have.
        """
        if self.name == OPENVINO:  # u8 unless told otherwise; scale and zero point of each head's vector, float32
            return 1 + 8 / config.head_dim
        if self.name == LLAMA_CPP:
            keys = 34 / 32 if variant.get("cache", work.cache) == "int8" else 2.0
            return (keys + (2.0 if variant.get("flash_attention") is False else keys)) / 2
        block_bytes = cache_block_bytes(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            CacheType.parse(CACHE_TYPES[work.cache]),
        )
        return block_bytes / KV_BLOCK_SIZE / config.kv_values_per_token


def find_engines() -> tuple[dict[str, Engine], dict[str, str]]:
    """Return the engines that are here by name, ours first, and one line for each that is not."""
    ours = Engine(
        name=OURS,
        version=f"{miniphi.__version__}, {selected_isa()} kernels",
        python=sys.executable,
        runner="miniphi",
        model_file=nl4_folder,
    )
    engines, absent = {OURS: ours}, {}
    library = library_path()
    if library is not None and library.exists():
        engines[LLAMA_CPP] = Engine(
            name=LLAMA_CPP,
            version=_llama_cpp_version(library),
            python=sys.executable,
            runner="llama_cpp",
            model_file=gguf_file,
        )
    else:
        absent[LLAMA_CPP] = f"not measured: {library or 'xllamacpp is not installed'}" + (
            " does not exist" if library else "; pip install xllamacpp, or set LLAMA_CPP_LIBRARY to a libllama.so"
        )
    python = os.environ.get("OPENVINO_PYTHON") or sys.executable
    version = _openvino_version(python)
    if version is not None:
        engines[OPENVINO] = Engine(
            name=OPENVINO,
            version=f"GenAI {version}",
            python=python,
            runner="openvino",
            model_file=lambda model, folder: openvino_folder(model, folder, python),
        )
    else:
        absent[OPENVINO] = (
            f"not measured: {python} has no openvino-genai; set OPENVINO_PYTHON to an interpreter that has it"
        )
    return engines, absent


def model_config(model: str) -> ModelConfig:
    """Return the shape of a model of benchmarks.works."""
    return find_entry(model).model_config()


def gguf_file(model: str, folder: Path) -> Path:
    """Return a Q4_0 file with embeddings and lm_head in Q8_0, written to `folder` once.

    SmolLM2's is made from the shipped Q4_1 file: Q4_0 is what llama.cpp is fastest in. Larger models are random weights
    in their shape, without a tokenizer.
    """

    def write(path: Path) -> None:
        if model == SMALL:
            with open_checkpoint(resolve(model)) as checkpoint:
                quantize_checkpoint(checkpoint, path, scheme="q4")
        else:
            metadata = {"tokenizer.ggml.model": "no_vocab"}
            write_synthetic_gguf(path, model_config(model), scheme="q4", tokenizer_metadata=metadata)

    return _write_once(folder / f"{model}.{'q4_0' if model == SMALL else 'synthetic-q4_0'}.gguf", write)


def nl4_folder(model: str, folder: Path) -> Path:
    """Return a folder with NL4 weights, embeddings and lm_head in Q8_0, written once; the models are `gguf_file`'s."""

    def write(path: Path) -> None:
        if model == SMALL:
            with open_checkpoint(resolve(model)) as checkpoint:
                quantize_checkpoint(checkpoint, path, scheme="nl4")
        else:
            config = model_config(model)
            save_safetensors(path, config, synthetic_tensors(config, scheme="nl4"), num_threads=2)

    return _write_once(folder / f"{model}.{'nl4' if model == SMALL else 'synthetic-nl4'}", write)


def openvino_folder(model: str, folder: Path, python: str) -> Path:
    """Return a folder with random weights in a model's shape as OpenVINO's exporter leaves them, written once."""

    def write(path: Path) -> None:
        with atomic_folder(path) as partial:
            config = partial / "config.json"
            config.write_text(json.dumps(model_config(model).to_hf()), "utf-8")
            command = [python, "-m", "benchmarks.openvino_model", str(config), str(partial)]
            subprocess.run(command, cwd=_ROOT, check=True)

    return _write_once(folder / f"{model}.openvino-int4", write)


def _write_once(path: Path, write: Callable[[Path], None]) -> Path:
    if not path.exists():
        _say(f"writing {path} ...")
        write(path)
    return path


def describe_file(engine: str, model: str) -> str:
    """Return in words what an engine runs."""
    weights = "the shipped weights" if model == SMALL and engine != OPENVINO else f"random weights, shape of {model}"
    if engine == OPENVINO:
        return f"{weights}, int4 in symmetric groups of 128, embeddings and lm_head int8"
    return f"{weights}, {'NL4' if engine == OURS else 'Q4_0'}, embeddings and lm_head Q8_0"


def _llama_cpp_version(library: Path) -> str:
    if os.environ.get("LLAMA_CPP_LIBRARY"):
        return f"the build that LLAMA_CPP_LIBRARY names ({library.name})"
    return f"xllamacpp {importlib.metadata.version('xllamacpp')}"


def _openvino_version(python: str) -> str | None:
    try:
        found = subprocess.run(
            [python, "-c", "import openvino_genai; print(openvino_genai.get_version())"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
