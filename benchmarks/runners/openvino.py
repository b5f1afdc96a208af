"""OpenVINO GenAI, its pipeline with continuous batching. Runs in OpenVINO's own environment."""

import time

import numpy as np
import openvino
import openvino_genai

from benchmarks.runners import CacheKind, token_ids

_KV_BLOCK_SIZE = 32
_PROMPT_STEP = 4096
"""Tokens of one prompt that go through the model at once. GenAI's pipeline for single users takes all of them."""

_UNUSED_TOKEN = 0  # the pipeline wants to know a token to stop at, and is told not to


class Runner:
    """See benchmarks.runners.Runner. A depth is filled by one prompt, which the prefix cache then keeps."""

    def __init__(
        self,
        model: str,
        *,
        num_threads: int,
        context: int,
        streams: int,
        cache: CacheKind,
        is_deep: bool,
        compiled: str | None = None,
    ):
        """`compiled` is a folder where OpenVINO keeps the model as it compiled it."""
        if cache == "int4":
            raise ValueError("this runner has no int4 cache")
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = _PROMPT_STEP
        scheduler.num_kv_blocks = streams * (-(-context // _KV_BLOCK_SIZE) + 2)
        scheduler.enable_prefix_caching = is_deep
        properties: dict[str, object] = {"INFERENCE_NUM_THREADS": num_threads}
        if cache == "int8":
            properties["KV_CACHE_PRECISION"] = "u8"
        if compiled is not None:
            properties["CACHE_DIR"] = compiled
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self._num_requests = 0

    def prefill(self, num_tokens: int) -> float:
        """See benchmarks.runners.Runner."""
        start = time.perf_counter()
        self._finish([self._submit(num_tokens, 1)])
        return num_tokens / (time.perf_counter() - start)

    def decode(self, depth: int, num_tokens: int, streams: int) -> float:
        """See benchmarks.runners.Runner."""
        requests = [self._submit(depth, num_tokens + 1) for _ in range(streams)]
        while not all(request.can_read() for request in requests):
            self._pipeline.step()
        start = time.perf_counter()
        for _ in range(num_tokens):
            self._pipeline.step()
        seconds = time.perf_counter() - start
        self._finish(requests)
        return streams * num_tokens / seconds

    def _submit(self, num_tokens: int, num_new_tokens: int) -> openvino_genai.GenerationResult:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = num_new_tokens, True, False
        config.eos_token_id, config.stop_token_ids = _UNUSED_TOKEN, {_UNUSED_TOKEN}
        prompt = np.array([token_ids(0, num_tokens)], np.int64)
        self._num_requests += 1
        return self._pipeline.add_request(self._num_requests, openvino.Tensor(prompt), config)

    def _finish(self, requests: list[openvino_genai.GenerationResult]) -> None:
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        for request in requests:
            request.read_all()
