"""`LLM`: an engine, a tokenizer and a chat template, behind text in and text out.

The only place where text meets tokens. Does not know where models come from (load.py) nor how they are shown (cli).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, TypedDict, Unpack, overload

from miniphi.chat import ChatTemplate, RenderedChat
from miniphi.engine import Engine, Request, RopePolicy, SamplingParams, Speculation
from miniphi.errors import InvalidRequestError, UnsupportedModelError
from miniphi.llm.driver import EngineDriver
from miniphi.llm.generation import CompletionStream, run_to_end
from miniphi.llm.messages import MessageLike, read_messages
from miniphi.llm.results import Completion, LogLikelihood, Perplexity
from miniphi.llm.scoring import iter_scores, likelihood, plan_windows, running_perplexity, split_pair
from miniphi.tokenizer import Tokenizer

__all__ = ["LLM", "SamplingOptions"]

DEFAULT_WINDOW = 2048
"""Tokens per window of `perplexity`: the usual length in published figures."""


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams as keyword arguments; `stop` may also be a single string."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    logprobs: int | None
    n: int
    stop: str | Sequence[str]
    stop_token_ids: tuple[int, ...]
    max_tokens: int | None
    min_tokens: int
    ignore_eos: bool
    speculate: Speculation


class LLM:
    """A model that answers, continues and scores text.

    Get one from `miniphi.load`. Methods may be called from several threads at once: their requests are then computed
    together. Answers do not depend on what else is computed.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        name: str,
        *,
        rope_policy: RopePolicy = "auto",
        on_first_rest: Callable[[], None] | None = None,
    ) -> None:
        """Put a model together from its parts; `template` is None for a model that only continues text.

        `on_first_rest` is called once, when the first requests have all been answered.
        """
        self.name = name
        self.tokenizer = tokenizer
        self.template = template
        self._engine = engine
        self._driver = EngineDriver(engine, on_first_rest=on_first_rest)
        self._rope_policy = rope_policy

    @property
    def driver(self) -> EngineDriver:
        """What shares the engine between requests: for those who post requests of their own."""
        return self._driver

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._engine.max_context

    @overload
    def chat(
        self,
        messages: Iterable[MessageLike],
        *,
        stream: Literal[False] = False,
        sampling: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Iterable[MessageLike],
        *,
        stream: Literal[True],
        sampling: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> CompletionStream: ...

    def chat(
        self,
        messages: Iterable[MessageLike],
        *,
        stream: bool = False,
        sampling: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion | CompletionStream:
        """Answer a conversation.

        `messages` are Message values or dicts such as `{"role": "user", "content": "Hi"}`. Sampling options are given
        one by one (`temperature=0, max_tokens=100`), as a SamplingParams in `sampling`, or both: single ones win.
        With `stream=True` the result is an iterator over Chunks; leaving it early ends the request.

        Raises:
            InvalidRequestError: a message or an option is wrong; the message names it.
            ContextLengthError: the conversation and the answer do not fit the context.
            CapacityError: this machine's cache can never hold them.
            ChatTemplateError: the model's template refuses the conversation.
        """
        started = self._start(self.chat_request(messages, _merge_options(sampling, dict(options))))
        return started if stream else self._finish([started])[0]

    @overload
    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[False] = False,
        sampling: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion: ...

    @overload
    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[True],
        sampling: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> CompletionStream: ...

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        stream: bool = False,
        sampling: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion | CompletionStream:
        """Continue a text as it is, without the chat format.

        Text is encoded with the model's bos token in front where the model was trained with one, and can never become
        a special token. Token ids are used as they are. Options, streaming and errors are those of `chat`.
        """
        started = self._start(self.completion_request(prompt, _merge_options(sampling, dict(options))))
        return started if stream else self._finish([started])[0]

    def chat_many(
        self,
        conversations: Iterable[Iterable[MessageLike]],
        *,
        sampling: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion]:
        """Answer several conversations, computed together; the results are in the order of the conversations."""
        params = _merge_options(sampling, dict(options))
        return self._run_together([self.chat_request(messages, params) for messages in conversations])

    def complete_many(
        self,
        prompts: Iterable[str | Sequence[int]],
        *,
        sampling: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion]:
        """Continue several texts, computed together; the results are in the order of the prompts."""
        params = _merge_options(sampling, dict(options))
        return self._run_together([self.completion_request(prompt, params) for prompt in prompts])

    def loglikelihood(self, context: str, continuation: str) -> LogLikelihood:
        """Return the log-probability of `continuation` after `context`.

        Both are encoded together and divided as lm-evaluation-harness does; see `miniphi.llm.scoring.split_pair`.

        Raises:
            InvalidRequestError: the continuation is empty.
            ContextLengthError: context and continuation do not fit the model's context.
        """
        return self.loglikelihood_many([(context, continuation)])[0]

    def loglikelihood_many(self, pairs: Iterable[tuple[str, str]]) -> list[LogLikelihood]:
        """Return the log-likelihoods of several (context, continuation) pairs, computed together, in their order."""
        items = [split_pair(self.tokenizer, context, continuation) for context, continuation in pairs]
        return [likelihood(scores) for scores in iter_scores(self._driver, items, self._rope_policy)]

    def perplexity(
        self,
        text: str,
        *,
        window: int | None = None,
        stride: int | None = None,
        on_progress: Callable[[Perplexity, float], None] | None = None,
    ) -> Perplexity:
        """Return the perplexity of a text, which may be longer than the context.

        The text is cut into windows of `window` tokens (default: 2048, or what the context holds) that begin every
        `stride` tokens (default: `window`, so that they do not overlap); each token counts once, in the first window
        that sees it, and the first token of a window does not count. `on_progress` is called after each window with
        the perplexity so far and the fraction that is done.
        """
        largest = self.context - 1  # the engine needs room for one token of its own
        window = min(DEFAULT_WINDOW, largest) if window is None else window
        if window > largest:
            raise InvalidRequestError(f"window is {window}; a context of {self.context} tokens allows up to {largest}")
        token_ids = self.encode(text)
        windows = plan_windows(len(token_ids), window, window if stride is None else stride)
        items = [each.scored(token_ids) for each in windows]
        nll, count = 0.0, 0
        for index, scores in enumerate(iter_scores(self._driver, items, self._rope_policy), start=1):
            nll -= sum(token.logprob for token in scores)
            count += len(scores)
            if on_progress is not None:
                on_progress(running_perplexity(nll, count), index / len(items))
        return running_perplexity(nll, count)

    def chat_request(self, messages: Iterable[MessageLike], params: SamplingParams) -> Request:
        """Return what `chat` asks the engine for. Safe from any thread; raises what `chat` does before it starts."""
        token_ids = self.render(messages).token_ids
        return Request(token_ids=token_ids, params=params, rope_policy=self._rope_policy)

    def completion_request(
        self, prompt: str | Sequence[int], params: SamplingParams, *, score_prompt: bool = False
    ) -> Request:
        """Return what `complete` asks the engine for; with `score_prompt` the prompt's tokens are scored as well."""
        token_ids = tuple(self.encode(prompt) if isinstance(prompt, str) else prompt)
        if not token_ids:
            raise InvalidRequestError("prompt is empty; give at least one character or token")
        scored_from = 1 if score_prompt and len(token_ids) > 1 else None
        return Request(
            token_ids=token_ids, params=params, rope_policy=self._rope_policy, prompt_logprobs_start=scored_from
        )

    def render(self, messages: Iterable[MessageLike], *, add_generation_prompt: bool = True) -> RenderedChat:
        """Return a conversation as the model reads it. Raises what `chat` does before it starts."""
        if self.template is None:
            raise UnsupportedModelError(f"{self.name} has no chat template; use complete (or `miniphi generate --raw`)")
        checked = read_messages(messages)
        rendered = self.template.render(checked, add_generation_prompt=add_generation_prompt)
        if rendered.dropped:
            index = rendered.dropped[0]
            raise InvalidRequestError(
                f"messages[{index}] ({checked[index].role}) has no place in the chat template of {self.name}, which "
                "would leave it out without a word; put its text into a message of the user"
            )
        return rendered

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Return the token ids of a text, with bos in front where the model was trained with one."""
        token_ids = self.tokenizer.encode(text)
        return self._with_bos(token_ids) if add_bos else token_ids

    def _with_bos(self, token_ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [bos, *token_ids] if self.tokenizer.add_bos and bos is not None else token_ids

    def _start(self, request: Request) -> CompletionStream:
        return CompletionStream(self._driver, request, self.tokenizer, self.name)

    def _run_together(self, requests: Sequence[Request]) -> list[Completion]:
        started: list[CompletionStream] = []
        try:
            for request in requests:
                started.append(self._start(request))
            return self._finish(started)
        finally:
            for stream in started:
                stream.close()

    @staticmethod
    def _finish(started: Sequence[CompletionStream]) -> list[Completion]:
        return [run_to_end(stream) for stream in started]


def _merge_options(sampling: SamplingParams | None, options: dict[str, Any]) -> SamplingParams:
    known = [field.name for field in fields(SamplingParams)]
    for name in options:
        if name not in known:
            raise InvalidRequestError(f"unknown sampling option {name!r}; known options: {', '.join(known)}")
    if isinstance(options.get("stop"), str):
        options["stop"] = (options["stop"],)
    return replace(sampling or SamplingParams(), **options)
