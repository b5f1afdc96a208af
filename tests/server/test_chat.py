import asyncio
import math

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fake_llm import make_llm, special_id
from tests.server.conftest import Running


def ask(client: openai.OpenAI, text: str, **options: object):
    return client.chat.completions.create(
        model="echo", messages=[{"role": "user", "content": text}], temperature=0, **options
    )


def streamed(client: openai.OpenAI, text: str, **options: object) -> list[openai.types.chat.ChatCompletionChunk]:
    return list(ask(client, text, stream=True, **options))


def test_an_answer_has_openais_shape(client: openai.OpenAI) -> None:
    answer = ask(client, "hello thé", seed=3)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "echo")
    assert answer.system_fingerprint.startswith("fp_")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content, choice.message.refusal) == ("assistant", "hello thé", None)
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == usage.prompt_tokens - 2  # the template adds three tokens, the answer its end
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    chunks = streamed(client, "the end", stream_options={"include_usage": True})
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == ask(client, "the end").usage.total_tokens
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in deltas) == "the end"
    assert [choice.finish_reason for choice in deltas] == [None] * (len(deltas) - 1) + ["stop"]


def test_without_usage_no_chunk_is_without_a_choice(client: openai.OpenAI) -> None:
    assert all(chunk.choices for chunk in streamed(client, "hello"))


def test_length_ends_an_answer(client: openai.OpenAI) -> None:
    for limit in ({"max_tokens": 2}, {"max_completion_tokens": 2}, {"max_tokens": 7, "max_completion_tokens": 2}):
        answer = ask(client, "xyz!", **limit)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("xy", "length")


@pytest.mark.parametrize("stop", ["b!", ["zz", "b!"]])
def test_a_stop_string_ends_an_answer(client: openai.OpenAI, stop: object) -> None:
    answer = ask(client, "xab!y", stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("xa", "stop")


@settings(max_examples=25, deadline=None)
@given(text=st.text(min_size=1, max_size=30), stops=st.lists(st.text(min_size=1, max_size=3), max_size=4))
def test_streaming_changes_nothing(running: Running, text: str, stops: list[str]) -> None:
    client, options = running.client, {"stop": stops} if stops else {}
    whole = ask(client, text, **options).choices[0]
    chunks = streamed(client, text, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


def test_logprobs(client: openai.OpenAI) -> None:
    answer = ask(client, "xé", logprobs=True, top_logprobs=2)
    entries = answer.choices[0].logprobs.content
    assert [entry.token for entry in entries] == ["x", "é"]
    assert [entry.bytes for entry in entries] == [list(b"x"), list("é".encode())]
    for entry in entries:
        assert entry.logprob == pytest.approx(0, abs=1e-9)
        assert entry.top_logprobs[0].token == entry.token
        assert len(entry.top_logprobs) == 2
    in_stream = [
        entry
        for chunk in streamed(client, "xé", logprobs=True, top_logprobs=2)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert in_stream == entries


def test_a_part_of_a_character_is_spelled_as_bytes(client: openai.OpenAI) -> None:
    entries = ask(client, "€", logprobs=True).choices[0].logprobs.content
    assert [entry.token for entry in entries] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == "€"


def test_several_choices(client: openai.OpenAI) -> None:
    answer = ask(client, "pq", n=3)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(0, "pq"), (1, "pq"), (2, "pq")]
    texts = {0: "", 1: "", 2: ""}
    for chunk in streamed(client, "pq", n=3):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: "pq", 1: "pq", 2: "pq"}


def test_logit_bias_and_seed_and_extensions_reach_the_sampler(client: openai.OpenAI) -> None:
    end = special_id("<|end|>")
    assert ask(client, "hello", logit_bias={str(end): 100}).choices[0].message.content == ""
    drawn = {
        client.chat.completions.create(
            model="echo",
            messages=[{"role": "user", "content": "q"}],
            temperature=2,
            seed=7,
            max_tokens=8,
            logit_bias={str(end): -100},
            extra_body={"top_k": 50, "min_p": 0.0, "repetition_penalty": 1.5, "ignore_eos": True},
        )
        .choices[0]
        .message.content
        for _ in range(3)
    }
    assert len(drawn) == 1


def test_parts_of_text_are_joined_and_a_developer_is_the_system(client: openai.OpenAI) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "ab"}, {"type": "text", "text": "c!"}]},
    ]
    answer = client.chat.completions.create(model="echo", messages=messages, temperature=0)
    assert answer.choices[0].message.content == "abc!"


def test_a_name_that_is_not_served(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(model="alias", messages=[{"role": "user", "content": "a"}]).model == "echo"
    with pytest.raises(openai.NotFoundError, match="this server has echo, alias") as caught:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "a"}])
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("body", "param", "code", "message"),
    [
        ({"messages": []}, "messages", "invalid_value", "at least 1"),
        ({}, "messages", "missing_required_parameter", "missing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value", "'user'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_value", "valid"),
        ({"temperature": 3}, "temperature", "invalid_value", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "invalid_value", "number"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens", "invalid_value", "integer"),
        ({"top_logprobs": 2}, None, "invalid_value", "only with logprobs true"),
        ({"stream_options": {"include_usage": True}}, None, "invalid_value", "only with stream true"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value", "at most 4"),
        ({"stop": [""]}, "stop", "invalid_value", "strings of 1 to 1024"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value", "'x' is not a token id"),
        ({"tools": []}, "tools", "unknown_parameter", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "invalid_value", "'text'"),
        ({"max_tokens": 5000}, "messages", "context_length_exceeded", "the context is 2048"),
    ],
)
def test_what_is_wrong_is_named(
    running: Running, body: dict[str, object], param: str | None, code: str, message: str
) -> None:
    whole = {"model": "echo"} | ({"messages": [{"role": "user", "content": "x"}]} if body else {}) | body
    answer = running.http.post("/v1/chat/completions", json=whole)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


def test_a_model_without_a_template_cannot_chat(serve) -> None:
    running = serve(make_llm(has_template=False))
    with pytest.raises(openai.APIStatusError, match="no chat template"):
        running.client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "a"}])


def test_the_asynchronous_client(running: Running) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="echo", messages=[{"role": "user", "content": f"question {i}"}], temperature=0
                    )
                    for i in range(20)
                )
            )
            return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(run()) == [f"question {i}" for i in range(20)]


def test_azures_client(running: Running) -> None:
    options = {"azure_endpoint": running.url, "api_key": "none", "api_version": "2024-06-01", "max_retries": 0}
    question = [{"role": "user", "content": "hi"}]
    with openai.AzureOpenAI(azure_deployment="echo", **options) as client:
        answer = client.chat.completions.create(model="echo", messages=question, temperature=0)
        assert answer.choices[0].message.content == "hi"
    with openai.AzureOpenAI(azure_deployment="other", **options) as wrong, pytest.raises(openai.NotFoundError):
        wrong.chat.completions.create(model="x", messages=question)


def test_probabilities_do_not_exceed_one(client: openai.OpenAI) -> None:
    answer = ask(client, "a", logprobs=True, top_logprobs=20)
    for entry in answer.choices[0].logprobs.content:
        assert math.fsum(math.exp(other.logprob) for other in entry.top_logprobs) <= 1 + 1e-9
