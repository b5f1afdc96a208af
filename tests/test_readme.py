"""The README's Python example runs as it stands, on the model that `make chat` fetches."""

import re

from tests.shared_data import REPOSITORY, smollm2_gguf


def test_the_python_example_runs(capsys) -> None:
    smollm2_gguf()
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text("utf-8"), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("Paris") == 2
    assert re.search(r"-\d+\.\d+ (True|False)\n$", printed)
