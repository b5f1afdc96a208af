import openai
import pytest

from tests.fake_llm import EchoProgram, make_llm, make_tokenizer
from tests.server.conftest import Running


def complete(client: openai.OpenAI, prompt: object, **options: object):
    return client.completions.create(model="echo", prompt=prompt, temperature=0, **options)


def test_a_completion_has_openais_shape(client: openai.OpenAI) -> None:
    answer = complete(client, "xy", max_tokens=2)
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", "echo")
    (choice,) = answer.choices
    assert (choice.text, choice.index, choice.finish_reason, choice.logprobs) == ("abcabc", 0, "length", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 2)


def test_sixteen_tokens_where_nothing_is_said(client: openai.OpenAI) -> None:
    assert complete(client, "xy").usage.completion_tokens == 16


def test_several_prompts_of_text_or_of_tokens(client: openai.OpenAI) -> None:
    ids = make_tokenizer().encode("xy")
    for prompts in (["x", "yy"], [ids, ids[:1]], [ids]):
        answer = complete(client, prompts, max_tokens=1, n=2)
        assert [choice.index for choice in answer.choices] == list(range(2 * len(prompts)))
        assert {choice.text for choice in answer.choices} == {"abc"}
    assert complete(client, ids, max_tokens=1).usage.prompt_tokens == 2


def test_echo_gives_the_prompt_back(client: openai.OpenAI) -> None:
    assert complete(client, "xé", max_tokens=1, echo=True).choices[0].text == "xéabc"
    assert complete(client, make_tokenizer().encode("xé"), max_tokens=1, echo=True).choices[0].text == "xéabc"
    nothing = complete(client, "xé", max_tokens=0, echo=True)
    assert (nothing.choices[0].text, nothing.choices[0].finish_reason) == ("xé", "length")
    assert nothing.usage.completion_tokens == 0


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI) -> None:
    llm = make_llm()
    expected = llm.loglikelihood("x", "yabc")
    logprobs = complete(client, "xyabc", max_tokens=1, echo=True, logprobs=1).choices[0].logprobs
    assert logprobs.tokens == ["x", "y", "abc", "abc"]
    assert logprobs.text_offset == [0, 1, 2, 5]
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert logprobs.token_logprobs[1:3] == pytest.approx(expected.token_logprobs, abs=1e-6)
    # the likeliest token is reported, whether or not it is the one that came
    for token, value, top in zip(
        logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
    ):
        assert len(top) == 1
        assert max(top.values()) >= value
        assert (max(top, key=top.__getitem__) == token) == (max(top.values()) == pytest.approx(value, abs=1e-9))


def test_a_prompt_of_one_token_can_be_scored(client: openai.OpenAI) -> None:
    logprobs = complete(client, "x", max_tokens=0, echo=True, logprobs=0).choices[0].logprobs
    assert (logprobs.tokens, logprobs.token_logprobs) == (["x"], [None])


def test_streams_of_several_prompts_are_told_apart(client: openai.OpenAI) -> None:
    chunks = list(
        complete(client, ["x", "yy"], max_tokens=3, echo=True, stream=True, stream_options={"include_usage": True})
    )
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
    assert texts == {0: "xabcabcabc", 1: "yyabcabcabc"}
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 6)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "prompt"),
        ({"prompt": [1, -1]}, "prompt", "ids go from 0"),
        ({"prompt": [10**12]}, "prompt", "must hold integers"),
        ({"prompt": "x", "best_of": 3}, None, "must equal n, which is 1"),
        ({"prompt": "x", "suffix": "tail"}, "suffix", "''"),
        ({"prompt": "x", "logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"prompt": "x", "max_tokens": 3000}, "prompt", "the context is 2048"),
    ],
)
def test_what_is_wrong_is_named(running: Running, body: dict[str, object], param: str | None, message: str) -> None:
    answer = running.http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["param"] == param


def test_tokenize_and_back(running: Running) -> None:
    http = running.http
    answer = http.post("/tokenize", json={"prompt": "thé abc", "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 2048
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "thé abc"}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()
    assert http.post("/detokenize", json={"tokens": chat["tokens"]}).json() == {
        "prompt": "<|user|>x<|end|><|assistant|>"
    }
    bare = {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False}
    assert http.post("/tokenize", json=bare).json()["count"] == chat["count"] - 1
    assert http.post("/tokenize", json={}).status_code == 400
    assert "outside 0 to" in http.post("/detokenize", json={"tokens": [99999]}).json()["error"]["message"]


class _Nan(EchoProgram):
    def run(self, batch, *, reference=False):
        logits = super().run(batch, reference=reference)
        logits[:] = float("nan")
        return logits


def test_a_step_that_fails_is_an_error_and_the_server_goes_on(serve) -> None:
    running = serve(make_llm(_Nan))
    with pytest.raises(openai.InternalServerError, match="not finite"):
        running.client.completions.create(model="fake", prompt="x")
    with pytest.raises(openai.APIError, match="not finite"):
        list(running.client.completions.create(model="fake", prompt="x", stream=True))
    assert running.http.get("/health").status_code == 200
