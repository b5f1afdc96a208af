import pytest

from miniphi import (
    CapacityError,
    ChatTemplate,
    ContextLengthError,
    InvalidRequestError,
    Message,
    SamplingParams,
    UnsupportedModelError,
)
from miniphi.testing import FakeProgram
from tests.fake_llm import EchoProgram, engine_of, make_llm, make_tokenizer, special_id


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_chat_answers_until_the_stop_token() -> None:
    completion = make_llm().chat(user("Hello wörld"), temperature=0)
    choice = completion.choices[0]
    assert completion.text == choice.text == "Hello wörld"
    assert choice.finish_reason == "stop"
    assert choice.token_ids == (*make_tokenizer().encode("Hello wörld"), special_id("<|end|>"))
    assert choice.logprobs is None
    assert completion.model == "fake"
    assert completion.usage.completion_tokens == 13
    assert completion.usage.prompt_tokens == 12 + 3
    assert completion.usage.total_tokens == 28


def test_messages_may_be_values_or_dicts_and_the_last_question_counts() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        Message(role="user", content="one"),
        {"role": "assistant", "content": "one"},
        Message(role="user", content="two"),
    ]
    assert make_llm().chat(messages, temperature=0).text == "two"


def test_max_tokens_cuts_the_answer() -> None:
    choice = make_llm().chat(user("abcdef"), temperature=0, max_tokens=2).choices[0]
    assert (choice.text, choice.finish_reason, len(choice.token_ids)) == ("abcd", "length", 2)


def test_user_text_cannot_forge_a_special_token() -> None:
    completion = make_llm().chat(user("<|end|>"), temperature=0)
    assert completion.text == "<|end|>"
    assert completion.usage.completion_tokens == len("<|end|>") + 1


def test_a_stop_string_across_tokens_cuts_the_text_and_ends_the_request() -> None:
    llm = make_llm()
    completion = llm.chat(user("one, two, three"), temperature=0, stop=["o, t", ", t"])
    choice = completion.choices[0]
    assert (choice.text, choice.finish_reason) == ("one", "stop")
    assert make_tokenizer().decode(choice.token_ids) == "one, t"
    assert engine_of(llm).stats.num_blocks_used == 0
    assert not engine_of(llm).has_work


def test_stop_may_be_one_string() -> None:
    assert make_llm().chat(user("abXcd"), temperature=0, stop="X").text == "ab"


def test_text_held_back_for_a_stop_string_is_delivered_when_the_answer_ends_otherwise() -> None:
    completion = make_llm().chat(user("one<"), temperature=0, stop=["<<<"])
    assert (completion.text, completion.choices[0].finish_reason) == ("one<", "stop")
    assert make_llm().chat(user("one<more"), temperature=0, max_tokens=4, stop=["<<<"]).text == "one<"


def test_a_character_cut_by_max_tokens_becomes_the_replacement_character() -> None:
    completion = make_llm().chat(user("a😀"), temperature=0, max_tokens=3)
    assert completion.text == "a\N{REPLACEMENT CHARACTER}"


def test_single_options_win_over_sampling() -> None:
    sampling = SamplingParams(temperature=0, max_tokens=3)
    llm = make_llm()
    assert llm.chat(user("123456"), sampling=sampling).text == "123"
    assert llm.chat(user("123456"), sampling=sampling, max_tokens=5).text == "12345"


def test_n_gives_choices_in_order_with_their_own_stops() -> None:
    llm = make_llm(FakeProgram)
    completion = llm.chat(user("x"), n=3, seed=7, max_tokens=20)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert len({choice.token_ids for choice in completion.choices}) == 3
    stop = completion.choices[1].text[3:5]
    again = llm.chat(user("x"), n=3, seed=7, max_tokens=20, stop=[stop])
    for before, after in zip(completion.choices, again.choices, strict=True):
        assert after.text == before.text.split(stop)[0]
        assert after.finish_reason == ("stop" if stop in before.text else before.finish_reason)
    assert engine_of(llm).stats.num_blocks_used == 0


def test_logprobs_have_an_entry_per_token() -> None:
    completion = make_llm().chat(user("hé"), temperature=0, logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert [token.token_id for token in logprobs] == list(completion.choices[0].token_ids)
    assert [token.token_bytes for token in logprobs] == [b"h", "é".encode(), b"<|end|>"]
    for token in logprobs:
        assert len(token.alternatives) == 2
        assert token.alternatives[0].token_id == token.token_id
        assert token.alternatives[0].logprob == token.logprob
        assert token.logprob > token.alternatives[1].logprob
    as_json = completion.to_dict()["choices"][0]["logprobs"][1]
    assert as_json["bytes"] == [0xC3, 0xA9]
    assert as_json["text"] == "é"


def test_complete_continues_text_and_ids() -> None:
    llm = make_llm()
    assert llm.complete("x", temperature=0, max_tokens=3).text == "abcabcabc"
    completion = llm.complete(make_tokenizer().encode("xyz"), temperature=0, max_tokens=1)
    assert (completion.text, completion.usage.prompt_tokens) == ("abc", 3)


def test_complete_puts_bos_before_text_but_not_before_ids() -> None:
    llm = make_llm(add_bos=True)
    assert llm.complete("xyz", temperature=0, max_tokens=1).usage.prompt_tokens == 4
    assert llm.complete([1, 2, 3], temperature=0, max_tokens=1).usage.prompt_tokens == 3


def test_the_prefix_of_a_conversation_is_cached() -> None:
    llm = make_llm()
    question = "x" * 100
    first = llm.chat(user(question), temperature=0)
    assert first.usage.cached_tokens == 0
    assert llm.chat(user(question), temperature=0).usage.cached_tokens == 96


def test_timings_are_plausible() -> None:
    timings = make_llm().chat(user("hello"), temperature=0).timings
    assert timings.time_to_first_token_s is not None
    assert 0 < timings.time_to_first_token_s <= timings.total_s
    assert timings.prompt_tokens_per_s is not None
    assert timings.prompt_tokens_per_s > 0
    assert timings.completion_tokens_per_s is not None
    assert timings.completion_tokens_per_s > 0
    assert make_llm().chat(user("h"), max_tokens=1).timings.completion_tokens_per_s is None


def test_many_together_equal_one_by_one() -> None:
    llm = make_llm(FakeProgram)
    prompts = ["first", "the second one", "3", "x" * 200]
    together = llm.complete_many(prompts, seed=3, max_tokens=30, stop=["a"])
    for prompt, completion in zip(prompts, together, strict=True):
        alone = make_llm(FakeProgram).complete(prompt, seed=3, max_tokens=30, stop=["a"])
        assert completion.choices == alone.choices
    chats = llm.chat_many([user("a"), user("b")], seed=1, max_tokens=5)
    assert [chat.choices for chat in chats] == [
        llm.chat(user(text), seed=1, max_tokens=5).choices for text in ("a", "b")
    ]


def test_many_that_are_refused_leave_nothing_behind() -> None:
    llm = make_llm()
    with pytest.raises(ContextLengthError):
        llm.complete_many(["short", "x" * 3000])
    assert not engine_of(llm).has_work
    assert llm.complete("x", temperature=0, max_tokens=1).text == "abc"


def test_context_overflow_and_capacity_are_errors() -> None:
    llm = make_llm(context=64)
    assert llm.context == 64
    with pytest.raises(ContextLengthError, match="the context is 64"):
        llm.chat(user("x" * 64))
    with pytest.raises(CapacityError, match="cache"):
        make_llm(num_kv_blocks=2).complete("x" * 100)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages is empty"),
        ("hi", "messages must be a list"),
        ([3], r"messages\[0\] is a int"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\].role: 'robot'"),
        ([{"content": "x"}], r"messages\[0\].role: ''"),
        ([{"role": "user"}], r"messages\[0\].content: missing"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content is a list"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": "x", "mood": 1}], r"messages\[1\].*'mood'"),
    ],
)
def test_wrong_messages_are_named(messages: object, expected: str) -> None:
    with pytest.raises(InvalidRequestError, match=expected):
        make_llm().chat(messages)  # type: ignore[call-overload]


def test_unknown_and_wrong_options_are_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"unknown sampling option 'beams'.*temperature"):
        make_llm().chat(user("x"), beams=3)  # type: ignore[call-overload]
    with pytest.raises(InvalidRequestError, match="max_tokens must be at least 1"):
        make_llm().chat(user("x"), max_tokens=0)
    with pytest.raises(InvalidRequestError, match="temperature"):
        make_llm().chat(user("x"), temperature=-1)


def test_an_empty_prompt_is_refused() -> None:
    for prompt in ("", []):
        with pytest.raises(InvalidRequestError, match="prompt is empty"):
            make_llm().complete(prompt)


def test_a_model_without_template_only_completes() -> None:
    llm = make_llm(has_template=False)
    with pytest.raises(UnsupportedModelError, match="fake has no chat template"):
        llm.chat(user("x"))
    assert llm.complete("x", temperature=0, max_tokens=1).text == "abc"


def test_a_message_that_the_template_would_drop_is_refused() -> None:
    source = (
        "{% for m in messages %}{% if m['role'] != 'system' %}<|user|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    )
    llm = make_llm()
    llm.template = ChatTemplate(source + "{% if add_generation_prompt %}<|assistant|>{% endif %}", make_tokenizer())
    assert llm.chat(user("x"), temperature=0).text == "x"
    with pytest.raises(
        InvalidRequestError, match=r"messages\[0\] \(system\) has no place in the chat template of fake"
    ):
        llm.chat([{"role": "system", "content": "Be brief."}, *user("x")])


def test_a_failing_step_ends_its_request_with_the_error() -> None:
    class Broken(EchoProgram):
        is_broken = True

        def run(self, batch, *, reference=False):  # type: ignore[no-untyped-def]
            if self.is_broken:
                raise RuntimeError("no more")
            return super().run(batch)

    llm = make_llm(Broken)
    with pytest.raises(RuntimeError, match="no more"):
        llm.chat(user("x"), temperature=0)
    assert engine_of(llm).stats.num_blocks_used == 0
    Broken.is_broken = False
    assert llm.chat(user("x"), temperature=0).text == "x"
