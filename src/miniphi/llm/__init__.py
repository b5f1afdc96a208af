"""Text in, text out: LLM = engine + tokenizer + chat template.

load                        a model's name -> LLM                                       load.py
LLM                         chat, complete, loglikelihood, perplexity                   model.py
CompletionStream            a running request; Generation is what the engine feeds      generation.py
EngineDriver                shares one engine between requests and threads              driver.py
EngineThread, LiveStream    the same for an event loop                                  live.py
StopMatcher                 stop strings across the borders of tokens                   stop.py
Completion, Chunk, ...      the typed results                                           results.py
"""

from miniphi.llm.driver import EngineDriver, OutputSink
from miniphi.llm.generation import CompletionStream, Generation
from miniphi.llm.live import EngineThread, LiveStream
from miniphi.llm.load import DEFAULT_MODEL, load
from miniphi.llm.messages import MessageLike, read_messages
from miniphi.llm.model import LLM, SamplingOptions
from miniphi.llm.results import (
    Alternative,
    Choice,
    Chunk,
    Completion,
    FinishReason,
    LogLikelihood,
    Perplexity,
    Timings,
    TokenLogprob,
    Usage,
)
from miniphi.llm.stop import StopMatcher

__all__ = [
    "DEFAULT_MODEL",
    "LLM",
    "Alternative",
    "Choice",
    "Chunk",
    "Completion",
    "CompletionStream",
    "EngineDriver",
    "EngineThread",
    "FinishReason",
    "Generation",
    "LiveStream",
    "LogLikelihood",
    "MessageLike",
    "OutputSink",
    "Perplexity",
    "SamplingOptions",
    "StopMatcher",
    "Timings",
    "TokenLogprob",
    "Usage",
    "load",
    "read_messages",
]
