from miniphi.engine import Engine, EngineOptions, Request, SamplingParams
from miniphi.engine.batch import Batch
from miniphi.engine.pace import LEAST_TOKENS, PromptPace
from miniphi.testing import FakeProgram

from .driving import drain, prompt, tokens


def test_a_pace_follows_what_was_measured() -> None:
    pace = PromptPace(0.25)
    assert pace.max_tokens == LEAST_TOKENS
    pace.record(100, 0.2)
    assert pace.max_tokens == 120  # 125, in whole tiles
    pace.record(100, 0.6)
    assert pace.max_tokens == 56  # (2 + 6) / 2 ms a token
    pace.record(3, 10.0)  # what reading the weights costs is no cost of a token
    assert pace.max_tokens == 56
    pace.record(100, 100.0)
    assert pace.max_tokens == LEAST_TOKENS
    assert PromptPace(None).max_tokens is None


class _Counting(FakeProgram):
    """Notes how many tokens of prompts each step has beside a decode."""

    def __init__(self) -> None:
        super().__init__()
        self.beside: list[int] = []

    def run(self, batch: Batch, *, reference: bool = False):
        lengths = batch.query_starts[1:] - batch.query_starts[:-1]
        if 1 in lengths and lengths.max() > 1:
            self.beside.append(int(lengths.max()))
        return super().run(batch, reference=reference)


def test_a_long_prompt_leaves_room_for_those_who_wait() -> None:
    program = _Counting()
    engine = Engine(program, options=EngineOptions(max_step_s=1e-9, draft_row_cost=1.0))
    answer = engine.submit(Request(token_ids=prompt(1, 5), params=SamplingParams(max_tokens=60, ignore_eos=True)))
    first = engine.step()
    late = Request(token_ids=prompt(2, 700), params=SamplingParams(temperature=0.0, max_tokens=3))
    engine.submit(late)
    outputs = drain(engine)
    assert program.beside
    assert max(program.beside) == LEAST_TOKENS
    assert len(first) + len(outputs[answer, 0]) == 60
    # When and in which pieces a prompt was computed changes nothing.
    alone = Engine(FakeProgram(), options=EngineOptions(draft_row_cost=1.0))
    alone.submit(late)
    assert tokens(outputs[late.id, 0]) == tokens(drain(alone)[late.id, 0])
