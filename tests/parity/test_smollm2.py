"""A real model in 4 bits: SmolLM2 against transformers on the same dequantised weights, and llama.cpp as a witness."""

import sys

import pytest

import miniphi
from benchmarks.numerics import (
    Agreement,
    compare,
    llama_cpp_logits,
    miniphi_logits,
    transformers_logits,
    windows,
)
from miniphi.checkpoint import open_checkpoint
from miniphi.engine import Engine, EngineOptions
from miniphi.llm import LLM
from miniphi.tokenizer import Tokenizer
from tests.shared_data import shared_path, smollm2_gguf

NUM_WINDOWS = 8


@pytest.fixture(scope="module")
def agreements() -> dict[str, Agreement]:
    """Each engine against transformers on windows of WikiText-2."""
    path, text = smollm2_gguf(), shared_path("eval/wikitext2/test.jsonl.gz")
    checkpoint = open_checkpoint(path)
    tokenizer = Tokenizer.from_gguf(checkpoint.metadata, source=str(path))
    engines = {
        "f16": miniphi_logits(checkpoint, kv_type="f16"),
        "q8": miniphi_logits(checkpoint, kv_type="q8"),
    }
    if sys.platform == "linux":
        engines["llama.cpp"] = llama_cpp_logits(path, checkpoint.config.vocab_size)
    return compare(engines, transformers_logits(checkpoint), windows(text, tokenizer, NUM_WINDOWS))


def test_perplexity_is_within_half_a_percent(agreements: dict[str, Agreement]) -> None:
    assert 10 < agreements["f16"].reference_perplexity < 60
    assert abs(agreements["f16"].perplexity_error) < 0.005
    assert abs(agreements["q8"].perplexity_error) < 0.005


def test_the_most_probable_token_is_the_same(agreements: dict[str, Agreement]) -> None:
    assert agreements["f16"].top1 >= 0.97


def test_no_further_from_transformers_than_llama_cpp(agreements: dict[str, Agreement]) -> None:
    if "llama.cpp" not in agreements:
        pytest.skip("the wheel of llama.cpp is for Linux")
    assert agreements["f16"].kl_divergence <= agreements["llama.cpp"].kl_divergence
    assert abs(agreements["f16"].perplexity / agreements["llama.cpp"].perplexity - 1) < 0.005


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_guessing_ahead_changes_no_bit(temperature: float) -> None:
    text = "the lazy dog sleeps while the quick brown fox jumps over the fence and runs away. " * 3
    question = [{"role": "user", "content": f"Repeat this text: {text}"}]
    answers = []
    for row_cost, mode in ((None, "off"), (0.0, "lookup"), (0.1, "lookup")):
        options = EngineOptions(draft_row_cost=row_cost, max_context=512)
        llm = miniphi.load(smollm2_gguf(), context=512)
        llm = LLM(Engine(llm._engine._program, options=options), llm.tokenizer, llm.template, "smollm2")
        answers.append(
            llm.chat(question, temperature=temperature, seed=3, max_tokens=80, logprobs=3, n=2, speculate=mode)
        )
    for answer in answers[1:]:
        assert answer.choices == answers[0].choices
        assert 0 < answer.timings.accepted_tokens < answer.timings.drafted_tokens
