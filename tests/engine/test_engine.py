import math

import numpy as np
import pytest
from numpy.typing import NDArray

from miniphi.engine import Batch, Engine, EngineOptions, Request, SamplingParams
from miniphi.errors import CapacityError, ContextLengthError, InvalidRequestError, MiniphiError
from miniphi.testing import FakeProgram

from .driving import STOP, drain, expected_tokens, make_engine, prompt, tokens


def test_one_request_from_prompt_to_end() -> None:
    program = FakeProgram()
    engine = make_engine(program)
    request = Request(token_ids=prompt(1, 10), params=SamplingParams(temperature=0, max_tokens=6))
    assert engine.submit(request) == request.id
    outputs = drain(engine)[request.id, 0]
    known = list(request.token_ids)
    for output in outputs:
        assert output.token_id == int(program.logits(known).argmax())
        known.append(output.token_id)
    assert [output.finish_reason for output in outputs] == [None] * 5 + ["length"]
    assert outputs[0].logprob is outputs[0].top_logprobs is outputs[0].prompt_logprobs is None
    assert engine.stats.num_generated_tokens == 6
    assert engine.stats.num_prompt_tokens == 10
    assert engine.step() == []


def test_a_stop_id_is_reported_and_ends_the_sequence() -> None:
    program = FakeProgram()
    free = Request(token_ids=prompt(1, 10), params=SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    engine = make_engine(program)
    engine.submit(free)
    want = tokens(drain(engine)[free.id, 0])
    stop = want[3]
    params = SamplingParams(temperature=0, max_tokens=6, stop_token_ids=(stop,), ignore_eos=True)
    stopped = Request(token_ids=prompt(1, 10), params=params)
    engine.submit(stopped)
    outputs = drain(engine)[stopped.id, 0]
    assert tokens(outputs) == want[: want.index(stop) + 1]
    assert outputs[-1].finish_reason == "stop"


def test_ignore_eos_goes_on_and_min_tokens_keeps_stop_ids_away() -> None:
    program = FakeProgram()
    bias = SamplingParams(temperature=0, max_tokens=5, logit_bias={STOP: 100.0})
    engine = make_engine(program)
    for name, params in {
        "plain": bias,
        "ignore": SamplingParams(temperature=0, max_tokens=5, logit_bias={STOP: 100.0}, ignore_eos=True),
        "min": SamplingParams(temperature=0, max_tokens=5, logit_bias={STOP: 100.0}, min_tokens=2),
    }.items():
        engine.submit(Request(id=name, token_ids=(5, 6), params=params))
    outputs = drain(engine)
    assert tokens(outputs["plain", 0]) == [STOP]
    assert tokens(outputs["ignore", 0]) == [STOP] * 5
    assert STOP not in tokens(outputs["min", 0])[:2]
    assert tokens(outputs["min", 0])[2:] == [STOP]


def test_unused_ids_are_never_generated() -> None:
    unused = range(1, 60)
    engine = make_engine(FakeProgram(), unused=unused)
    engine.submit(Request(id="a", token_ids=(1, 2), params=SamplingParams(max_tokens=100, ignore_eos=True)))
    drawn = set(tokens(drain(engine)["a", 0]))
    assert drawn == {0, 60, 61, 62, 63}


def test_abort_frees_and_the_others_go_on() -> None:
    program = FakeProgram()
    engine = make_engine(program)
    params = SamplingParams(max_tokens=20, seed=3, ignore_eos=True)
    kept = Request(id="kept", token_ids=prompt(1, 40), params=params)
    engine.submit(kept)
    engine.submit(Request(id="gone", token_ids=prompt(2, 40), params=params))
    first = [output for _ in range(5) for output in engine.step() if output.request_id == "kept"]
    assert engine.stats.num_blocks_used == 4
    assert engine.abort("gone")
    assert engine.stats.num_blocks_used == 2
    assert not engine.abort("gone")
    rest = drain(engine)
    assert set(rest) == {("kept", 0)}
    assert tokens(first + rest["kept", 0]) == expected_tokens(program, kept, 0, 20)


def test_abort_of_one_choice_leaves_its_siblings() -> None:
    engine = make_engine(FakeProgram())
    engine.submit(Request(id="a", token_ids=(1, 2), params=SamplingParams(n=3, max_tokens=10, ignore_eos=True)))
    engine.step()
    engine.step()
    assert engine.abort("a", 1)
    assert not engine.abort("a", 1)
    lengths = {index: len(outputs) for (_, index), outputs in drain(engine).items()}
    assert lengths == {0: 8, 2: 9}


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Request(token_ids=(64,)), InvalidRequestError, "token_ids holds 64"),
        (Request(token_ids=(1,) * 4096), ContextLengthError, "the context is 4096"),
        (Request(token_ids=(1,) * 100, params=SamplingParams(max_tokens=30)), CapacityError, "5 cache blocks .* has 4"),
    ],
)
def test_what_cannot_run_is_refused_and_leaves_nothing(
    request_: Request, error: type[MiniphiError], message: str
) -> None:
    engine = make_engine(FakeProgram(num_kv_blocks=4))
    with pytest.raises(error, match=message):
        engine.submit(request_)
    assert not engine.has_work
    assert engine.stats.num_waiting == 0


def test_bad_options_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="stop_token_ids holds 64"):
        Engine(FakeProgram(), stop_token_ids=(64,))
    with pytest.raises(InvalidRequestError, match="unused_token_ids holds -1"):
        Engine(FakeProgram(), unused_token_ids=(-1,))
    with pytest.raises(InvalidRequestError, match="max_context is 5000; the model's positions allow 1 to 4096"):
        Engine(FakeProgram(), options=EngineOptions(max_context=5000))


class BrokenProgram(FakeProgram):
    """Raises, or returns a NaN, whenever a token 63 is in the batch."""

    error: BaseException | None = None

    def run(self, batch: Batch, *, reference: bool = False) -> NDArray[np.float32]:
        logits = super().run(batch, reference=reference)
        if 63 in batch.token_ids:
            if self.error is not None:
                raise self.error
            logits[-1, 0] = math.nan
        return logits


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), None])
def test_a_failing_step_ends_its_requests_and_no_others(error: BaseException | None) -> None:
    program = BrokenProgram(max_batch_tokens=8)
    program.error = error
    engine = Engine(program, stop_token_ids=(STOP,))
    params = SamplingParams(max_tokens=4, ignore_eos=True, seed=1, logit_bias={63: -100.0})
    engine.submit(Request(id="bad", token_ids=(63,) * 8, params=params))
    late = Request(id="late", token_ids=(5,) * 8, params=params)
    engine.submit(late)
    with pytest.raises(type(error) if error else MiniphiError):
        engine.step()
    assert engine.failed_request_ids == ("bad",)
    assert engine.stats.num_blocks_used == 0
    assert engine.stats.num_blocks_cached == 0
    assert tokens(drain(engine)["late", 0]) == expected_tokens(program, late, 0, 4)
    assert engine.failed_request_ids == ()
