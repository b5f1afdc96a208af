"""Driving an engine over a fake program to its end, and what it should say."""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from miniphi.engine import Engine, EngineOptions, Request, SequenceOutput
from miniphi.engine.reference_sampler import ReferenceSampler
from miniphi.testing import FakeProgram

STOP = 0
Outputs = dict[tuple[str, int], list[SequenceOutput]]


def make_engine(
    program: FakeProgram,
    *,
    reuse: bool = True,
    chunk: int | None = None,
    unused: Sequence[int] = (),
    draft: FakeProgram | None = None,
    draft_row_cost: float = 1.0,
) -> Engine:
    """Make an engine that by default never guesses: a row as dear as a step."""
    options = EngineOptions(prefill_chunk=chunk, allow_prefix_reuse=reuse, draft_row_cost=draft_row_cost)
    return Engine(program, draft=draft, stop_token_ids=(STOP,), unused_token_ids=unused, options=options)


def drain(engine: Engine, *, limit: int = 5000) -> Outputs:
    outputs: Outputs = defaultdict(list)
    for _ in range(limit):
        if not engine.has_work:
            return dict(outputs)
        for output in engine.step():
            outputs[output.request_id, output.index].append(output)
    raise AssertionError("the engine did not finish")


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [output.token_id for output in outputs]


def prompt(seed: int, length: int, vocab_size: int = 64) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(1, vocab_size, length).tolist())


def expected_tokens(program: FakeProgram, request: Request, index: int, max_tokens: int) -> list[int]:
    """Generate one sequence without cache, batch or scheduler."""
    params = request.params
    stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else {STOP})
    sampler = ReferenceSampler(
        params,
        vocab_size=program.config.vocab_size,
        prompt_ids=request.token_ids,
        stop_ids=stop_ids,
        seed=params.seed or 0,
        choice=index,
    )
    scaling = program.config.rope_scaling
    border = scaling.original_max_position_embeddings if scaling else math.inf
    known = list(request.token_ids)
    planned_long = len(known) + max_tokens > border
    output: list[int] = []
    while len(output) < max_tokens and stop_ids.isdisjoint(output[-1:]):
        is_long = {
            "auto": planned_long,
            "hf": len(known) > border,
            "short": False,
            "long": scaling is not None,
        }[request.rope_policy]
        output.append(sampler.sample(program.logits(known, use_long_factors=is_long), len(output)).token_id)
        known.append(output[-1])
    return output


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = logits.astype(np.float64)
    result: NDArray[np.float64] = exact - np.log(np.exp(exact).sum())
    return result
