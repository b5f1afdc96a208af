"""The tokens of a request never depend on what runs beside it, on chunks, on pre-emption or on what was cached."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniphi.engine import Engine, Request, RopePolicy, SamplingParams
from miniphi.testing import FakeProgram, fake_config

from .driving import STOP, Outputs, drain, expected_tokens, make_engine, prompt, tokens

REQUESTS = st.lists(
    st.builds(
        lambda seed, length, tail, max_tokens, n, temperature, policy, penalty: Request(
            # Few different beginnings, so that prefixes are shared often.
            token_ids=prompt(seed, length) + tail,
            params=SamplingParams(
                temperature=temperature, max_tokens=max_tokens, n=n, seed=seed + 10, repetition_penalty=penalty
            ),
            rope_policy=policy,
        ),
        seed=st.integers(0, 1),
        length=st.integers(1, 120),
        tail=st.sampled_from([(), (7,), (8,)]),
        max_tokens=st.integers(1, 40),
        n=st.integers(1, 3),
        temperature=st.sampled_from([0.0, 1.0]),
        policy=st.sampled_from(["auto", "hf", "short", "long"]),
        penalty=st.sampled_from([1.0, 1.3]),
    ),
    min_size=1,
    max_size=6,
)


@given(
    requests=REQUESTS,
    num_kv_blocks=st.integers(6, 16),
    max_batch_tokens=st.sampled_from([1, 7, 33, 200]),
    max_logit_rows=st.sampled_from([1, 3, 50]),
    chunk=st.sampled_from([None, 1, 16, 32]),
    reuse=st.booleans(),
    has_longrope=st.booleans(),
    gap=st.integers(0, 20),
)
@settings(deadline=None, max_examples=60)
def test_every_mix_gives_the_tokens_of_each_request_alone(
    *,
    requests: list[Request],
    num_kv_blocks: int,
    max_batch_tokens: int,
    max_logit_rows: int,
    chunk: int | None,
    reuse: bool,
    has_longrope: bool,
    gap: int,
) -> None:
    program = FakeProgram(
        fake_config(original_context=70 if has_longrope else None),
        num_kv_blocks=num_kv_blocks,
        max_batch_tokens=max_batch_tokens,
        max_logit_rows=max_logit_rows,
    )
    engine = make_engine(program, reuse=reuse, chunk=chunk)
    outputs: Outputs = defaultdict(list)
    for request in requests:
        engine.submit(request)
        for _ in range(gap):
            for output in engine.step():
                outputs[output.request_id, output.index].append(output)
    for key, rest in drain(engine).items():
        outputs[key] += rest
    for request in requests:
        for index in range(request.params.n):
            got = outputs[request.id, index]
            max_tokens = request.params.max_tokens or 0
            assert tokens(got) == expected_tokens(program, request, index, max_tokens)
            assert [output.finish_reason for output in got[:-1]] == [None] * (len(got) - 1)
            assert got[-1].finish_reason == ("stop" if got[-1].token_id == STOP else "length")
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)
    assert stats.num_blocks_free + stats.num_blocks_cached == num_kv_blocks


def test_pre_emption_changes_nothing_but_the_work() -> None:
    def run(num_kv_blocks: int) -> tuple[Outputs, Engine]:
        program = FakeProgram(num_kv_blocks=num_kv_blocks)
        engine = make_engine(program, reuse=False)
        for i in range(4):
            params = SamplingParams(max_tokens=60, seed=i, ignore_eos=True, logprobs=2)
            engine.submit(Request(id=str(i), token_ids=prompt(i, 40), params=params))
        return drain(engine), engine

    tight, tight_engine = run(7)
    roomy, roomy_engine = run(64)
    assert tight_engine.stats.num_preemptions > 0
    assert roomy_engine.stats.num_preemptions == 0
    assert tight == roomy


def test_a_second_request_with_the_same_prefix_computes_only_the_rest() -> None:
    program = FakeProgram()
    engine = make_engine(program)
    shared = prompt(3, 100)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    engine.submit(Request(token_ids=shared, params=params))
    drain(engine)
    before = program.num_computed_tokens
    second = Request(token_ids=(*shared[:80], 5, 6, 7), params=params)
    engine.submit(second)
    outputs = drain(engine)[second.id, 0]
    assert program.num_computed_tokens - before == 83 - 64 + 2
    assert engine.stats.num_reused_tokens == 64
    assert [output.num_cached_tokens for output in outputs] == [64, 64, 64]
    assert tokens(outputs) == expected_tokens(program, second, 0, 3)


@pytest.mark.parametrize(
    ("salt", "policy", "computed"), [("", "auto", 36), ("other", "auto", 100), ("", "long", 100), ("", "short", 36)]
)
def test_prefixes_are_shared_within_a_salt_and_a_factor_set(salt: str, policy: RopePolicy, computed: int) -> None:
    program = FakeProgram(fake_config(original_context=500))
    engine = make_engine(program)
    params = SamplingParams(temperature=0, max_tokens=1)
    engine.submit(Request(token_ids=prompt(3, 100), params=params))
    drain(engine)
    before = program.num_computed_tokens
    engine.submit(Request(token_ids=prompt(3, 100), params=params, cache_salt=salt, rope_policy=policy))
    drain(engine)
    assert program.num_computed_tokens - before == (100 - 96 if computed == 36 else computed)


def test_generated_tokens_are_reused_by_the_next_turn() -> None:
    program = FakeProgram()
    engine = make_engine(program)
    first = Request(token_ids=prompt(4, 50), params=SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
    engine.submit(first)
    history = first.token_ids + tuple(tokens(drain(engine)[first.id, 0]))
    before = program.num_computed_tokens
    engine.submit(Request(token_ids=(*history, 9), params=SamplingParams(temperature=0, max_tokens=1)))
    drain(engine)
    assert program.num_computed_tokens - before == 101 - 96


def test_hf_policy_computes_everything_again_beyond_the_border() -> None:
    program = FakeProgram(fake_config(original_context=40))
    engine = make_engine(program)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    request = Request(token_ids=prompt(5, 30), params=params, rope_policy="hf")
    engine.submit(request)
    assert tokens(drain(engine)[request.id, 0]) == expected_tokens(program, request, 0, 20)
    assert program.num_computed_tokens == 30 + 10 + 41 + 8
    auto = Request(token_ids=prompt(5, 30), params=params)
    engine.submit(auto)
    assert tokens(drain(engine)[auto.id, 0]) == expected_tokens(program, auto, 0, 20)


def test_a_long_request_does_not_touch_a_short_one_beside_it() -> None:
    program = FakeProgram(fake_config(original_context=64))
    alone = make_engine(program)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    short = Request(id="short", token_ids=prompt(6, 20), params=params)
    long = Request(id="long", token_ids=prompt(6, 90), params=params)
    alone.submit(short)
    want = drain(alone)["short", 0]
    together = make_engine(program)
    together.submit(long)
    together.submit(short)
    got = drain(together)
    assert got["short", 0] == want
    assert tokens(got["long", 0]) == expected_tokens(program, long, 0, 20)


def test_n_sequences_differ_by_seed_and_share_the_prompt() -> None:
    program = FakeProgram()
    engine = make_engine(program)
    params = SamplingParams(max_tokens=8, n=4, seed=1, ignore_eos=True)
    request = Request(token_ids=prompt(7, 70), params=params)
    engine.submit(request)
    outputs = drain(engine)
    assert sorted(index for _, index in outputs) == [0, 1, 2, 3]
    assert len({tuple(tokens(o)) for o in outputs.values()}) == 4
    assert program.num_computed_tokens == 70 + 3 * 6 + 4 * 7
    assert engine.stats.num_prompt_tokens == 70
    again = Request(token_ids=request.token_ids, params=SamplingParams(max_tokens=8, seed=1, ignore_eos=True))
    engine.submit(again)
    assert tokens(drain(engine)[again.id, 0]) == tokens(outputs[request.id, 0])


def test_without_a_seed_two_runs_differ() -> None:
    engine = make_engine(FakeProgram())
    for name in "ab":
        engine.submit(Request(id=name, token_ids=(1, 2), params=SamplingParams(max_tokens=30, ignore_eos=True)))
    outputs = drain(engine)
    assert tokens(outputs["a", 0]) != tokens(outputs["b", 0])
