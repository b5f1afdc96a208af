import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import miniphi
from miniphi.cli.main import COMMANDS, build_parser
from miniphi.errors import CheckpointError
from tests.fake_llm import write_tiny_model
from tests.shared_data import REPOSITORY

from .conftest import FakeModels, Result, Run


def python(code: str, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60, **options
    )


def test_help_lists_every_command(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    assert not result.err
    for name, summary in COMMANDS.items():
        assert name in result.out
        assert summary.split()[0] in result.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_a_module(name: str, run: Run) -> None:
    result = run(name, "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: miniphi {name}")
    assert callable(importlib.import_module(f"miniphi.cli.{name}").run)


def test_the_parser_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from miniphi.cli.main import COMMANDS, build_parser\n"
        "for name in COMMANDS: build_parser(name)\n"
        "heavy = {'numpy', 'tokenizers', 'jinja2', 'huggingface_hub', 'prompt_toolkit', 'tqdm', 'miniphi.llm'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert python(code).stdout == "[]\n"


def test_only_the_chosen_command_is_imported() -> None:
    code = (
        "import sys\n"
        "from miniphi.cli.main import build_parser\n"
        "build_parser('show')\n"
        "print(sorted(name for name in sys.modules if name.startswith('miniphi.cli.')))"
    )
    assert (
        python(code).stdout
        == "['miniphi.cli.main', 'miniphi.cli.options', 'miniphi.cli.show', 'miniphi.cli.terminal']\n"
    )


def test_an_answer_imports_only_what_it_needs(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    code = (
        "import os, sys\n"
        "from miniphi.cli.main import main\n"
        f"code = main(['generate', 'hi', '--max-tokens', '1', '--context', '64', '--model', {str(folder)!r}])\n"
        "unneeded = {'httpx2', 'huggingface_hub', 'prompt_toolkit', 'tqdm', 'uuid', 'miniphi.models.fetch'}\n"
        "print(code, sorted(unneeded & set(sys.modules)), os.environ['OPENBLAS_NUM_THREADS'], file=sys.stderr)"
    )
    environ = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    assert python(code, env=environ).stderr == "0 [] 1\n"
    assert python(code, env=environ | {"OPENBLAS_NUM_THREADS": "4"}).stderr == "0 [] 4\n"


def test_version_is_that_of_the_project(run: Run) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert run("--version").out == f"miniphi {project['version']}\n"
    assert miniphi.__version__ == project["version"]


def test_python_m_miniphi_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "miniphi", "--version"], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"miniphi {miniphi.__version__}\n")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), "COMMAND"),
        (("fly",), "invalid choice: 'fly'"),
        (("generate", "--frobnicate"), "--frobnicate"),
        (("generate", "x", "--temperature", "warm"), "--temperature"),
        (("generate", "x", "--kv", "q3"), "--kv"),
        (("generate", "x", "--threads", "0"), "'0' is not a whole number of at least 1"),
        (("generate", "x", "--kv-memory", "lots"), "'lots' is not a size"),
        (("generate", "x", "--logit-bias", "5"), "'5' is not TOKEN_ID=BIAS"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(argv: tuple[str, ...], expected: str, run: Run) -> None:
    result = run(*argv)
    assert result.code == 2
    assert expected in result.error
    assert "--help" in result.error
    assert not result.out


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, models: FakeModels, run: Run) -> Callable[[BaseException], Result]:
    def fail_with(error: BaseException) -> Result:
        def load(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("miniphi.llm.load", load)
        return run("generate", "x", "-m", "other")

    return fail_with


def test_our_errors_are_one_line(failing: Callable[[BaseException], Result]) -> None:
    result = failing(CheckpointError("model.gguf: truncated\nfetch it again"))
    assert (result.code, result.error) == (1, "model.gguf: truncated fetch it again")


def test_a_full_disk_names_the_file(failing: Callable[[BaseException], Result]) -> None:
    result = failing(OSError(28, "No space left on device", "/models/x"))
    assert (result.code, result.error) == (1, "/models/x: No space left on device; free some space and try again")


def test_a_bug_is_one_line_too_and_says_how_to_report_it(failing: Callable[[BaseException], Result]) -> None:
    result = failing(ZeroDivisionError("division by zero"))
    assert result.code == 1
    assert result.error.startswith("unexpected ZeroDivisionError: division by zero")
    assert "MINIPHI_DEBUG=1" in result.error


def test_debug_shows_the_traceback(failing: Callable[[BaseException], Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPHI_DEBUG", "1")
    result = failing(ZeroDivisionError("division by zero"))
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("miniphi: error: ")


def test_ctrl_c_is_quiet(failing: Callable[[BaseException], Result]) -> None:
    assert failing(KeyboardInterrupt()) == Result(130, "", "")


def test_out_of_memory_says_what_to_do(failing: Callable[[BaseException], Result]) -> None:
    assert "miniphi plan" in failing(MemoryError()).error


def test_a_closed_pipe_is_quiet() -> None:
    code = (
        "import os, sys\n"
        "from miniphi.cli.main import main\n"
        "read, write = os.pipe()\n"
        "os.dup2(write, 1); os.close(write); os.close(read)\n"
        "sys.exit(main(['show', 'phi-3-mini-128k-instruct']))"
    )
    done = python(code)
    assert (done.returncode, done.stderr) == (1, "")


def test_abbreviated_options_are_refused(run: Run) -> None:
    assert "--temp" in run("generate", "x", "--temp", "1").error


def test_the_generated_page_is_current() -> None:
    namespace: dict[str, object] = {"__name__": "generate_cli", "__file__": str(REPOSITORY / "docs/generate_cli.py")}
    exec((REPOSITORY / "docs" / "generate_cli.py").read_text(encoding="utf-8"), namespace)
    render = namespace["render"]
    assert callable(render)
    page = Path(REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == render(), "run `python docs/generate_cli.py`"


def test_public_names_are_importable_and_complete() -> None:
    rooms = {name for names in miniphi._ROOMS.values() for name in names}
    assert set(miniphi.__all__) == rooms | {"__version__"}
    assert miniphi.__all__ == sorted(miniphi.__all__)
    for name in miniphi.__all__:
        assert getattr(miniphi, name) is not None
    assert dir(miniphi) == sorted(miniphi.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        miniphi.nothing  # noqa: B018


def test_parsers_name_the_program() -> None:
    assert build_parser().prog == "miniphi"
