import math
from itertools import pairwise

import numpy as np
import pytest

from miniphi import LLM, ContextLengthError, InvalidRequestError
from miniphi.llm.scoring import plan_windows, split_pair
from miniphi.testing import FakeProgram
from tests.fake_llm import engine_of, make_llm, make_tokenizer, special_id


def expected_logprobs(llm: LLM, token_ids: list[int], start: int) -> list[float]:
    program = engine_of(llm)._program
    assert isinstance(program, FakeProgram)
    values = []
    for position in range(start, len(token_ids)):
        logits = program.logits(token_ids[:position]).astype(np.float64)
        values.append(float(logits[token_ids[position]] - np.log(np.exp(logits).sum())))
    return values


def test_loglikelihood_sums_the_tokens_of_the_continuation() -> None:
    llm = make_llm(FakeProgram)
    score = llm.loglikelihood("The capital is", " Paris")
    token_ids = make_tokenizer().encode("The capital is Paris")
    start = len(make_tokenizer().encode("The capital is"))
    expected = expected_logprobs(llm, token_ids, start)
    assert score.num_tokens == 6
    assert score.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert score.logprob == pytest.approx(sum(expected), abs=1e-3)
    assert not score.is_greedy


def test_is_greedy_says_that_the_model_would_write_it() -> None:
    llm = make_llm()
    assert llm.loglikelihood("x", "abc").is_greedy
    assert llm.loglikelihood("x", "abcabc").is_greedy
    assert not llm.loglikelihood("x", "abcd").is_greedy


def test_many_pairs_together_equal_one_by_one() -> None:
    llm = make_llm(FakeProgram)
    pairs = [("one", " two"), ("", "alone"), ("x" * 300, "y" * 100), ("one", " three")]
    together = llm.loglikelihood_many(pairs)
    assert [score.num_tokens for score in together] == [4, 5, 100, 5]
    for pair, score in zip(pairs, together, strict=True):
        assert make_llm(FakeProgram).loglikelihood(*pair) == score
    assert not engine_of(llm).has_work
    assert llm.loglikelihood_many([]) == []


def test_white_space_at_the_end_of_the_context_belongs_to_the_continuation() -> None:
    item = split_pair(make_tokenizer(), "a \n", "b")
    assert item.token_ids == tuple(make_tokenizer().encode("a \nb"))
    assert item.start == 1


def test_the_border_is_where_the_context_alone_ends() -> None:
    encode = make_tokenizer().encode
    assert len(encode("xab")) == 2
    assert split_pair(make_tokenizer(), "xab", "c").token_ids == tuple(encode("xabc"))
    # "abc" is one token and half of it is context: that token is what is scored.
    assert split_pair(make_tokenizer(), "xab", "c").start == 1
    assert split_pair(make_tokenizer(), "xab", "cd").start == 2


def test_an_empty_context_is_replaced_by_bos() -> None:
    bos = special_id("<|bos|>")
    for add_bos in (False, True):
        item = split_pair(make_tokenizer(add_bos=add_bos), "", "ok")
        assert item.token_ids == (bos, *make_tokenizer().encode("ok"))
        assert item.start == 1
    item = split_pair(make_tokenizer(add_bos=True), "x", "ok")
    assert item.token_ids == (bos, *make_tokenizer().encode("xok"))
    assert item.start == 2


def test_wrong_pairs_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="continuation is empty"):
        make_llm().loglikelihood("x", "")
    with pytest.raises(ContextLengthError):
        make_llm(context=32).loglikelihood("x" * 30, "yyy")


@pytest.mark.parametrize(
    ("num_tokens", "window", "stride", "expected"),
    [
        (5, 10, 10, [(0, 1, 5)]),
        (10, 4, 4, [(0, 1, 4), (4, 5, 8), (8, 9, 10)]),
        (9, 4, 4, [(0, 1, 4), (4, 5, 8)]),
        (10, 4, 2, [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]),
        (6, 4, 3, [(0, 1, 4), (3, 4, 6)]),
    ],
)
def test_windows(num_tokens: int, window: int, stride: int, expected: list[tuple[int, int, int]]) -> None:
    windows = plan_windows(num_tokens, window, stride)
    assert [(each.begin, each.first, each.end) for each in windows] == expected


def test_overlapping_windows_count_every_token_but_the_first_once() -> None:
    windows = plan_windows(1000, 64, 17)
    assert windows[0].first == 1
    assert all(before.end == after.first for before, after in pairwise(windows))
    assert windows[-1].end == 1000


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((10, 1, 1), "window is 1"),
        ((10, 4, 5), "stride is 5"),
        ((10, 4, 0), "stride is 0"),
        ((1, 4, 4), "has 1 tokens"),
    ],
)
def test_wrong_windows_are_refused(numbers: tuple[int, int, int], expected: str) -> None:
    with pytest.raises(InvalidRequestError, match=expected):
        plan_windows(*numbers)


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    llm = make_llm(FakeProgram)
    text = "Some text to be measured, a little longer than one window."
    token_ids = make_tokenizer().encode(text)
    seen: list[float] = []
    result = llm.perplexity(text, window=32, stride=16, on_progress=lambda running, done: seen.append(done))
    nll = 0.0
    for window in plan_windows(len(token_ids), 32, 16):
        nll -= sum(expected_logprobs(llm, token_ids[window.begin : window.end], window.first - window.begin))
    assert result.num_tokens == len(token_ids) - 1
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll / result.num_tokens), rel=1e-5)
    assert seen == [1 / 3, 2 / 3, 1.0]


def test_perplexity_scores_the_first_token_after_bos() -> None:
    assert make_llm(add_bos=True).perplexity("xyz").num_tokens == 3
    assert make_llm().perplexity("xyz").num_tokens == 2


def test_perplexity_refuses_a_window_beyond_the_context() -> None:
    with pytest.raises(InvalidRequestError, match="window is 64; a context of 64 tokens allows up to 63"):
        make_llm(context=64).perplexity("x" * 100, window=64)
    assert make_llm(context=64).perplexity("x" * 200).num_tokens == 200 - 4


def test_an_interrupted_perplexity_leaves_nothing_behind() -> None:
    llm = make_llm()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.perplexity("x" * 500, window=32, on_progress=stop)
    assert not engine_of(llm).has_work
