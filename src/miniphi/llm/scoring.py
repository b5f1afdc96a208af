"""How probable a model finds given text: log-likelihoods of continuations, and perplexity over windows.

Owns where scoring starts and which tokens of a window count. Works on token ids only.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from miniphi.engine import PromptLogprob, Request, RopePolicy, SamplingParams, SequenceOutput
from miniphi.errors import InvalidRequestError
from miniphi.llm.driver import EngineDriver
from miniphi.llm.results import LogLikelihood, Perplexity
from miniphi.tokenizer import Tokenizer

__all__ = ["Scored", "Window", "iter_scores", "likelihood", "plan_windows", "running_perplexity", "split_pair"]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Token ids, and the index of the first one whose log-probability is wanted (at least 1)."""

    token_ids: tuple[int, ...]
    start: int


class _Score:
    """Waits for the log-probabilities of one request's prompt."""

    def __init__(self) -> None:
        self.logprobs: tuple[PromptLogprob, ...] | None = None
        self.error: Exception | None = None

    def accept(self, output: SequenceOutput, now_s: float) -> bool:
        self.logprobs = output.prompt_logprobs
        return True

    def fail(self, error: Exception) -> None:
        self.error = error

    def is_done(self) -> bool:
        return self.logprobs is not None or self.error is not None

    def result(self) -> tuple[PromptLogprob, ...]:
        if self.error is not None:
            raise self.error
        assert self.logprobs is not None
        return self.logprobs


def iter_scores(
    driver: EngineDriver, items: Sequence[Scored], rope_policy: RopePolicy
) -> Iterator[tuple[PromptLogprob, ...]]:
    """Score all items together and yield their log-probabilities in the order of the items."""
    # The engine samples one token that nobody wants; `auto` would count it as part of the text.
    policy: RopePolicy = "hf" if rope_policy == "auto" else rope_policy
    params = SamplingParams(temperature=0.0, max_tokens=1)
    pending: list[tuple[str, _Score]] = []
    try:
        for item in items:
            request = Request(
                token_ids=item.token_ids, params=params, rope_policy=policy, prompt_logprobs_start=item.start
            )
            score = _Score()
            driver.submit(request, score)
            pending.append((request.id, score))
        for request_id, score in pending:
            driver.run_until(score.is_done)
            driver.forget(request_id)
            yield score.result()
    finally:
        for request_id, _ in pending:
            driver.forget(request_id)


def split_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Scored:
    """Return the tokens of `context + continuation` and where the continuation begins.

    Source: lm-evaluation-harness, `TemplateLM._encode_pair` and `loglikelihood`. Both texts are encoded together, and
    the continuation begins after as many tokens as the context has alone; white space at the end of the context counts
    as part of the continuation, because tokens begin with it. An empty context is replaced by the model's bos (or eos)
    token. Departure: where the border falls inside the last token, that token is scored, instead of none.
    """
    if not continuation:
        raise InvalidRequestError("continuation is empty; give the text whose probability is wanted")
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    prefix = [tokenizer.bos_token_id] if tokenizer.add_bos and tokenizer.bos_token_id is not None else []
    if not context and not prefix:
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if first is None:
            raise InvalidRequestError(
                "context is empty and the model has neither a bos nor an eos token to stand for it"
            )
        prefix = [first]
    whole = [*prefix, *tokenizer.encode(context + continuation)]
    start = len(prefix) + (len(tokenizer.encode(context)) if context else 0)
    return Scored(token_ids=tuple(whole), start=max(1, min(start, len(whole) - 1)))


def likelihood(logprobs: Sequence[PromptLogprob]) -> LogLikelihood:
    """Sum up the tokens of one continuation."""
    values = tuple(token.logprob for token in logprobs)
    return LogLikelihood(
        logprob=math.fsum(values),
        num_tokens=len(values),
        is_greedy=all(token.is_greedy for token in logprobs),
        token_logprobs=values,
    )


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens `begin` to `end - 1` of a text, of which those from `first` on count."""

    begin: int
    first: int
    end: int

    def scored(self, token_ids: Sequence[int]) -> Scored:
        """Return the window as something to score."""
        return Scored(token_ids=tuple(token_ids[self.begin : self.end]), start=self.first - self.begin)


def plan_windows(num_tokens: int, window: int, stride: int) -> list[Window]:
    """Cut a text into windows that begin every `stride` tokens; a token counts in the first window that sees it.

    The first token of a window never counts, as nothing precedes it: with `stride` = `window` one token per window is
    left out, with a smaller stride only the very first one.
    Source: the sliding window of the transformers documentation, "Perplexity of fixed-length models".
    """
    if window < 2:
        raise InvalidRequestError(f"window is {window}; it must be at least 2 tokens")
    if not 1 <= stride <= window:
        raise InvalidRequestError(f"stride is {stride}; it must be from 1 to the window's {window} tokens")
    if num_tokens < 2:
        raise InvalidRequestError(f"the text has {num_tokens} tokens; perplexity needs at least 2")
    windows = []
    begin = end = 0
    while end < num_tokens:
        first, end = max(begin + 1, end), min(begin + window, num_tokens)
        if first < end:
            windows.append(Window(begin=begin, first=first, end=end))
        begin += stride
    return windows


def running_perplexity(nll: float, num_tokens: int) -> Perplexity:
    """Return the perplexity of `num_tokens` tokens with `nll` nats together; infinity where exp overflows."""
    mean = nll / num_tokens
    return Perplexity(nll=nll, num_tokens=num_tokens, perplexity=math.exp(mean) if mean < 700 else math.inf)
