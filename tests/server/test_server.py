import json
import socket
import threading
import time

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from miniphi.errors import InvalidRequestError
from miniphi.server import ServiceLimits, bind
from tests.fake_llm import EchoProgram, engine_of, make_llm
from tests.server.conftest import Running

LONG = {"model": "fake", "prompt": "x", "max_tokens": 1500, "temperature": 0}


class Slow(EchoProgram):
    def run(self, batch, *, reference=False):
        time.sleep(0.01)
        return super().run(batch, reference=reference)


class Stuck(EchoProgram):
    """Waits in its first step until it is let go."""

    release = threading.Event()

    def run(self, batch, *, reference=False):
        self.release.wait(20)
        return super().run(batch, reference=reference)


def until(condition, seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return False


def test_health_and_models(running: Running) -> None:
    http = running.http
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    assert set(http.get("/version").json()) == {"version"}
    models = running.client.models.list().data
    assert [model.id for model in models] == ["echo", "alias"]
    assert running.client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError):
        running.client.models.retrieve("other")


def test_every_answer_has_an_id_and_says_how_long_it_took(running: Running) -> None:
    answers = [running.http.get("/health"), running.http.post("/v1/chat/completions", json={}), running.http.get("/no")]
    assert [answer.status_code for answer in answers] == [200, 400, 404]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3
    for answer in answers:
        assert int(answer.headers["openai-processing-ms"]) >= 0


def test_metrics_count_what_happened(serve) -> None:
    llm = make_llm(Slow)
    running = serve(llm)

    def metric(name: str, **labels: str) -> float:
        families = text_string_to_metric_families(running.http.get("/metrics").text)
        samples = (sample for family in families for sample in family.samples)
        return next(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    assert metric("vllm:generation_tokens_total", model_name="fake") == 0
    answer = running.client.completions.create(**LONG | {"max_tokens": 4}, n=2)
    assert answer.usage.completion_tokens == 8
    assert metric("vllm:generation_tokens_total") == 8
    assert metric("vllm:prompt_tokens_total") == 1
    assert metric("vllm:request_success_total", finished_reason="length") == 2
    assert metric("vllm:time_to_first_token_seconds_count") == 1
    assert metric("vllm:time_per_output_token_seconds_sum") > 0.005  # a step takes 10 ms
    with running.client.completions.create(**LONG, stream=True) as stream:
        next(stream)
        assert metric("vllm:num_requests_running") == 1
        assert 0 < metric("vllm:kv_cache_usage_perc") < 1
    assert until(lambda: not engine_of(llm).has_work)
    assert until(lambda: metric("vllm:request_success_total", finished_reason="abort") == 1)
    assert metric("vllm:num_requests_running") == 0


def test_wrong_routes_methods_and_bodies_are_error_objects(running: Running) -> None:
    http = running.http
    for answer, status in (
        (http.get("/v1/nothing"), 404),
        (http.get("/v1/chat/completions"), 405),
        (http.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}), 400),
        (http.post("/v1/chat/completions", content=b"[1]", headers={"content-type": "application/json"}), 400),
        (http.post("/v1/chat/completions", content=b"\xff\xfe", headers={"content-type": "application/json"}), 400),
        (http.post("/v1/chat/completions"), 400),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    assert (
        "not JSON"
        in http.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}).json()[
            "error"
        ]["message"]
    )


def test_a_body_that_is_too_large_is_refused(serve) -> None:
    running = serve(make_llm(), limits=ServiceLimits(max_body_bytes=1000))
    answer = running.http.post("/v1/completions", json={"prompt": "x" * 2000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_the_description_names_every_route(running: Running) -> None:
    paths = running.http.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/health"} <= set(
        paths
    )
    assert running.http.get("/docs").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_request(serve, stream: bool) -> None:
    llm = make_llm(Slow)
    running = serve(llm)
    host, port = running.url.removeprefix("http://").split(":")
    body = json.dumps(LONG | {"stream": stream}).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        assert until(lambda: engine_of(llm).stats.num_generated_tokens > 3)
    assert until(lambda: not engine_of(llm).has_work)
    assert engine_of(llm).stats.num_generated_tokens < 1000
    assert engine_of(llm).stats.num_blocks_used == 0


def test_what_is_too_much_is_told_to_come_back(serve) -> None:
    llm = make_llm(Slow)
    running = serve(llm, limits=ServiceLimits(max_requests=2))
    streams = [running.client.completions.create(**LONG, stream=True) for _ in range(2)]
    assert until(lambda: engine_of(llm).stats.num_running == 2)
    answer = running.http.post("/v1/completions", json=LONG)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["type"] == "rate_limit_error"
    for stream in streams:
        stream.close()
    assert until(lambda: not engine_of(llm).has_work)
    assert running.http.post("/v1/completions", json=LONG | {"max_tokens": 1}).status_code == 200
    assert running.http.post("/v1/completions", json=LONG | {"prompt": ["a", "b", "c"]}).status_code == 400


def test_a_request_that_comes_while_a_step_runs_does_not_hold_up_the_others(serve) -> None:
    Stuck.release.clear()
    running = serve(make_llm(Stuck))
    first = running.client.completions.create(**LONG | {"max_tokens": 2}, stream=True)
    answers = []
    second = threading.Thread(
        target=lambda: answers.append(running.client.completions.create(**LONG | {"max_tokens": 2}))
    )
    second.start()
    started = time.monotonic()
    assert running.http.get("/health").status_code == 200
    assert running.http.post("/tokenize", json={"prompt": "x"}).status_code == 200
    assert time.monotonic() - started < 5
    Stuck.release.set()
    assert "".join(chunk.choices[0].text for chunk in first) == "abcabc"
    second.join(10)
    assert answers[0].choices[0].text == "abcabc"


def test_the_end_waits_for_those_in_flight(serve) -> None:
    llm = make_llm(Slow)
    running = serve(llm, drain_s=20)
    stream = running.client.completions.create(**LONG | {"max_tokens": 60}, stream=True)
    next(stream)
    running.server.should_exit = True
    assert "".join(chunk.choices[0].text for chunk in stream) == "abc" * 59


def test_the_end_does_not_wait_for_ever(serve) -> None:
    running = serve(make_llm(Slow, context=100_000, num_kv_blocks=4000), drain_s=0.2)
    endless = LONG | {"max_tokens": 90_000}
    stream = running.client.completions.create(**endless, stream=True)
    next(stream)
    answers: list[httpx2.Response] = []
    whole = threading.Thread(target=lambda: answers.append(running.http.post("/v1/completions", json=endless)))
    whole.start()
    assert until(lambda: engine_of(running.service.llm).stats.num_running == 2)
    started = time.monotonic()
    running.server.should_exit = True
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    whole.join(10)
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "shutting_down")
    assert time.monotonic() - started < 10


def test_only_this_machine_is_listened_to() -> None:
    with pytest.raises(InvalidRequestError, match="no keys protect"):
        bind("0.0.0.0", 0)
    with bind("localhost", 0) as taken, pytest.raises(OSError, match="choose another --port"):
        bind("127.0.0.1", taken.getsockname()[1])
