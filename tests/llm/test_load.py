from pathlib import Path

import pytest

import miniphi
from miniphi import CapacityError, CheckpointError, ContextLengthError, DownloadError, InvalidRequestError
from miniphi.checkpoint import open_checkpoint
from miniphi.engine.program import load_program
from tests.fake_llm import write_tiny_model
from tests.shared_data import smollm2_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_a_folder_becomes_an_llm(folder: Path) -> None:
    llm = miniphi.load(folder)
    assert llm.name == "tiny"
    assert llm.context == 256
    completion = llm.complete("the cat", temperature=0, max_tokens=5, ignore_eos=True)
    assert completion.usage.prompt_tokens == len(llm.tokenizer.encode("the cat"))
    assert len(completion.choices[0].token_ids) == 5
    assert llm.chat([{"role": "user", "content": "the cat"}], temperature=0, max_tokens=3).usage.prompt_tokens > 1


def test_ids_without_text_are_never_sampled(folder: Path) -> None:
    llm = miniphi.load(folder)
    beyond = range(llm.tokenizer.vocab_size, 320)
    assert len(beyond) > 0
    completion = llm.complete("the", max_tokens=100, temperature=5.0, seed=1, ignore_eos=True, logprobs=20)
    assert max(completion.choices[0].token_ids) < llm.tokenizer.vocab_size
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    alternatives = [other for token in logprobs for other in token.alternatives]
    assert any(other.token_id in beyond for other in alternatives)
    assert all(other.token_bytes == b"" for other in alternatives if other.token_id in beyond)


def test_the_model_stops_at_the_end_token_of_its_files(folder: Path) -> None:
    llm = miniphi.load(folder)
    end = llm.tokenizer.special_tokens["</s>"]
    completion = llm.complete("the", temperature=0, logit_bias={end: 100.0})
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].token_ids == (end,)
    assert completion.text == ""


def test_context_limits_prompt_and_answer(folder: Path) -> None:
    llm = miniphi.load(folder, context=40)
    assert llm.context == 40
    with pytest.raises(ContextLengthError, match="the context is 40"):
        llm.complete("the cat", max_tokens=40)
    with pytest.raises(ContextLengthError, match="257"):
        miniphi.load(folder, context=257)


def test_kv_memory_limits_the_context(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        block_bytes = load_program(checkpoint, context=32).kv_block_bytes
    assert miniphi.load(folder, kv_memory_bytes=3 * block_bytes).context == 96
    assert miniphi.load(folder, kv_memory_bytes=3 * block_bytes - 1).context == 64
    with pytest.raises(CapacityError):
        miniphi.load(folder, kv_memory_bytes=1)


def test_threads_do_not_change_the_answer(folder: Path) -> None:
    answers = [
        miniphi.load(folder, num_threads=threads).complete("the dog", seed=5, max_tokens=20).choices
        for threads in (1, 2)
    ]
    assert answers[0] == answers[1]


def test_every_cache_type_gives_nearly_the_same_likelihood(folder: Path) -> None:
    scores = [
        miniphi.load(folder, kv_type=kv).loglikelihood("the cat", " sat on the mat") for kv in ("f32", "f16", "q8")
    ]
    assert scores[1].logprob == pytest.approx(scores[0].logprob, rel=1e-2)
    assert scores[2].logprob == pytest.approx(scores[0].logprob, rel=5e-2)
    assert scores[2].logprob != scores[0].logprob


def test_what_is_missing_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPHI_HOME", str(tmp_path / "cache"))
    with pytest.raises(DownloadError, match="run `miniphi pull phi-3-mini-128k-instruct@april-2024`"):
        miniphi.load("phi-3-mini-128k-instruct", revision="april-2024")
    with pytest.raises(DownloadError, match="there is no file"):
        miniphi.load(tmp_path / "absent")
    bare = write_tiny_model(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"bare.*tokenizer\.json"):
        miniphi.load(bare)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_draft_model_changes_nothing(folder: Path, temperature: float) -> None:
    question = {"seed": 5, "max_tokens": 60, "temperature": temperature, "ignore_eos": True}
    plain = miniphi.load(folder).complete("the dog", speculate="off", **question)  # type: ignore[arg-type]
    drafted = miniphi.load(folder, draft=folder).complete("the dog", **question)  # type: ignore[arg-type]
    assert drafted.choices == plain.choices


def test_a_draft_model_shares_the_memory_for_the_cache(folder: Path) -> None:
    block_bytes = load_program(open_checkpoint(folder)).kv_block_bytes
    assert miniphi.load(folder, draft=folder, kv_memory_bytes=6 * block_bytes).context == 96


def test_a_draft_model_of_another_vocabulary_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"draft .*gguf: has another vocabulary than the model"):
        miniphi.load(folder, draft=smollm2_gguf())


def test_smollm2_knows_paris() -> None:
    llm = miniphi.load(smollm2_gguf())
    assert llm.complete("The capital of France is", temperature=0, max_tokens=1).text == " Paris"
    likely = llm.loglikelihood("The capital of France is", " Paris")
    assert likely.is_greedy
    assert likely.logprob > llm.loglikelihood("The capital of France is", " banana").logprob + 3
    answer = llm.chat([{"role": "user", "content": "What is 2+2?"}], temperature=0, max_tokens=30)
    assert "4" in answer.text
    assert answer.choices[0].finish_reason == "stop"
