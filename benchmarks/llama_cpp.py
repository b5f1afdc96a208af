"""llama.cpp as a peer and as a witness: its C interface, as the `xllamacpp` wheel exports it.

The wheel is built for AVX2. For a peer built for this very machine set LLAMA_CPP_LIBRARY to a libllama.so, for example
the one that `CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python` compiles.

Structures whose fields differ between versions are passed as opaque bytes; only n_ctx and n_seq_max are set.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xllamacpp
from numpy.typing import NDArray


class _Opaque(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint64 * 64),)  # larger than any version's parameters


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _LOG_CALLBACK(lambda level, text, data: None)


def library_path() -> Path:
    """Return the library that stands for llama.cpp."""
    chosen = os.environ.get("LLAMA_CPP_LIBRARY")
    return Path(chosen) if chosen else next(Path(xllamacpp.__file__).parent.glob("*.so"))


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path()))
    library.llama_backend_init()
    library.llama_model_default_params.restype = _Opaque
    library.llama_context_default_params.restype = _Opaque
    library.llama_model_load_from_file.restype = ctypes.c_void_p
    library.llama_model_load_from_file.argtypes = (ctypes.c_char_p, _Opaque)
    library.llama_init_from_model.restype = ctypes.c_void_p
    library.llama_init_from_model.argtypes = (ctypes.c_void_p, _Opaque)
    library.llama_batch_init.restype = _Batch
    library.llama_decode.argtypes = (ctypes.c_void_p, _Batch)
    library.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    library.llama_get_logits_ith.argtypes = (ctypes.c_void_p, ctypes.c_int32)
    library.llama_get_memory.restype = ctypes.c_void_p
    library.llama_get_memory.argtypes = (ctypes.c_void_p,)
    library.llama_memory_clear.argtypes = (ctypes.c_void_p, ctypes.c_bool)
    library.llama_set_n_threads.argtypes = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)
    library.llama_log_set(_SILENT, None)
    return library


class LlamaCpp:
    """One model in llama.cpp, several sequences at once."""

    def __init__(
        self, path: Path, *, vocab_size: int, num_threads: int, context: int, max_batch: int = 512, streams: int = 1
    ) -> None:
        self._library = _library()
        self._vocab_size = vocab_size
        self._model = self._library.llama_model_load_from_file(
            str(path).encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot open {path}")
        parameters = self._library.llama_context_default_params()
        fields = ctypes.cast(ctypes.pointer(parameters), ctypes.POINTER(ctypes.c_uint32))
        fields[0], fields[3] = context, streams  # n_ctx, n_batch, n_ubatch, n_seq_max
        self._context = self._library.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens")
        self._library.llama_set_n_threads(self._context, num_threads, num_threads)
        self._batch = self._library.llama_batch_init(max_batch, 0, 1)

    def reset(self) -> None:
        """Forget all sequences."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)

    def step(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], logit_rows: Sequence[int]
    ) -> NDArray[np.float32]:
        """Run one batch and return the logits of the rows asked for, [rows, vocab]."""
        batch, wanted = self._batch, set(logit_rows)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(zip(tokens, positions, sequences, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i in wanted
        if self._library.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        rows = [
            np.ctypeslib.as_array(self._library.llama_get_logits_ith(self._context, row), (self._vocab_size,)).copy()
            for row in logit_rows
        ]
        return np.stack(rows) if rows else np.empty((0, self._vocab_size), np.float32)
