"""Run small language models on the machine you have.

    import miniphi

    llm = miniphi.load("smollm2-135m-instruct")
    answer = llm.chat([{"role": "user", "content": "Name three colours."}], max_tokens=40)
    print(answer.text)

Importing the package costs almost nothing: a public name loads its module when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from miniphi.version import __version__

if TYPE_CHECKING:
    from miniphi.chat import ChatTemplate, Message
    from miniphi.checkpoint import open_checkpoint
    from miniphi.config import ModelConfig
    from miniphi.engine.sampling_params import SamplingParams
    from miniphi.errors import (
        CapacityError,
        ChatTemplateError,
        CheckpointError,
        ContextLengthError,
        DownloadError,
        InvalidRequestError,
        MiniphiError,
        UnsupportedModelError,
    )
    from miniphi.llm import (
        LLM,
        Alternative,
        Choice,
        Chunk,
        Completion,
        CompletionStream,
        LogLikelihood,
        Perplexity,
        Timings,
        TokenLogprob,
        Usage,
    )
    from miniphi.llm.load import load
    from miniphi.tokenizer import Tokenizer

_ROOMS = {
    "miniphi.chat": ("ChatTemplate", "Message"),
    "miniphi.checkpoint": ("open_checkpoint",),
    "miniphi.config": ("ModelConfig",),
    "miniphi.engine.sampling_params": ("SamplingParams",),
    "miniphi.errors": (
        "CapacityError",
        "ChatTemplateError",
        "CheckpointError",
        "ContextLengthError",
        "DownloadError",
        "InvalidRequestError",
        "MiniphiError",
        "UnsupportedModelError",
    ),
    "miniphi.llm": (
        "Alternative",
        "Choice",
        "Chunk",
        "Completion",
        "CompletionStream",
        "LLM",
        "LogLikelihood",
        "Perplexity",
        "Timings",
        "TokenLogprob",
        "Usage",
        "load",
    ),
    "miniphi.tokenizer": ("Tokenizer",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [  # noqa: RUF022 (spelled out for readers and type checkers; tests compare it with the table above)
    "Alternative",
    "CapacityError",
    "ChatTemplate",
    "ChatTemplateError",
    "CheckpointError",
    "Choice",
    "Chunk",
    "Completion",
    "CompletionStream",
    "ContextLengthError",
    "DownloadError",
    "InvalidRequestError",
    "LLM",
    "LogLikelihood",
    "Message",
    "MiniphiError",
    "ModelConfig",
    "Perplexity",
    "SamplingParams",
    "Timings",
    "TokenLogprob",
    "Tokenizer",
    "UnsupportedModelError",
    "Usage",
    "__version__",
    "load",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'miniphi' has no attribute {name!r}")
    value = getattr(importlib.import_module(_ROOM_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
