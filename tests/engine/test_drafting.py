"""A draft model saves steps where it agrees, rests where it does not, gives everything back, and changes no token."""

from dataclasses import replace

import pytest

from miniphi.engine import Engine, Request, SamplingParams
from miniphi.engine.drafting import DraftModel
from miniphi.engine.speculation import MAX_ROWS, StepCosts
from miniphi.errors import InvalidRequestError
from miniphi.testing import FakeProgram, fake_config

from .driving import drain, expected_tokens, make_engine, prompt, tokens

PARAMS = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


def run(engine: Engine, request: Request) -> tuple[list[int], int]:
    """Return the tokens of a request that is alone, and the steps that it took."""
    engine.submit(request)
    outputs, steps = [], 0
    while engine.has_work:
        outputs += engine.step()
        steps += 1
    return tokens(outputs), steps


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_a_draft_that_knows_everything_saves_most_steps(temperature: float) -> None:
    program, draft = FakeProgram(), FakeProgram()
    request = Request(token_ids=prompt(1, 40), params=replace(PARAMS, temperature=temperature, top_p=0.9, seed=5))
    engine = make_engine(program, draft=draft, draft_row_cost=0.0)
    answer, steps = run(engine, request)
    assert answer == expected_tokens(program, request, 0, 60)
    assert engine.stats.num_accepted_tokens == 60 - steps
    assert steps < 40, "the same model with the same noise draws the same tokens"


def test_a_draft_that_knows_nothing_rests() -> None:
    class Stranger(FakeProgram):
        def logits(self, context, *, use_long_factors=False):
            return super().logits([*context, 1], use_long_factors=use_long_factors)[::-1].copy()

    program = FakeProgram(num_kv_blocks=64)
    request = Request(token_ids=prompt(1, 40), params=replace(PARAMS, max_tokens=600))
    engine = make_engine(program, draft=Stranger(num_kv_blocks=64), draft_row_cost=0.05)
    answer, steps = run(engine, request)
    assert answer == expected_tokens(program, request, 0, 600)
    assert 0 < engine.stats.num_drafted_tokens < 100
    assert steps > 500


def test_requests_choose() -> None:
    for mode, is_drafted in (("auto", True), ("lookup", False), ("off", False)):
        engine = make_engine(FakeProgram(), draft=FakeProgram(), draft_row_cost=0.0)
        params = replace(PARAMS, speculate=mode)  # type: ignore[arg-type]
        run(engine, Request(token_ids=prompt(2, 10), params=params))
        assert (engine.stats.num_drafted_tokens > 30) == is_drafted


def test_a_cache_without_room_means_no_guesses() -> None:
    program = FakeProgram()
    engine = make_engine(program, draft=FakeProgram(num_kv_blocks=1), draft_row_cost=0.0)
    request = Request(token_ids=prompt(2, 40), params=PARAMS)
    answer, steps = run(engine, request)
    assert answer == expected_tokens(program, request, 0, 60)
    assert steps >= 55


def test_blocks_come_back_when_sequences_end_or_are_given_up() -> None:
    engine = make_engine(FakeProgram(num_kv_blocks=64), draft=FakeProgram(num_kv_blocks=64), draft_row_cost=0.0)
    for seed in range(3):
        engine.submit(Request(id=str(seed), token_ids=prompt(seed, 40), params=replace(PARAMS, n=2)))
    for _ in range(6):
        engine.step()
    model = engine._draft_model
    assert model is not None
    assert model._cache.num_used > 0
    engine.abort("1")
    drain(engine)
    assert model._cache.num_used == 0
    assert not model._followers


def test_a_failing_draft_ends_the_requests_of_its_step() -> None:
    class Failing(FakeProgram):
        def run(self, batch):
            raise MemoryError

    engine = make_engine(FakeProgram(), draft=Failing(), draft_row_cost=0.0)
    engine.submit(Request(id="one", token_ids=prompt(1, 10), params=PARAMS))
    engine.step()
    with pytest.raises(MemoryError):
        engine.step()
    assert engine.failed_request_ids == ("one",)
    assert not engine.has_work
    assert engine.stats.num_blocks_used == 0


def test_the_plan_weighs_the_draft_and_the_rows() -> None:
    model = DraftModel(FakeProgram())
    assert model.plan(1, 1, StepCosts(0.0)).length > model.plan(1, 1, StepCosts(0.2)).length
    assert model.plan(1, 1, StepCosts(1.0)).length == 0
    assert model.plan(8, 8, StepCosts(0.0)).length <= (MAX_ROWS - 8) // 8
    lengths = [model.plan(1, 1, StepCosts(1.0)).length for _ in range(300)]
    assert sum(lengths) == 2, "tried again once in a while"


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="the draft model knows 32 token ids and the model 64"):
        Engine(FakeProgram(), draft=FakeProgram(fake_config(vocab_size=32)))
