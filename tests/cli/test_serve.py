import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from tests.fake_llm import write_tiny_model

from .conftest import Run


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    environment = os.environ | {"MINIPHI_HOME": str(folder / "home")}
    argv = [sys.executable, "-m", "miniphi", "serve", str(folder), "--port", "0", "--threads", "1", *options]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "serving" in line)
            match = re.search(r"http://127\.0\.0\.1:\d+/v1", line)
            assert match is not None
            yield process, match[0]
        finally:
            process.kill()


def test_a_model_is_served_until_a_signal(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    with serving(folder, "--name", "small") as (process, url):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="small", messages=[{"role": "user", "content": "hello"}], max_tokens=3, temperature=0
        )
        assert answer.usage.completion_tokens == 3
        assert answer.model == "small"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)


def test_ctrl_c_ends_it_without_a_traceback(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    with serving(folder) as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_second_ctrl_c_ends_those_in_flight_and_tells_them(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    with serving(folder) as (process, url), openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        prompts = ["abcdef"] * 60
        options = {"max_tokens": 200, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(model=folder.name, prompt=prompts, stream=True, **options)
        next(stream)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert process.wait(20) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--port", "70000"), "'70000' is not a port"),
        (("--host", "0.0.0.0"), "no keys protect the server"),
        (("--host", "no.such.host.invalid"), "--host no.such.host.invalid"),
        (("--step-ms", "0"), "at least 1"),
    ],
)
def test_wrong_options_are_one_line(argv: tuple[str, ...], message: str, run: Run, models: object) -> None:
    result = run("serve", *argv)
    assert result.code in (1, 2)
    assert message in result.error
