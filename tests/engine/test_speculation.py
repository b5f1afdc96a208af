"""Guessing tokens ahead: what is guessed, when, and that no token changes."""

from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from miniphi.engine import Engine, Request, SamplingParams
from miniphi.engine.speculation import (
    MAX_DRAFT,
    MAX_ROWS,
    PromptLookup,
    StepCosts,
    index_ngrams,
    plan_drafts,
)
from miniphi.errors import InvalidRequestError
from miniphi.testing import FakeProgram, fake_config

from .driving import Outputs, drain, expected_tokens, make_engine, prompt, tokens


class CopyingProgram(FakeProgram):
    """Mostly goes on as its context did after the last tokens, so that many guesses come true and many do not."""

    bonus = 3.0

    def logits(self, context: NDArray[np.int32] | list[int], *, use_long_factors: bool = False) -> NDArray[np.float32]:
        logits = super().logits(context, use_long_factors=use_long_factors) * np.float32(0.25)
        ids = list(map(int, context))
        for size in (2, 1):
            for position in range(len(ids) - 1, size - 1, -1):
                if ids[position - size : position] == ids[-size:]:
                    logits[ids[position]] += self.bonus
                    return logits
        return logits


class LoopingProgram(CopyingProgram):
    """Always goes on as its context did."""

    bonus = 20.0


def lookup_of(prompt_ids: Sequence[int], answer: Sequence[int]) -> PromptLookup:
    token_ids = array("i", prompt_ids)
    lookup = PromptLookup(token_ids, index_ngrams(prompt_ids), len(prompt_ids))
    for token in answer:
        token_ids.append(token)
        lookup.advance()
    return lookup


def test_the_guess_is_what_followed_the_last_three_tokens() -> None:
    lookup = lookup_of([1, 2, 3, 4, 9, 2, 3, 5, 6], [1, 2, 3])
    assert lookup.has_guess
    assert lookup.draft(3) == (4, 9, 2)


def test_two_tokens_do_where_three_never_came_before_and_the_answer_counts_too() -> None:
    assert lookup_of([1, 2, 3, 4], [7, 2, 3]).draft(1) == (4,)
    assert lookup_of([1, 2, 3, 4], [7, 8, 9, 1, 7, 8]).draft(2) == (9, 1)
    assert lookup_of([1], [5, 6, 7, 5, 6]).draft(1) == (7,)
    assert not lookup_of([1, 2, 3, 4], [2, 4]).has_guess
    assert not lookup_of([1], []).has_guess


def test_the_latest_occurrence_counts() -> None:
    assert lookup_of([1, 2, 3, 9, 1, 2, 4, 9], [8, 1, 2]).draft(1) == (4,)


def test_a_loop_goes_on_beyond_the_end() -> None:
    assert lookup_of([1, 2, 3], [4, 5, 6, 4, 5]).draft(8) == (6, 4, 5, 6, 4, 5, 6, 4)


def test_a_guess_that_comes_true_is_followed_and_one_that_does_not_is_dropped() -> None:
    document = list(range(10, 40))
    assert lookup_of(document, [12, 13, 14, 15, 16]).draft(2) == (17, 18)
    assert not lookup_of(document, [12, 13, 14, 50]).has_guess
    assert lookup_of(document, [12, 13, 14, 50, 30, 31]).draft(2) == (32, 33)


def test_chances_fall_along_a_guess_and_are_learned() -> None:
    document = [int(token) for token in np.random.default_rng(1).permutation(1000)]
    fresh = lookup_of(document, document[:2]).chances(8)
    assert all(0 < later < earlier < 1 for earlier, later in pairwise(fresh))
    assert lookup_of(document, document[:20]).chances(1) > lookup_of(document, document[:3]).chances(1)
    wrong = [token for start in range(0, 900, 3) for token in (document[start], document[start + 1], 2000)]
    assert lookup_of(document, [*wrong, *document[:2]]).chances(8) == [], "not worth a thought any more"
    assert sum(lookup_of(document, [*document[:600], *document[:2]]).chances(8)) > sum(fresh)


@given(answer=st.lists(st.integers(0, 3), max_size=60), prompt_ids=st.lists(st.integers(0, 3), min_size=1, max_size=20))
@settings(deadline=None)
def test_a_guess_always_continues_an_earlier_occurrence(answer: list[int], prompt_ids: list[int]) -> None:
    lookup, known = lookup_of(prompt_ids, answer), prompt_ids + answer
    if not lookup.has_guess:
        assert not any(known[i - 2 : i] == known[-2:] for i in range(2, len(known))) or not answer
        return
    draft = list(lookup.draft(5))
    endless = [known + draft[:count] for count in range(5)]
    assert all(
        any(text[i - 2 : i] == text[-2:] and text[i] == token for i in range(2, len(text)))
        for text, token in zip(endless, draft, strict=True)
    )


def test_costs_are_learned_and_a_disturbed_step_hardly_counts() -> None:
    costs = StepCosts()
    for _ in range(200):
        costs.record(1, 0.010)
        costs.record(8, 0.024)
    assert costs.relative(1) == 1
    assert costs.relative(8) == pytest.approx(2.4, rel=0.02)
    assert costs.relative(4) == pytest.approx(1 + 3 * 0.2, rel=0.05), "as if its rows cost what those of 8 do"
    before = costs.relative(8)
    costs.record(8, 100.0)
    assert costs.relative(8) < 1.1 * before
    assert StepCosts(0.5).relative(3) == 2


def test_drafts_are_as_long_as_they_pay() -> None:
    document = list(range(100))
    sure = lookup_of(document, document[:80])
    unsure = lookup_of(document, document[10:12])

    def plan(lookups: list[PromptLookup | None], cost: float, room: int = 100) -> list[int]:
        return plan_drafts(lookups, [room] * len(lookups), StepCosts(cost))

    assert plan([sure], 0.0) == [MAX_DRAFT]
    assert plan([sure], 2.0) == [0]
    assert plan([unsure], 0.6) == [0]
    assert plan([sure], 0.0, room=3) == [3]
    assert plan([None], 0.0) == [0]
    cheap, dear = plan([sure, None, unsure], 0.01), plan([sure, None, unsure], 0.3)
    assert cheap[0] >= dear[0] > dear[2]
    assert cheap[2] >= dear[2]
    assert cheap[1] == 0
    assert sum(plan([sure] * 8, 0.0)) == MAX_ROWS - 8
    assert plan([sure] * MAX_ROWS, 0.0) == [0] * MAX_ROWS


def run_all(engine: Engine, requests: Sequence[Request], gap: int = 0) -> Outputs:
    outputs: Outputs = defaultdict(list)
    for request in requests:
        engine.submit(request)
        for _ in range(gap):
            for output in engine.step():
                outputs[output.request_id, output.index].append(output)
    for key, rest in drain(engine).items():
        outputs[key] += rest
    return outputs


REQUESTS = st.lists(
    st.builds(
        lambda seed, period, repeats, params, policy, start: Request(
            token_ids=prompt(seed, period) * repeats,
            params=params,
            rope_policy=policy,
            prompt_logprobs_start=start,
        ),
        seed=st.integers(0, 1),
        period=st.integers(2, 30),
        repeats=st.integers(1, 3),
        params=st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 0.2, 1.0]),
            max_tokens=st.integers(1, 60),
            min_tokens=st.sampled_from([0, 1]),
            n=st.integers(1, 3),
            seed=st.integers(0, 3),
            repetition_penalty=st.sampled_from([1.0, 0.8]),
            frequency_penalty=st.sampled_from([0.0, 0.1]),
            logprobs=st.sampled_from([None, 0, 2]),
            stop_token_ids=st.sampled_from([(), (5, 6, 7)]),
            speculate=st.sampled_from(["auto", "auto", "lookup", "off"]),
        ),
        policy=st.sampled_from(["auto", "hf", "short", "long"]),
        start=st.sampled_from([None, 1]),
    ),
    min_size=1,
    max_size=5,
)


@given(
    requests=REQUESTS,
    num_kv_blocks=st.integers(6, 16),
    max_batch_tokens=st.sampled_from([1, 7, 33, 200]),
    max_logit_rows=st.sampled_from([1, 3, 50]),
    reuse=st.booleans(),
    has_longrope=st.booleans(),
    gap=st.integers(0, 20),
    draft_blocks=st.sampled_from([None, None, 3, 50]),
)
@settings(deadline=None, max_examples=80)
def test_guesses_change_no_token_in_any_mix(
    *,
    requests: list[Request],
    num_kv_blocks: int,
    max_batch_tokens: int,
    max_logit_rows: int,
    reuse: bool,
    has_longrope: bool,
    gap: int,
    draft_blocks: int | None,
) -> None:
    program = CopyingProgram(
        fake_config(original_context=70 if has_longrope else None),
        num_kv_blocks=num_kv_blocks,
        max_batch_tokens=max_batch_tokens,
        max_logit_rows=max_logit_rows,
    )
    draft = None
    if draft_blocks is not None:
        draft = LoopingProgram(num_kv_blocks=draft_blocks, max_batch_tokens=max_batch_tokens)
    engine = make_engine(program, reuse=reuse, draft=draft, draft_row_cost=0.0)
    outputs = run_all(engine, requests, gap)
    plain = [replace(request, params=replace(request.params, speculate="off")) for request in requests]
    want = run_all(make_engine(program, reuse=reuse), plain, gap)
    for request in requests:
        for index in range(request.params.n):
            got = outputs[request.id, index]
            assert tokens(got) == expected_tokens(program, request, index, request.params.max_tokens or 0)
            for one, other in zip(got, want[request.id, index], strict=True):
                counts = {"num_drafted": 0, "num_accepted": 0, "num_cached_tokens": other.num_cached_tokens}
                assert replace(one, **counts) == other
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)
    assert stats.num_blocks_free + stats.num_blocks_cached == num_kv_blocks
    assert stats.num_accepted_tokens <= stats.num_drafted_tokens


def test_guesses_that_come_true_save_steps_and_are_counted() -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    steps = {}
    for mode in ("off", "lookup"):
        engine = make_engine(LoopingProgram(), draft_row_cost=0.0)
        request = Request(token_ids=prompt(3, 20) * 2, params=replace(params, speculate=mode))
        engine.submit(request)
        outputs, steps[mode] = [], 0
        while engine.has_work:
            outputs += engine.step()
            steps[mode] += 1
        assert len(outputs) == 60
        stats = engine.stats
        assert stats.num_generated_tokens == 60
        assert stats.num_drafted_tokens == outputs[-1].num_drafted
        assert stats.num_accepted_tokens == outputs[-1].num_accepted == 60 - steps[mode]
    assert steps["off"] == 60
    assert steps["lookup"] < 12


def test_only_accepted_tokens_are_found_in_the_prefix_cache() -> None:
    program = CopyingProgram()
    engine = make_engine(program, draft_row_cost=0.0)
    first = Request(
        token_ids=prompt(3, 20) * 2, params=SamplingParams(temperature=0.3, seed=1, max_tokens=90, ignore_eos=True)
    )
    engine.submit(first)
    answer = tokens(drain(engine)[first.id, 0])
    assert engine.stats.num_drafted_tokens > engine.stats.num_accepted_tokens > 0
    before = program.num_computed_tokens
    second = Request(token_ids=(*first.token_ids, *answer, 9), params=SamplingParams(temperature=0, max_tokens=1))
    engine.submit(second)
    outputs = drain(engine)[second.id, 0]
    assert program.num_computed_tokens - before == 131 - 128
    assert tokens(outputs) == expected_tokens(program, second, 0, 1)


def test_nothing_is_pre_empted_for_a_guess() -> None:
    def preemptions(mode: str) -> int:
        engine = make_engine(CopyingProgram(num_kv_blocks=9), reuse=False, draft_row_cost=0.0)
        for seed in range(2):
            params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, speculate=mode)  # type: ignore[arg-type]
            engine.submit(Request(token_ids=prompt(seed, 20) * 2, params=params))
        drain(engine)
        return engine.stats.num_preemptions

    assert preemptions("off") == preemptions("lookup") == 0


def test_a_draft_ends_with_the_sequence() -> None:
    program = LoopingProgram()
    engine = make_engine(program, draft_row_cost=0.0)
    period = prompt(3, 20)
    stopping = Request(
        token_ids=period * 3, params=SamplingParams(temperature=0, max_tokens=50, stop_token_ids=(period[7],))
    )
    engine.submit(stopping)
    outputs = drain(engine)[stopping.id, 0]
    assert outputs[-1].finish_reason == "stop"
    assert tokens(outputs) == expected_tokens(program, stopping, 0, 50)
    assert outputs[-1].token_id == period[7]
    assert engine.stats.num_drafted_tokens > 0


def test_speculate_is_checked() -> None:
    with pytest.raises(InvalidRequestError, match=r"speculate must be one of .*, not 'yes'"):
        SamplingParams(speculate="yes")  # type: ignore[arg-type]
