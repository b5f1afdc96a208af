"""llama.cpp as a peer and as a witness: its C interface, as the `xllamacpp` wheel exports it.

The wheel is built for AVX2. For a peer built for this very machine set LLAMA_CPP_LIBRARY to a libllama.so, for example
the one that `CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python` compiles.

Structures whose fields differ between versions are declared up to the last field that is set here and opaque behind it;
the defaults that the library itself fills in tell whether the declaration fits.
"""

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

F16, Q8_0 = 1, 8
"""Cache types: enum ggml_type."""

_AUTO = -1  # enum llama_flash_attn_type
_FLAGS = bytes((0, 1, 1, 1, 1, 0))  # embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified by default


class _Opaque(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint64 * 64),)  # larger than any version's parameters


class _ContextParameters(ctypes.Structure):
    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("outputs", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_int32 * 2),
        ("types", ctypes.c_int32 * 4),  # context, rope scaling, pooling, attention
        ("flash_attn_type", ctypes.c_int32),
        ("rope", ctypes.c_float * 8),
        ("cb_eval", ctypes.c_void_p * 2),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 512),
    )


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


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How llama.cpp keeps keys and values. Values can be quantised only with flash attention."""

    flash_attention: bool | None = None
    """None: llama.cpp chooses"""
    key_type: int = F16
    value_type: int = F16
    is_shared: bool = False
    """One cache for all sequences, so that one can take over another's tokens"""


def library_path() -> Path | None:
    """Return the library that stands for llama.cpp, or None if there is none."""
    if chosen := os.environ.get("LLAMA_CPP_LIBRARY"):
        return Path(chosen)
    wheel = importlib.util.find_spec("xllamacpp")
    if wheel is None or wheel.origin is None:
        return None
    return next(Path(wheel.origin).parent.glob("*.so"), None)


def _library() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise RuntimeError("llama.cpp is not here: pip install xllamacpp, or set LLAMA_CPP_LIBRARY to a libllama.so")
    library = ctypes.CDLL(str(path))
    pointer, sequence, position, size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_size_t
    signatures: dict[str, tuple[object, tuple[object, ...]]] = {
        "llama_model_default_params": (_Opaque, ()),
        "llama_context_default_params": (_ContextParameters, ()),
        "llama_model_load_from_file": (pointer, (ctypes.c_char_p, _Opaque)),
        "llama_init_from_model": (pointer, (pointer, _ContextParameters)),
        "llama_batch_init": (_Batch, (ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)),
        "llama_decode": (ctypes.c_int32, (pointer, _Batch)),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (pointer, ctypes.c_int32)),
        "llama_get_memory": (pointer, (pointer,)),
        "llama_memory_clear": (None, (pointer, ctypes.c_bool)),
        "llama_memory_seq_cp": (None, (pointer, sequence, sequence, position, position)),
        "llama_memory_seq_rm": (ctypes.c_bool, (pointer, sequence, position, position)),
        "llama_state_seq_get_size": (size, (pointer, sequence)),
        "llama_state_seq_get_data": (size, (pointer, ctypes.c_void_p, size, sequence)),
        "llama_state_seq_set_data": (size, (pointer, ctypes.c_void_p, size, sequence)),
        "llama_set_n_threads": (None, (pointer, ctypes.c_int32, ctypes.c_int32)),
        "llama_log_set": (None, (_LOG_CALLBACK, pointer)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_backend_init()
    library.llama_log_set(_SILENT, None)
    return library


def _context_parameters(library: ctypes.CDLL, context: int, streams: int, cache: CacheOptions) -> _ContextParameters:
    parameters: _ContextParameters = library.llama_context_default_params()
    flags = bytes(parameters.rest).find(_FLAGS)
    found = (parameters.flash_attn_type, parameters.type_k, parameters.type_v)
    if found != (_AUTO, F16, F16) or flags < 0:
        raise RuntimeError(
            f"this build of llama.cpp lays out llama_context_params differently: flash attention and cache types are "
            f"{found}, expected {(_AUTO, F16, F16)}; benchmarks/llama_cpp.py knows the builds of 2026"
        )
    parameters.n_ctx, parameters.n_seq_max = context, streams
    parameters.flash_attn_type = _AUTO if cache.flash_attention is None else int(cache.flash_attention)
    parameters.type_k, parameters.type_v = cache.key_type, cache.value_type
    parameters.rest[flags + len(_FLAGS) - 1] = cache.is_shared
    return parameters


def _find_positions(words: memoryview, length: int) -> range:
    """Return which words of a sequence's saved state are its tokens' positions, 0 to length - 1.

    They are the first words that count up in equal steps; a step holds a position and what sequences it belongs to.
    """
    for first in range(min(64, len(words))):
        for step in range(2, 8):
            places = range(first, first + length * step, step)
            if places[-1] < len(words) and all(words[place] == i for i, place in enumerate(places)):
                return places
    raise RuntimeError("this build of llama.cpp saves a sequence in a way that benchmarks/llama_cpp.py does not know")


class LlamaCpp:
    """One model in llama.cpp, several sequences at once."""

    def __init__(
        self,
        path: Path,
        *,
        vocab_size: int,
        num_threads: int,
        context: int,
        max_batch: int = 512,
        streams: int = 1,
        cache: CacheOptions | None = None,
    ) -> None:
        self._library = _library()
        self._vocab_size = vocab_size
        self._model = self._library.llama_model_load_from_file(
            str(path).encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot open {path}")
        parameters = _context_parameters(self._library, context, streams, cache or CacheOptions())
        self._context = self._library.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens")
        self._library.llama_set_n_threads(self._context, num_threads, num_threads)
        self._memory = self._library.llama_get_memory(self._context)
        self._batch = self._library.llama_batch_init(max_batch, 0, 1)

    def reset(self) -> None:
        """Forget all sequences."""
        self._library.llama_memory_clear(self._memory, False)

    def cut(self, sequence: int, length: int) -> None:
        """Forget what a sequence has from position `length` on."""
        if not self._library.llama_memory_seq_rm(self._memory, sequence, length, -1):
            raise RuntimeError(f"llama.cpp cannot cut sequence {sequence} at {length}")

    def state_bytes(self, sequence: int) -> int:
        """Return how much llama.cpp would save of a sequence: its keys and values, and a few bytes a token."""
        return int(self._library.llama_state_seq_get_size(self._context, sequence))

    def repeat(self, length: int, depth: int) -> None:
        """Make sequence 0 as long as `depth` from copies of its first `length` tokens; sequence 1 is used on the way.

        Needs a shared cache. Keys are copied as they are, turned to the positions of the originals: to read them
        takes as long, and they mean nothing. (llama.cpp can turn them, and crashes over it with quantised keys and
        LongRoPE.)
        """
        library, memory = self._library, self._memory
        size = self.state_bytes(0)
        state = ctypes.create_string_buffer(size)
        library.llama_state_seq_get_data(self._context, state, size, 0)
        words = memoryview(state).cast("B")[: size // 4 * 4].cast("i")
        positions = _find_positions(words, length)
        for start in range(length, depth, length):
            for i, word in enumerate(positions):
                words[word] = start + i
            if not library.llama_state_seq_set_data(self._context, state, size, 1):
                raise RuntimeError(f"llama.cpp has no room for tokens {start} to {start + length}")
            library.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            library.llama_memory_seq_rm(memory, 1, -1, -1)
        self.cut(0, depth)

    def run(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], logit_rows: Sequence[int]
    ) -> None:
        """Run one batch; the logits of the rows asked for stay in llama.cpp."""
        batch, wanted = self._batch, set(logit_rows)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(zip(tokens, positions, sequences, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i in wanted
        if self._library.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        for row in logit_rows:  # waits until they are computed
            self._library.llama_get_logits_ith(self._context, row)

    def step(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], logit_rows: Sequence[int]
    ) -> "NDArray[np.float32]":
        """Run one batch and return the logits of the rows asked for, [rows, vocab]."""
        import numpy as np  # noqa: PLC0415 - a process that only measures starts without it

        self.run(tokens, positions, sequences, logit_rows)
        rows = [
            np.ctypeslib.as_array(self._library.llama_get_logits_ith(self._context, row), (self._vocab_size,)).copy()
            for row in logit_rows
        ]
        return np.stack(rows) if rows else np.empty((0, self._vocab_size), np.float32)
