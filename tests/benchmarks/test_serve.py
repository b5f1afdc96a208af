import json

import pytest

from benchmarks import serve
from tests.fake_llm import make_llm
from tests.server.conftest import serving


def figures(out: str) -> list[dict[str, object]]:
    return json.loads(out.splitlines()[-1])


def test_servers_take_turns_at_every_level(capsys, tmp_path) -> None:
    with serving(make_llm()) as first, serving(make_llm(), names=("other",)) as second:
        servers = [f"one={first.url}/v1", f"two={second.url}/v1/"]
        options = ["--concurrency", "1", "3", "--repeats", "2", "--requests", "2", "--tokens", "9", "--words", "5"]
        assert serve.main([*servers, *options, "--json", str(tmp_path / "out.json")]) == 0
    captured = capsys.readouterr()
    loads = figures(captured.out)
    assert [(load["level"], load["server"]) for load in loads] == [
        ("1 at once", "one"),
        ("1 at once", "two"),
        ("3 at once", "one"),
        ("3 at once", "two"),
    ]
    assert [len(load["answers"]) for load in loads] == [4, 4, 12, 12]
    for load in loads:
        assert load["num_failures"] == 0
        assert load["tokens_per_s"] > 0
        assert 0 < load["first_s_p50"] <= load["first_s_p95"]
        assert {answer["num_tokens"] for answer in load["answers"]} == {9}
    assert figures((tmp_path / "out.json").read_text()) == loads
    turns = [line.split(": ")[1] for line in captured.err.splitlines()]
    assert turns == ["one", "two"] * 4
    assert captured.out.splitlines()[0].startswith("| load")


def test_requests_at_random_moments(capsys) -> None:
    with serving(make_llm()) as running:
        options = ["--rate", "200", "--concurrency", "2", "--requests", "3", "--repeats", "1", "--tokens", "4"]
        assert serve.main([f"one={running.url}/v1", *options]) == 0
    (load,) = figures(capsys.readouterr().out)
    assert (load["level"], len(load["answers"])) == ("200 a second", 6)


def test_failures_are_counted_and_told(capsys) -> None:
    with serving(make_llm(context=64)) as running:
        options = ["--concurrency", "1", "--requests", "2", "--repeats", "1", "--tokens", "60"]
        assert serve.main([f"one={running.url}/v1", *options]) == 1
    assert "2 failed, the first with 400" in capsys.readouterr().out


def test_a_server_is_a_name_and_an_address(capsys) -> None:
    with pytest.raises(SystemExit):
        serve.main(["http://127.0.0.1:1/v1"])
    assert "NAME=URL" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_one_line(capsys) -> None:
    assert serve.main(["one=http://127.0.0.1:1/v1"]) == 1
    assert capsys.readouterr().err.startswith("a server does not answer: ")


def test_quantiles() -> None:
    assert serve.quantile([3, 1, 2], 0.5) == 2
    assert serve.quantile([3, 1, 2], 0.95) == 3
    assert serve.quantile([5], 0.01) == 5
