"""The engine of this repository."""

from pathlib import Path

import numpy as np

from benchmarks.runners import NUM_TOKEN_IDS, CacheKind
from miniphi.checkpoint import open_checkpoint
from miniphi.engine.batch import KV_BLOCK_SIZE, Batch
from miniphi.engine.packed_file import PackedModel, read_packed_file, write_packed_file
from miniphi.engine.program import Program, load_program
from miniphi.engine.speed import measure_decode, measure_prefill
from miniphi.errors import CheckpointError

_CACHE_TYPES = {"default": "f16", "int8": "q8", "int4": "q4"}


class Runner:
    """See benchmarks.runners.Runner."""

    def __init__(
        self,
        model: str,
        *,
        num_threads: int,
        context: int,
        streams: int,
        cache: CacheKind,
        is_deep: bool,
        packed_copy: str | None = None,
    ):
        """`packed_copy` is a folder with a copy of the model as `miniphi.load` keeps one in its cache."""
        blocks = streams * -(-context // KV_BLOCK_SIZE)
        path = Path(model)
        self._program = load_program(
            open_checkpoint(path) if packed_copy is None else _packed(path, Path(packed_copy)),
            num_threads=num_threads,
            kv_type=_CACHE_TYPES[cache],
            context=blocks * KV_BLOCK_SIZE,
        )
        self._is_deep, self._is_filled = is_deep, False

    def prefill(self, num_tokens: int) -> float:
        """See benchmarks.runners.Runner."""
        return measure_prefill(self._program, num_tokens)

    def decode(self, depth: int, num_tokens: int, streams: int) -> float:
        """See benchmarks.runners.Runner."""
        if self._is_deep and not self._is_filled:
            touch_cache(self._program)
            self._is_filled = True
        return measure_decode(self._program, depth, num_tokens, streams, is_filled=self._is_filled)


def _packed(model: Path, folder: Path) -> PackedModel:
    """Map the copy of a model; the first time it is written."""
    copy, identity = folder / f"{model.stem}.packed", {"model": str(model)}
    try:
        return read_packed_file(copy, identity=identity)
    except CheckpointError:
        program = load_program(open_checkpoint(model), context=KV_BLOCK_SIZE)
        folder.mkdir(parents=True, exist_ok=True)
        write_packed_file(copy, program.config, program.weights, identity=identity, attachments={})
        return read_packed_file(copy, identity=identity)


def touch_cache(program: Program) -> None:
    """Put one token into every block of the cache, each as a sequence of its own, instead of a prompt of that length.

    So all of the cache is real memory, at the cost of a prompt that is KV_BLOCK_SIZE times shorter; the other slots
    hold zeros. A step's time depends on how much is read, not on what it says.
    """
    for first in range(0, program.num_kv_blocks, program.max_batch_tokens):
        blocks = np.arange(first, min(first + program.max_batch_tokens, program.num_kv_blocks), dtype=np.int32)
        count = len(blocks)
        program.run(
            Batch(
                token_ids=1 + blocks % NUM_TOKEN_IDS,
                positions=np.zeros(count, np.int32),
                query_starts=np.arange(count + 1, dtype=np.int32),
                context_lens=np.ones(count, np.int32),
                block_tables=blocks[:, None],
                use_long_factors=np.zeros(count, np.bool_),
                logit_rows=np.empty(0, np.int32),
            )
        )
