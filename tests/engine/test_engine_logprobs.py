import numpy as np
import pytest

from miniphi.engine import Request, SamplingParams
from miniphi.testing import FakeProgram

from .driving import drain, log_softmax, make_engine, prompt


def test_logprobs_of_generated_tokens() -> None:
    program = FakeProgram()
    engine = make_engine(program)
    request = Request(token_ids=prompt(8, 12), params=SamplingParams(max_tokens=4, seed=1, logprobs=3, ignore_eos=True))
    engine.submit(request)
    known = list(request.token_ids)
    for output in drain(engine)[request.id, 0]:
        exact = log_softmax(program.logits(known))
        assert output.logprob == pytest.approx(exact[output.token_id], abs=1e-6)
        assert output.top_logprobs is not None
        assert [t.token_id for t in output.top_logprobs] == np.argsort(-exact)[:3].tolist()
        assert output.top_logprobs[0].logprob == pytest.approx(exact.max(), abs=1e-6)
        known.append(output.token_id)


@pytest.mark.parametrize("start", [1, 33, 64, 65, 90, 100])
@pytest.mark.parametrize("max_logit_rows", [2, 40])
@pytest.mark.parametrize("is_cached", [False, True])
def test_prompt_logprobs(start: int, max_logit_rows: int, is_cached: bool) -> None:
    program = FakeProgram(max_logit_rows=max_logit_rows)
    engine = make_engine(program)
    ids = prompt(9, 100)
    params = SamplingParams(temperature=0, max_tokens=2, n=2)
    if is_cached:
        engine.submit(Request(token_ids=ids, params=params))
        drain(engine)
    engine.submit(Request(id="other", token_ids=prompt(2, 10), params=SamplingParams(max_tokens=30, ignore_eos=True)))
    engine.submit(Request(id="a", token_ids=ids, params=params, prompt_logprobs_start=start))
    outputs = drain(engine)
    scores = outputs["a", 0][0].prompt_logprobs
    assert scores is not None
    assert outputs["a", 1][0].prompt_logprobs is None
    assert [score.token_id for score in scores] == list(ids[start:])
    for i, score in enumerate(scores, start):
        exact = log_softmax(program.logits(list(ids[:i])))
        assert score.logprob == pytest.approx(exact[ids[i]], abs=1e-6)
        assert score.is_greedy == (int(exact.argmax()) == ids[i])


def test_prompt_logprobs_survive_pre_emption() -> None:
    program = FakeProgram(num_kv_blocks=6, max_batch_tokens=16, max_logit_rows=3)
    engine = make_engine(program)
    params = SamplingParams(max_tokens=100, ignore_eos=True, seed=1)
    engine.submit(Request(id="old", token_ids=prompt(1, 30), params=params))
    engine.step()
    engine.step()
    ids = prompt(2, 120)
    engine.submit(Request(id="a", token_ids=ids, params=SamplingParams(max_tokens=1), prompt_logprobs_start=1))
    scores = drain(engine)["a", 0][0].prompt_logprobs
    assert engine.stats.num_preemptions == 1
    assert scores is not None
    assert [score.token_id for score in scores] == list(ids[1:])
    want = [log_softmax(program.logits(list(ids[:i])))[ids[i]] for i in range(1, 120)]
    assert [score.logprob for score in scores] == pytest.approx(want, abs=1e-6)
