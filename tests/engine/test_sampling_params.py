import math

import pytest

from miniphi.engine import DEFAULT_MAX_TOKENS, Request, RopePolicy, SamplingParams
from miniphi.errors import ContextLengthError, InvalidRequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: math.nan}),
        ("seed", 2**64),
        ("seed", 0.5),
        ("logprobs", -1),
        ("logprobs", 21),
        ("n", 0),
        ("n", 129),
        ("stop", "word"),
        ("stop", ("",)),
        ("stop", ("x",) * 33),
        ("stop", ("x" * 1025,)),
        ("stop", (1,)),
        ("stop_token_ids", (-1,)),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", True),
        ("min_tokens", -1),
    ],
)
def test_a_value_out_of_range_names_its_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(InvalidRequestError, match="min_tokens is 5, more than max_tokens 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_the_message_names_the_range_and_the_value() -> None:
    with pytest.raises(InvalidRequestError, match=r"^top_p must be above 0 and at most 1, not 0$"):
        SamplingParams(top_p=0)
    with pytest.raises(InvalidRequestError, match=r"^n must be at least 1 and at most 128, not 0$"):
        SamplingParams(n=0)


def test_borders_are_allowed() -> None:
    params = SamplingParams(
        temperature=0, top_p=1, min_p=1, logprobs=20, n=128, seed=-(2**63), min_tokens=3, max_tokens=3, stop=("x",) * 32
    )
    assert (params.temperature, params.logprobs, params.stop[0]) == (0, 20, "x")


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="token_ids is empty"):
        Request(token_ids=())


def test_an_unknown_rope_policy_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"rope_policy must be one of .* not 'dynamic'"):
        Request(token_ids=(1,), rope_policy="dynamic")  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [0, 4, -1])
def test_prompt_logprobs_start_out_of_the_prompt(start: int) -> None:
    with pytest.raises(InvalidRequestError, match="prompt_logprobs_start must be from 1 to the prompt's 3 tokens"):
        Request(token_ids=(1, 2, 3), prompt_logprobs_start=start)


@pytest.mark.parametrize(
    ("context", "prompt_len", "max_tokens", "expected"),
    [
        (131072, 10, None, DEFAULT_MAX_TOKENS),
        (100, 10, None, 90),
        (100, 99, None, 1),
        (100, 10, 90, 90),
        (9000, 10, 8000, 8000),
    ],
)
def test_max_tokens(context: int, prompt_len: int, max_tokens: int | None, expected: int) -> None:
    request = Request(token_ids=(1,) * prompt_len, params=SamplingParams(max_tokens=max_tokens))
    assert request.resolve_max_tokens(context) == expected


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(100, None), (120, None), (10, 91), (100, 1)])
def test_a_prompt_and_answer_beyond_the_context(prompt_len: int, max_tokens: int | None) -> None:
    request = Request(token_ids=(1,) * prompt_len, params=SamplingParams(max_tokens=max_tokens))
    with pytest.raises(ContextLengthError, match=f"the prompt has {prompt_len} tokens .*; the context is 100"):
        request.resolve_max_tokens(100)


@pytest.mark.parametrize("bad", [-1, 64, 2**40, 0.5, "1"])
def test_a_prompt_token_outside_the_vocabulary(bad: object) -> None:
    with pytest.raises(InvalidRequestError, match="token_ids"):
        Request(token_ids=(1, bad)).check_vocabulary(64)  # type: ignore[arg-type]


def test_other_ids_outside_the_vocabulary() -> None:
    with pytest.raises(InvalidRequestError, match="stop_token_ids holds 64; the model's ids go from 0 to 63"):
        Request(token_ids=(1,), params=SamplingParams(stop_token_ids=(64,))).check_vocabulary(64)
    with pytest.raises(InvalidRequestError, match="logit_bias holds 99"):
        Request(token_ids=(1,), params=SamplingParams(logit_bias={99: 1.0})).check_vocabulary(64)


@pytest.mark.parametrize(
    ("policy", "prompt_len", "expected"),
    [("auto", 100, 3996), ("auto", 3072, 1024), ("auto", 3073, 4096), ("long", 100, 4096), ("hf", 100, 4096)],
)
def test_unlimited_short_chats_stay_inside_the_original_context(
    policy: RopePolicy, prompt_len: int, expected: int
) -> None:
    request = Request(token_ids=(1,) * prompt_len, rope_policy=policy)
    assert request.resolve_max_tokens(131072, 4096) == expected
