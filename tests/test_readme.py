"""The README's Python examples run as they stand, on the model that `make chat` fetches."""

import re

import miniphi
from tests.server.conftest import serving
from tests.shared_data import REPOSITORY, smollm2_gguf


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text("utf-8"), re.DOTALL)


def run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_the_python_example_runs(capsys) -> None:
    smollm2_gguf()
    run(examples()[0])
    printed = capsys.readouterr().out
    assert printed.count("Paris") == 2
    assert re.search(r"-\d+\.\d+ (True|False)\n$", printed)


def test_the_example_over_http_runs(capsys) -> None:
    smollm2_gguf()
    code = examples()[1]
    assert "http://127.0.0.1:8000" in code
    with serving(miniphi.load("smollm2-135m-instruct", context=512)) as running:
        run(code.replace("http://127.0.0.1:8000", running.url))
    assert "Paris" in capsys.readouterr().out
