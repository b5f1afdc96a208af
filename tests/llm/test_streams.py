import signal
import threading
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniphi import Choice, Chunk, CompletionStream
from miniphi.engine import Batch
from miniphi.testing import FakeProgram
from tests.fake_llm import EchoProgram, engine_of, make_llm

QUESTION = [{"role": "user", "content": "a long question, and a long answer"}]


def join(chunks: list[Chunk], index: int = 0) -> Choice:
    mine = [chunk for chunk in chunks if chunk.index == index]
    assert [chunk.finish_reason for chunk in mine[:-1]] == [None] * (len(mine) - 1)
    reason = mine[-1].finish_reason
    assert reason is not None
    return Choice(
        index=index,
        text="".join(chunk.text for chunk in mine),
        token_ids=tuple(token for chunk in mine for token in chunk.token_ids),
        finish_reason=reason,
        logprobs=tuple(token for chunk in mine for token in chunk.logprobs or ()) or None,
    )


def test_chunks_come_one_by_one_and_the_last_one_tells_usage() -> None:
    stream = make_llm().chat(QUESTION, stream=True, temperature=0)
    chunks = list(stream)
    assert len(chunks) == len("a long question, and a long answer") + 1
    assert all(chunk.usage is None and chunk.timings is None for chunk in chunks[:-1])
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].usage == stream.usage
    assert chunks[-1].timings == stream.timings
    assert next(stream, None) is None


def test_half_characters_are_never_streamed() -> None:
    chunks = list(make_llm().complete("x", stream=True, temperature=0, max_tokens=2))
    assert [chunk.text for chunk in chunks] == ["abc", "abc"]
    question = [{"role": "user", "content": "日本é"}]
    texts = [chunk.text for chunk in make_llm().chat(question, stream=True, temperature=0)]
    assert texts == ["日", "本", "é", ""]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    stop=st.lists(st.text("ab\n é\x00\x01", min_size=1, max_size=2), max_size=3),
    max_tokens=st.integers(1, 60),
    n=st.integers(1, 3),
    logprobs=st.sampled_from([None, 0, 2]),
)
def test_streamed_equals_unstreamed(seed: int, stop: list[str], max_tokens: int, n: int, logprobs: int | None) -> None:
    options = {"seed": seed, "stop": tuple(stop), "max_tokens": max_tokens, "n": n, "logprobs": logprobs}
    whole = make_llm(FakeProgram).complete("start", **options)  # type: ignore[call-overload]
    chunks = list(make_llm(FakeProgram).complete("start", stream=True, **options))  # type: ignore[call-overload]
    assert tuple(join(chunks, index) for index in range(n)) == whole.choices
    for choice in whole.choices:
        assert not any(text in choice.text for text in stop)


@settings(max_examples=60, deadline=None)
@given(
    text=st.text("ab \n", min_size=1, max_size=60),
    stop=st.lists(st.text("ab \n", min_size=1, max_size=4), max_size=2),
    max_tokens=st.integers(1, 60),
    temperature=st.sampled_from([0.0, 10.0]),
    n=st.integers(1, 2),
    logprobs=st.sampled_from([None, 1]),
)
def test_guessing_ahead_changes_nothing_but_the_counts(
    *, text: str, stop: list[str], max_tokens: int, temperature: float, n: int, logprobs: int | None
) -> None:
    question = [{"role": "user", "content": text}]
    options = {"stop": stop, "max_tokens": max_tokens, "temperature": temperature, "n": n, "logprobs": logprobs}
    plain, guessed = (
        make_llm(draft_row_cost=0.0).chat(question, seed=1, speculate=mode, **options)  # type: ignore[call-overload]
        for mode in ("off", "lookup")
    )
    assert guessed.choices == plain.choices
    assert guessed.usage == plain.usage
    assert plain.timings.drafted_tokens == 0
    assert guessed.timings.accepted_tokens <= guessed.timings.drafted_tokens


def test_an_answer_that_repeats_its_question_needs_few_steps() -> None:
    llm = make_llm(draft_row_cost=0.0)
    with closing(llm.chat(QUESTION, stream=True, temperature=0)) as stream:
        text = "".join(chunk.text for chunk in stream)
        assert text == QUESTION[0]["content"]
        assert stream.timings.accepted_tokens > len(text) // 2
        assert stream.timings.to_dict()["accepted_tokens"] == stream.timings.accepted_tokens
    stats = engine_of(llm).stats
    assert stats.num_accepted_tokens == stream.timings.accepted_tokens


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=30))
def test_any_text_comes_back_as_it_was(text: str) -> None:
    question = [{"role": "user", "content": text}]
    assert make_llm().chat(question, temperature=0).text == text


def test_closing_early_frees_everything() -> None:
    llm = make_llm()
    with closing(llm.chat(QUESTION, stream=True, temperature=0)) as stream:
        next(stream)
        assert engine_of(llm).stats.num_blocks_used == 2
    assert engine_of(llm).stats.num_blocks_used == 0
    assert not engine_of(llm).has_work
    assert stream.usage.completion_tokens == 1
    assert next(stream, None) is None


def test_dropping_the_stream_frees_everything() -> None:
    llm = make_llm()
    next(llm.chat(QUESTION, stream=True, temperature=0))
    assert not engine_of(llm).has_work


def test_leaving_a_loop_in_a_with_block_frees_everything() -> None:
    llm = make_llm()
    with llm.chat(QUESTION, stream=True, temperature=0) as stream:
        for _ in stream:
            break
    assert not engine_of(llm).has_work


def test_two_streams_can_be_read_in_turns() -> None:
    llm = make_llm()
    first = llm.chat([{"role": "user", "content": "first"}], stream=True, temperature=0)
    second = llm.chat([{"role": "user", "content": "second one"}], stream=True, temperature=0)
    assert next(first).text == "f"
    assert next(second).text == "s"
    assert "".join(chunk.text for chunk in first) == "irst"
    assert "".join(chunk.text for chunk in second) == "econd one"


def test_cached_tokens_are_exact_when_requests_run_together() -> None:
    llm = make_llm()
    list(llm.chat(QUESTION, stream=True, temperature=0))
    texts = ["another question", QUESTION[0]["content"], QUESTION[0]["content"] + " again"]
    streams = [llm.chat([{"role": "user", "content": text}], stream=True, temperature=0) for text in texts]
    assert [stream.usage.cached_tokens for stream in streams] == [0, 0, 0]
    for stream in reversed(streams):
        list(stream)
    assert [stream.usage.cached_tokens for stream in streams] == [0, 32, 32]


def test_cached_tokens_count_the_prompt_once_for_all_choices() -> None:
    llm = make_llm()
    first = list(llm.chat(QUESTION, stream=True, temperature=0, n=3))[-1].usage
    second = list(llm.chat(QUESTION, stream=True, temperature=0, n=3))[-1].usage
    assert first is not None
    assert second is not None
    assert (first.cached_tokens, second.cached_tokens) == (0, 32)


def test_threads_share_the_engine() -> None:
    llm = make_llm()
    texts = [f"message {number} " * (number + 1) for number in range(8)]
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = llm.chat([{"role": "user", "content": texts[number]}], temperature=0).text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == dict(enumerate(texts))
    assert not engine_of(llm).has_work


def test_closing_from_another_thread_ends_the_wait() -> None:
    stream: CompletionStream

    class Closing(EchoProgram):
        num_steps = 0

        def run(self, batch: Batch, *, reference: bool = False):  # type: ignore[no-untyped-def]
            self.num_steps += 1
            if self.num_steps == 3:
                thread = threading.Thread(target=stream.close)
                thread.start()
                thread.join()
            return super().run(batch)

    llm = make_llm(Closing)
    stream = llm.chat(QUESTION, stream=True, temperature=0)
    assert "".join(chunk.text for chunk in stream) == "a l"
    assert llm.chat(QUESTION, temperature=0).text == QUESTION[0]["content"]
    assert not engine_of(llm).has_work


class InterruptedProgram(EchoProgram):
    """Presses Ctrl-C inside its third step."""

    num_steps = 0

    def run(self, batch: Batch, *, reference: bool = False):  # type: ignore[no-untyped-def]
        self.num_steps += 1
        if self.num_steps == 3:
            signal.raise_signal(signal.SIGINT)
        return super().run(batch)


def read_until_interrupted(stream: CompletionStream) -> str:
    chunks: list[Chunk] = []
    with pytest.raises(KeyboardInterrupt):
        chunks.extend(stream)
    return "".join(chunk.text for chunk in chunks)


def test_ctrl_c_ends_the_request_between_steps_and_the_engine_goes_on() -> None:
    llm = make_llm(InterruptedProgram)
    stream = llm.chat(QUESTION, stream=True, temperature=0)
    assert read_until_interrupted(stream) == "a "
    assert stream.usage.completion_tokens == 3
    assert not engine_of(llm).has_work
    assert engine_of(llm).stats.num_blocks_used == 0
    assert llm.chat(QUESTION, temperature=0).text == QUESTION[0]["content"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_during_many_ends_all_of_them() -> None:
    llm = make_llm(InterruptedProgram)
    with pytest.raises(KeyboardInterrupt):
        llm.complete_many(["one", "two", "three"], temperature=0, max_tokens=10)
    assert not engine_of(llm).has_work
