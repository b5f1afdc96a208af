import json
from pathlib import Path

import pytest

from miniphi.cli.options import DEFAULT_MODEL, size_in_bytes
from miniphi.cli.terminal import notice
from tests.fake_llm import make_llm, make_tokenizer, special_id

from .conftest import FakeModels, Run


def test_an_argument_is_answered(run: Run, models: FakeModels) -> None:
    result = run("generate", "Hello wörld", "--temperature", "0")
    assert (result.code, result.out) == (0, "Hello wörld\n")
    assert models.pulled == [DEFAULT_MODEL]


def test_the_prompt_may_come_from_stdin_or_a_file(run: Run, models: FakeModels, tmp_path: Path) -> None:
    assert run("generate", stdin="from stdin é\n".encode()).out == "from stdin é\n"
    assert run("generate", "-", stdin=b"two\nlines\r\n").out == "two\nlines\n"
    path = tmp_path / "prompt.txt"
    path.write_text("from a file\n", encoding="utf-8")
    assert run("generate", "--file", str(path)).out == "from a file\n"


def test_raw_continues_without_the_chat_format(run: Run, models: FakeModels) -> None:
    result = run("generate", "--raw", "x", "--max-tokens", "2", "--temperature", "0")
    assert result.out == "abcabc\n"


def test_system_comes_before_the_prompt(run: Run, models: FakeModels) -> None:
    result = run("generate", "Hi", "--system", "Be brief.", "--json")
    assert json.loads(result.out)["usage"]["prompt_tokens"] == len("Hi") + len("Be brief.") + 5


def test_json_is_the_whole_completion(run: Run, models: FakeModels) -> None:
    result = run("generate", "hé", "--json", "--logprobs", "1", "--n", "2", "--temperature", "0")
    document = json.loads(result.out)
    assert result.out.count("\n") == 1
    assert document["model"] == "fake"
    assert [choice["text"] for choice in document["choices"]] == ["hé", "hé"]
    choice = document["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"] == [*make_tokenizer().encode("hé"), special_id("<|end|>")]
    assert [token["bytes"] for token in choice["logprobs"][:2]] == [[104], [0xC3, 0xA9]]
    assert [len(token["alternatives"]) for token in choice["logprobs"]] == [1, 1, 1]
    assert document["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11, "cached_tokens": 0}
    assert document["timings"]["total_s"] > 0
    assert document["timings"]["drafted_tokens"] == document["timings"]["accepted_tokens"] == 0


def test_several_answers_are_told_apart(run: Run, models: FakeModels) -> None:
    result = run("generate", "yes", "--n", "2", "--temperature", "0")
    assert result.out == "--- answer 1 of 2 ---\nyes\n--- answer 2 of 2 ---\nyes\n"


def test_no_stream_prints_the_same(run: Run, models: FakeModels) -> None:
    argv = ("generate", "one, two", "--stop", ", t", "--temperature", "0")
    assert run(*argv, "--stream").out == run(*argv, "--no-stream").out == "one\n"


def test_every_sampling_option_arrives(run: Run, models: FakeModels) -> None:
    seen = {}
    chat = models.llm.chat

    def spy(messages, **options):  # type: ignore[no-untyped-def]
        seen.update(options)
        return chat(messages, **options)

    models.llm.chat = spy  # type: ignore[method-assign]
    argv = (
        "--temperature 0.5 --top-k 3 --top-p 0.8 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.2 "
        "--frequency-penalty 0.3 --logit-bias 5=-2.5 --logit-bias 6=1 --seed 9 --max-tokens 7 --min-tokens 2 "
        "--stop a --stop b --stop-token-id 4 --ignore-eos --no-stream"
    )
    assert run("generate", "x", *argv.split()).code == 0
    sampling = seen["sampling"]
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 3, 0.8, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, 0.2, 0.3)
    assert sampling.logit_bias == {5: -2.5, 6: 1.0}
    assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == (9, 7, 2)
    assert (sampling.stop, sampling.stop_token_ids, sampling.ignore_eos) == (("a", "b"), (4,), True)


def test_every_engine_option_arrives(run: Run, models: FakeModels) -> None:
    argv = "-m some/model --revision r1 --threads 3 --kv q8 --context 512 --kv-memory 1.5G --rope-policy hf"
    argv += " --draft some/small --no-packed-copy"
    assert run("generate", "x", *argv.split()).code == 0
    assert models.loaded == [
        (
            "some/model",
            {
                "revision": "r1",
                "num_threads": 3,
                "kv_type": "q8",
                "context": 512,
                "kv_memory_bytes": 3 << 29,
                "rope_policy": "hf",
                "draft": "some/small",
                "packed_copy": False,
                "on_notice": notice,
            },
        )
    ]
    assert not models.pulled, "only the default model is fetched by itself"


@pytest.mark.parametrize(
    ("text", "size"), [("5", 5), ("2K", 2048), ("512MiB", 1 << 29), ("1.5g", 3 << 29), ("1TB", 1 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize(
    ("argv", "stdin", "code_and_message"),
    [
        (("",), b"", (1, "the prompt is empty")),
        (("  \n",), b"", (1, "the prompt is empty")),
        ((), b"", (1, "standard input is empty")),
        ((), b"caf\xe9", (1, "standard input: invalid UTF-8 at byte offset 3 (0xe9)")),
        (("bad\udce9",), b"", (1, "the prompt has invalid UTF-8 at character 3")),
        (("x", "--file", "y"), b"", (2, "found both a prompt and --file")),
        (("--file", "/no/such/file"), b"", (1, "/no/such/file: No such file or directory")),
        (("x", "--max-tokens", "0"), b"", (2, "max_tokens must be at least 1")),
        (("x", "--max-tokens", "-3"), b"", (2, "max_tokens must be at least 1")),
        (("x", "--temperature", "-0.1"), b"", (2, "temperature must be at least 0")),
        (("x", "--temperature", "nan"), b"", (2, "temperature must be a finite number")),
        (("x", "--top-p", "0"), b"", (2, "top_p must be above 0")),
        (("x", "--stop", ""), b"", (2, "stop must hold strings")),
        (("x", "--n", "0"), b"", (2, "n must be at least 1")),
        (("x", "--json", "--stream"), b"", (2, "--stream prints one plain answer")),
        (("x", "--n", "2", "--stream"), b"", (2, "--stream prints one plain answer")),
        (("x", "--logprobs", "2"), b"", (2, "add --json")),
        (("x", "--raw", "--system", "y"), b"", (2, "--system belongs to the chat format")),
        (("x" * 3000,), b"", (1, "the context is 2048")),
        (("x", "--max-tokens", "5000"), b"", (1, "lower max_tokens")),
    ],
)
def test_bad_input_is_one_line(
    argv: tuple[str, ...], stdin: bytes, code_and_message: tuple[int, str], run: Run, models: FakeModels
) -> None:
    code, expected = code_and_message
    result = run("generate", "-m", "other", *argv, stdin=stdin)
    assert result.code == code
    assert expected in result.error
    assert not result.out


def test_options_are_checked_before_a_model_is_fetched(run: Run, models: FakeModels) -> None:
    assert run("generate", "x", "--max-tokens", "0").code == 2
    assert run("generate", "").code == 1
    assert not models.pulled
    assert not models.loaded


def test_a_missing_model_says_how_to_get_it(run: Run) -> None:
    result = run("generate", "x", "-m", "phi-3-mini-128k-instruct")
    assert result.code == 1
    assert "miniphi pull phi-3-mini-128k-instruct" in result.error
    assert "known models" in run("generate", "x", "-m", "nonsense").error


def test_output_that_is_no_terminal_has_no_escapes(run: Run, models: FakeModels) -> None:
    result = run("generate", "x\x1b[31m", "--temperature", "0")
    assert result.out == "x\x1b[31m\n"
    assert "\x1b" not in result.err


def test_a_terminal_gets_no_control_characters(run: Run, models: FakeModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miniphi.cli.terminal.is_terminal", lambda stream: True)
    assert run("generate", "x\x1b[31m\ty", "--temperature", "0").out == "x\N{REPLACEMENT CHARACTER}[31m\ty\n"


def test_a_model_without_template_says_what_to_do(run: Run, models: FakeModels) -> None:
    models.llm = make_llm(has_template=False)
    assert "--raw" in run("generate", "x", "-m", "other").error
