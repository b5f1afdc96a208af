"""From the rows of logits of a step to tokens and log-probabilities: the typed door to csrc/sampler.cpp.

Knows rows of logits and token ids; neither text, nor the model, nor the scheduler. A draw depends on the logits, the
seed, the number of the choice and the number of the token alone, so it is the same whatever else is in the batch.
`reference_sampler.py` says in NumPy what is computed. Chosen tokens are the same, except where a draw falls within
float32 rounding (about 1e-7 of the mass) of the border between two candidates: there the two implementations' exp may
disagree about the side.

Shapes: V is the vocabulary size.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from miniphi.engine.request import PromptLogprob, TokenLogprob
from miniphi.engine.sampling_params import SamplingParams
from miniphi.kernels import NativeSampler, sample_rows, score_rows

__all__ = [
    "SampleJob",
    "SampledToken",
    "fresh_seed",
    "make_sampler",
    "prompt_logprobs",
    "sample",
    "without_history",
]

NO_DRAFT: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledToken:
    """A drawn token, with what `logprobs` asked for."""

    token_id: int
    logprob: float | None
    top_logprobs: tuple[TokenLogprob, ...] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleJob:
    """Consecutive rows of logits of one sequence: after its known tokens, and after each further token of `draft`."""

    sampler: NativeSampler
    row: int
    """the first of 1 + len(draft) rows"""
    position: int
    """tokens generated so far"""
    draft: Sequence[int] = NO_DRAFT


def make_sampler(
    params: SamplingParams,
    *,
    vocab_size: int,
    prompt_ids: Sequence[int],
    unused_ids: frozenset[int] = frozenset(),
    stop_ids: frozenset[int] = frozenset(),
    seed: int = 0,
    choice: int = 0,
) -> NativeSampler:
    """Return what draws the tokens of one sequence: `unused_ids` never, `stop_ids` not before `params.min_tokens`."""
    counts_prompt = params.repetition_penalty != 1
    return NativeSampler(
        vocab_size=vocab_size,
        temperature=params.temperature,
        top_k=min(params.top_k, vocab_size),
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        num_logprobs=params.logprobs,
        min_tokens=params.min_tokens,
        masked=np.array(sorted(unused_ids), np.int32),
        masked_early=np.array(sorted(unused_ids | stop_ids), np.int32),
        bias_ids=np.array(list(params.logit_bias), np.int32),
        biases=np.array(list(params.logit_bias.values()), np.float32),
        prompt_ids=np.array(prompt_ids if counts_prompt else (), np.int32),
        seed=seed % 2**64,
        choice=choice,
    )


def without_history(params: SamplingParams) -> SamplingParams:
    """Return what draws alike but does not depend on the tokens before, and reports how probable each token was."""
    return replace(
        params, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, min_tokens=0, logprobs=0
    )


def sample(logits: NDArray[np.float32], jobs: Sequence[SampleJob]) -> list[list[SampledToken]]:
    """Draw each job's tokens from logits [rows, V], whose rows are overwritten: one, and one more per true draft token.

    A job's first row gives its next token. While that token is the draft's, the next row gives the one after it, drawn
    as if there had been no draft. Each sampler counts its tokens for the penalties.

    Raises:
        MiniphiError: a logit is not finite, or everything is masked.
    """
    drawn = sample_rows(
        logits,
        [job.sampler for job in jobs],
        [job.row for job in jobs],
        [job.position for job in jobs],
        [job.draft for job in jobs],
    )
    return [
        [
            SampledToken(
                token_id=token_id,
                logprob=logprob,
                top_logprobs=None if best is None else tuple(TokenLogprob(token_id=i, logprob=p) for i, p in best),
            )
            for token_id, logprob, best in tokens
        ]
        for tokens in drawn
    ]


def prompt_logprobs(
    logits: NDArray[np.float32], token_ids: Sequence[int], num_alternatives: int = 0
) -> list[PromptLogprob]:
    """Score consecutive prompt tokens, each with a row of logits [rows, V] of the token before it.

    Raises:
        MiniphiError: a logit is not finite.
    """
    scores = score_rows(logits, np.array(token_ids, np.int32), num_alternatives)
    return [
        PromptLogprob(
            token_id=token_id,
            logprob=logprob,
            is_greedy=is_greedy,
            top_logprobs=tuple(TokenLogprob(token_id=i, logprob=p) for i, p in best),
        )
        for token_id, (logprob, is_greedy, best) in zip(token_ids, scores, strict=True)
    ]


def fresh_seed() -> int:
    """Return an unpredictable seed of 64 bits."""
    return int.from_bytes(os.urandom(8), "little")
