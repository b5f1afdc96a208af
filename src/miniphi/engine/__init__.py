"""Token ids in, token ids out: scheduling, the key/value cache, sampling, and the program that runs a step."""

from miniphi.engine.batch import KV_BLOCK_SIZE, Batch, BatchRunner
from miniphi.engine.engine import Engine, EngineOptions, EngineStats
from miniphi.engine.request import (
    DEFAULT_MAX_TOKENS,
    FinishReason,
    PromptLogprob,
    Request,
    RopePolicy,
    SequenceOutput,
    TokenLogprob,
)
from miniphi.engine.sampling_params import SamplingParams, Speculation

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "KV_BLOCK_SIZE",
    "Batch",
    "BatchRunner",
    "Engine",
    "EngineOptions",
    "EngineStats",
    "FinishReason",
    "PromptLogprob",
    "Request",
    "RopePolicy",
    "SamplingParams",
    "SequenceOutput",
    "Speculation",
    "TokenLogprob",
]
